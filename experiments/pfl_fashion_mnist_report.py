"""What pfl_fashion_mnist says: accuracy published and here, the gain over FedAvg by seed, who gains, a reading, figures."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.rule import Rule

from experiments.common.figures import FAINT, GREY, dress
from experiments.common.report import BestRounds, bullets, say_where
from experiments.pfl_fashion_mnist_protocol import CENTRAL, FEDAVG, GAP, LOCAL, PERSONALISED, PUBLISHED, Config
from fl_jax.data import FederatedDataset, class_counts
from fl_jax.results import (
    Column,
    Missing,
    RunFolder,
    Table,
    Verdict,
    claims_table,
    comparison_table,
    number,
    signed,
    with_bounds,
    with_margin,
)
from fl_jax.results.figures import PALETTE
from fl_jax.statistics import Interval, mean_interval, paired_difference

ACCURACY = (0.0, 1.0)
PRIOR = "most frequent class"
"""What is known without an image: a client's most frequent class among its training images."""
_difference = with_bounds(signed())
_LINE: dict[str, Any] = {"linewidth": 1.6, "marker": "o", "markersize": 2.5}


class Measured(BestRounds):
    """The test accuracies of all arms, and what follows from them."""

    def __init__(self, config: Config, datasets: Sequence[FederatedDataset], metrics: pd.DataFrame) -> None:
        super().__init__(metrics)
        self.config, self.datasets, self.arms = config, datasets, list(config.arms)

    def clients(self, arm: str) -> npt.NDArray[np.float64]:
        """float64[S, N]: at every client, at the measurement that counts."""
        return np.stack([self.values(arm, name) for name in self.datasets[0].site_names], axis=1)

    def difference(self, arm: str, other: str = FEDAVG) -> npt.NDArray[np.float64]:
        """float64[S]: arm - other in the same seed."""
        return self.values(arm) - self.values(other)

    def gain(self, arm: str, other: str = FEDAVG) -> Interval:
        """The mean difference, paired by seed."""
        return paired_difference(self.values(arm), self.values(other))

    def course(self, arm: str) -> pd.DataFrame:
        """The accuracy of all test images together over the rounds: a column a seed, a row a measured round."""
        rows = self.rows[(self.rows["arm"] == arm) & (self.rows["site"] == "all")]
        return rows.pivot(index="round", columns="seed", values="value")

    def losers(self, arm: str) -> float:
        """The share of clients, over all seeds, whose accuracy is below that with FedAvg."""
        return float((self.clients(arm) < self.clients(FEDAVG)).mean())

    @cached_property
    def prior(self) -> npt.NDArray[np.float64]:
        """float64[S, N]: the share of a client's test images that are of the most frequent class among its training images."""
        found = []
        for dataset in self.datasets:
            train, test = (class_counts(records, dataset.num_classes) for records in (dataset.train, dataset.test))
            found.append(test[np.arange(len(test)), train.argmax(axis=1)] / test.sum(axis=1))
        return np.array(found)

    @property
    def prior_together(self) -> npt.NDArray[np.float64]:
        """float64[S]: the same of all clients' test images together."""
        weights = [dataset.test.sizes for dataset in self.datasets]
        return np.array([np.average(row, weights=own) for row, own in zip(self.prior, weights, strict=True)])


def conclude(folder: RunFolder, measured: Measured, verdicts: Sequence[Verdict]) -> None:
    """Prints tables and their reading; writes summary and figures."""
    console, sentences = Console(), list(reading(measured))
    console.print("", overview(measured), "", by_seed(measured), "")
    console.print(Rule("Reading", align="left"), bullets(sentences), "", claims_table(verdicts, "Claims"))
    folder.save_figure("accuracy_over_rounds", over_rounds(measured))
    folder.save_figure("accuracy_of_clients", of_clients(measured))
    folder.write_summary(summary(measured) | {"reading": sentences})
    say_where(console, folder, f"{measured.config.seeds} seeds")


def overview(measured: Measured) -> Table:
    """One row an arm: accuracy published and here, the worst client, the spread over clients, and the gain over FedAvg."""
    rows: list[dict[str, Any]] = []
    for arm in measured.arms:
        published = PUBLISHED.get(arm)
        row: dict[str, Any] = {
            "arm": arm, "published": Missing("not in the published table") if published is None else published,
            "here": mean_interval(measured.values(arm)), "last": measured.last(arm).mean(), "round": measured.rounds(arm).mean(),
            "worst": mean_interval(measured.values(arm, "worst")), "spread": measured.values(arm, "std").mean()}
        if arm != FEDAVG:
            row |= {"gain": measured.gain(arm), "losers": 100 * measured.losers(arm)}
        rows.append(row)
    floor = measured.prior
    rows.append({"arm": PRIOR, "here": mean_interval(measured.prior_together), "worst": mean_interval(floor.min(axis=1)),
                 "spread": floor.std(axis=1).mean(), "gain": paired_difference(measured.prior_together, measured.values(FEDAVG)),
                 "losers": 100 * float((floor < measured.clients(FEDAVG)).mean())})
    margin = with_margin()
    columns = [
        Column("arm", "", right=False), Column("published", "published", number()), Column("here", "here", margin),
        Column("last", "last round", number()), Column("round", "best round", number(0)), Column("worst", "worst client", margin),
        Column("spread", "sd of clients", number()), Column("gain", "Δ FedAvg", _difference),
        Column("losers", "% clients below FedAvg", number(0))]
    config = measured.config
    title = (
        f"Test accuracy, {config.share:.0%} of the images, best of {config.rounds} rounds, {config.seeds} seeds; ± half of the "
        "95 % interval; Δ paired by seed")
    return comparison_table(rows, columns, title)


def by_seed(measured: Measured) -> Table:
    """One row an arm: what it has more than FedAvg in each seed."""
    arms = [arm for arm in measured.arms if arm != FEDAVG]
    rows = [{"arm": FEDAVG} | _numbered(measured.values(FEDAVG))] if not arms else [
        {"arm": arm} | _numbered(measured.difference(arm)) | {"mean": measured.gain(arm)} for arm in arms]
    columns = [Column("arm", "", right=False), *(Column(f"{i}", f"seed {i}", signed()) for i in range(measured.config.seeds)),
               Column("mean", "mean [95 % interval]", _difference)]
    return comparison_table(rows, columns, "Accuracy minus FedAvg's, by seed: each deals the images anew")


def _numbered(values: npt.NDArray[np.float64]) -> dict[str, float]:
    return {f"{i}": float(value) for i, value in enumerate(values)}


def reading(measured: Measured) -> Iterator[str]:
    """Sentences that follow from the numbers, whatever these are."""
    personal = [arm for arm in PERSONALISED if arm in measured.arms]
    wide = [arm for arm in personal if measured.difference(arm).min() >= GAP]
    narrow = [f"{arm} in {(measured.difference(arm) >= GAP).sum()} of {measured.config.seeds}"
              for arm in personal if arm not in wide]
    parts = ([f"{', '.join(wide)} in every seed"] if wide else []) + narrow
    if parts:
        yield f"At least {100 * GAP:g} points above FedAvg: {'; '.join(parts)}."
    others = [arm for arm in measured.arms if arm not in (FEDAVG, LOCAL, CENTRAL)]
    for reference, what in ((LOCAL, "Against training alone"), (CENTRAL, "Against one model of all clients' images")):
        if reference in measured.arms and others:
            gains = [f"{arm} {_difference(measured.gain(arm, reference))}" for arm in others]
            yield f"{what} ({number()(measured.values(reference).mean())}): {', '.join(gains)}."
    floor = paired_difference(measured.prior_together, measured.values(FEDAVG))
    right = number()(measured.prior_together.mean())
    yield (f"Guessing a client's most frequent class, without a look at the image, is right in {right}, {_difference(floor)} "
           "against FedAvg: so much is known of a client by its mix of classes alone.")
    worst = {arm: float(measured.values(arm, "worst").mean()) for arm in measured.arms}
    best = max(worst, key=worst.__getitem__)
    yield f"The worst client fares best with {best}: {number()(worst[best])}, with FedAvg {number()(worst[FEDAVG])}."
    losing = [f"{arm} {100 * measured.losers(arm):.0f} %" for arm in measured.arms if arm != FEDAVG]
    if losing:
        yield f"Clients that are worse off than with FedAvg: {', '.join(losing)}."


def summary(measured: Measured) -> dict[str, Any]:
    """The arms' numbers for summary.json, one value a seed."""
    arms = {arm: {
        "published": PUBLISHED.get(arm), "best": measured.values(arm).tolist(), "last": measured.last(arm).tolist(),
        "round": measured.rounds(arm).tolist(), "worst_client": measured.values(arm, "worst").tolist(),
        "sd_of_clients": measured.values(arm, "std").tolist(), "minus_fedavg": measured.difference(arm).tolist(),
        "share_of_clients_below_fedavg": measured.losers(arm)} for arm in measured.arms}
    return {"arms": arms, "most_frequent_class": measured.prior_together.tolist(), "notes": list(measured.datasets[0].notes)}


def over_rounds(measured: Measured) -> Figure:
    """Accuracy over rounds, a thin line a seed; and, where clients train alone too, what the others have more, with interval."""
    others = [arm for arm in measured.arms if arm not in (FEDAVG, CENTRAL, LOCAL)] if LOCAL in measured.arms else []
    drawing = Figure(figsize=(8.4 if others else 4.6, 3.4), layout="constrained")
    panels = drawing.subplots(1, 2 if others else 1, squeeze=False)[0]
    colors = dict(zip(measured.arms, (PALETTE[i % len(PALETTE)] for i in range(len(measured.arms))), strict=True))
    dashes = {arm: "-" if i < len(PALETTE) else (0, (3, 1.5)) for i, arm in enumerate(measured.arms)}
    for arm in measured.arms:
        course = measured.course(arm)
        panels[0].plot(course.index, course, color=colors[arm], linewidth=0.5, alpha=0.4)
        panels[0].plot(course.index, course.mean(axis=1), color=colors[arm], linestyle=dashes[arm], label=arm, **_LINE)
    panels[0].axhline(measured.prior_together.mean(), color=GREY, linewidth=0.9, linestyle=(0, (4, 2)), label=PRIOR)
    dress(panels[0], "round", "test accuracy", "mean of seeds, and each seed")
    panels[0].set_ylim(0, 1.02)
    alone = measured.course(LOCAL) if others else None
    for arm in others:
        more = measured.course(arm) - alone
        mean, low, high = np.array([mean_interval(values)[:3] for values in more.to_numpy()]).T
        panels[1].fill_between(more.index, low, high, color=colors[arm], alpha=0.13, linewidth=0)
        panels[1].plot(more.index, mean, color=colors[arm], linestyle=dashes[arm], **_LINE)
    if others:
        panels[1].axhline(0, color=GREY, linewidth=0.9)
        dress(panels[1], "round", "minus training alone", "paired by seed, with the 95 % interval")
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    drawing.legend(loc="outside lower center", ncols=5 if others else 3, frameon=False, fontsize=8)
    return drawing


def of_clients(measured: Measured) -> Figure:
    """A panel an arm: every client of every seed, its accuracy with FedAvg and with the arm; below the diagonal it loses."""
    arms = [arm for arm in measured.arms if arm != FEDAVG] or [FEDAVG]
    across = min(4, len(arms))
    down = -(-len(arms) // across)
    drawing = Figure(figsize=(2.1 * across + 0.5, 2.2 * down + 0.4), layout="constrained")
    panels = drawing.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    sizes = np.concatenate([dataset.train.sizes for dataset in measured.datasets])
    x = measured.clients(FEDAVG).reshape(-1)
    for i, (axes, arm) in enumerate(zip(panels.flat, arms, strict=False)):
        y = measured.clients(arm).reshape(-1)
        axes.plot(ACCURACY, ACCURACY, color=GREY, linewidth=0.8)
        axes.scatter(x, y, s=60 * sizes / sizes.max() + 2, color=PALETTE[0], alpha=0.5, linewidth=0)
        axes.axhline(measured.values(arm).mean(), color=PALETTE[1], linewidth=0.9, linestyle=(0, (4, 2)))
        dress(axes, title=arm)
        axes.grid(axis="x", color=FAINT, linewidth=0.6)
        axes.tick_params(labelbottom=i + across >= len(arms))  # also where no panel is below
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-0.03, 1.03)
    for axes in panels.flat[len(arms):]:
        axes.set_visible(False)
    drawing.supxlabel("a client's test accuracy with FedAvg", fontsize=9)
    drawing.supylabel("with the arm", fontsize=9)
    drawing.suptitle(
        "A dot is a client, the larger the more images it trains on; dashed: all test images together", fontsize=8, color=GREY)
    return drawing
