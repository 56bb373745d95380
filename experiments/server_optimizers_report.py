"""What the study of server optimizers says: claims, a table for each way to deal the images, a reading, figures."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from rich.console import Console
from rich.rule import Rule

from experiments.common import rate_grid
from experiments.common.report import bullets, say_where
from experiments.common.reproduction import judged
from fl_jax.data import class_counts
from fl_jax.results import (
    Claim,
    Column,
    Direction,
    Missing,
    RunFolder,
    Table,
    claims_table,
    comparison_table,
    curves,
    number,
    select,
    signed,
    with_bounds,
    with_margin,
)
from fl_jax.results.crossing import rounds_to_target
from fl_jax.statistics import Interval, mean_interval, paired_difference

if TYPE_CHECKING:
    from experiments.server_optimizers import Config, Draw, Tried

CLIENT, SERVER = "client rate", "server rate"
FEDAVG, PLAIN, IID = "FedAvg", "FedAvg, server rate 1", "IID"
NEAR = 0.02
"""a point of a grid is near its best where its validation accuracy is less than this below it"""
_PAPER = "arXiv 2003.00295, Table 1"
_FASTER = {
    "FedAvgM": (
        "momentum trains faster without skew too: on other seeds' validation images FedAvg has after 300 rounds (.856) about "
        "what FedAvgM has after 150 (.859), and the difference is .021 after 150 rounds and .011 after 450"),
    "FedAdam": (
        "it trains faster without skew too: on other seeds' validation images FedAvg has after 300 rounds (.856) less than "
        "FedAdam has after 150 (.863), and the difference is .025 after 150 rounds and .016 after 450"),
}
_ONE_SEED = (
    "one seed of the grid does not tell FedAdam's best rates apart with skew: client and server rate .316 and .01 have .782 "
    "there, as .1 and .0032 have; on six other seeds' validation images the former gain .000 [-.024, .024] over FedAvg, the "
    "latter .025 [.009, .042]")
_FRAME = {"boxstyle": "square,pad=0.25", "facecolor": "none", "edgecolor": "#D55E00", "linewidth": 1.6}
_difference = with_bounds(signed())
Grids = Mapping[str, Mapping[str, "Tried"]]
"""Every method's grid: by partition and method."""
Rates = Mapping[str, Mapping[str, Mapping[str, float]]]
"""The rates of every arm: by arm and partition."""
Law = Callable[["Measured"], npt.NDArray[np.float64]]


def skewed(config: "Config") -> str:
    """What the partition with label skew is called."""
    return f"Dir({config.alpha:g})"


def claims(config: "Config") -> list[Claim]:
    """What the configuration is to show."""
    return [claim for claim, _ in _stated(config)]


def _stated(config: "Config") -> Iterator[tuple[Claim, Law]]:
    """Each claim with the function that measures it, one value a seed.

    The paper's table has, for CIFAR-10 at 500 clients of Dir(.1): FedAdagrad .721, FedAdam .774, FedYogi .780, FedAvgM .774,
    FedAvg .728; and for EMNIST, whose clients are writers: .851, .856, .855, .852, .849. Other images and another network carry
    over the signs of these differences, not their sizes.
    """
    where = skewed(config)

    def minus(arm: str, other: str, partition: str) -> Law:
        return lambda measured: measured.difference(partition, arm, other)

    gains = {"FedAvgM": 0.046, "FedAdam": 0.046, "FedYogi": 0.052, "FedAdagrad": -0.007}
    gains = {arm: gain for arm, gain in gains.items() if arm in config.methods}
    for arm, gain in gains.items():
        if config.quick:
            tolerance, reason = 0.05, (
                "three seeds of few rounds, in which accuracies swing by .05 from one cohort to the next: two standard errors of "
                "a mean")
        elif gain > 0:
            tolerance, reason = 0.0, f"the published difference, on CIFAR-10, is {gain:+.3f}: the sign is to be the same"
        else:
            tolerance, reason = 0.01, (
                f"published as even ({gain:+.3f} on CIFAR-10, +.002 on EMNIST): two standard errors of five seeds that differ by "
                ".01")
        source = f"{_PAPER}; 1909.06335, Figure 5" if arm == "FedAvgM" else _PAPER
        yield Claim(
            f"{arm} minus FedAvg, {where}", source, 0.0, Direction.AT_LEAST, tolerance, reason, quick=config.quick,
        ), minus(arm, FEDAVG, where)
    if config.quick:
        return
    yield Claim(
        f"FedAvg minus plain averaging, {where}", "own bar", 0.0, Direction.AT_LEAST, 0.01,
        "plain averaging is in FedAvg's grid: it can be better by the noise of the choice only"), minus(FEDAVG, PLAIN, where)
    if config.iid:
        for arm, cause in _FASTER.items():
            if arm not in gains:
                continue
            yield Claim(
                f"{arm} minus FedAvg, {IID}", "own bar", 0.0, Direction.WITHIN, 0.01,
                "without skew a mean of ten clients has little noise for a server to filter; on EMNIST, of mild skew, the paper "
                "has differences of .003 to .007", expected=False, cause=cause), minus(arm, FEDAVG, IID)
    if config.iid and "FedAdam" in gains:
        yield Claim(
            f"FedAdam's gain over FedAvg, {where} minus {IID}", "own bar", 0.0, Direction.AT_LEAST, 0.0,
            f"published as {gains['FedAdam']:+.3f} with label skew (CIFAR-10) and +.007 with that of writers (EMNIST)",
            expected=False, cause=_ONE_SEED,
        ), lambda measured: measured.difference(where, "FedAdam", FEDAVG) - measured.difference(IID, "FedAdam", FEDAVG)


def conclude(
    folder: RunFolder, config: "Config", tried: Grids, chosen: Rates, draws: Sequence["Draw"], metrics: pd.DataFrame,
) -> None:
    """Prints the tables and their reading; writes claims, summary and figures."""
    console, measured = Console(), Measured(config, tried, chosen, draws, metrics)
    verdicts = judged("server_optimizers", _stated(config), measured)
    folder.write_claims(verdicts)
    for partition in tried:
        console.print("", measured.table(partition))
    console.print("", Rule("Reading", align="left"), bullets(measured.reading()), "", claims_table(verdicts, "Claims"))
    for partition in tried:
        folder.save_figure(f"accuracy_{_file(partition)}", measured.curves(partition))
        folder.save_figure(f"grid_{_file(partition)}", grid_figure(tried[partition]))
    folder.write_summary(measured.summary())
    say_where(console, folder, f"{config.seeds} seeds")


class Measured:
    """The test accuracies of all arms, and what follows from them."""

    def __init__(
        self, config: "Config", tried: Grids, chosen: Rates, draws: Sequence["Draw"], metrics: pd.DataFrame,
    ) -> None:
        self.config, self.tried, self.chosen = config, tried, chosen
        self.arms = [PLAIN, *(arm for arm in chosen if arm != PLAIN)]
        self.accuracies = select(metrics, "accuracy", "test")
        counted = self.accuracies[self.accuracies["round"] > config.counted_after]
        means = counted.groupby(["arm", "site", "seed"])["value"].agg(lambda values: values.mean(skipna=False))
        self._means = {key: rows.to_numpy() for key, rows in means.groupby(level=["arm", "site"])}
        self._classes = draws[0].dataset.class_names
        self._mixes: dict[str, list[npt.NDArray[np.float64]]] = {partition: [] for partition in tried}
        for draw in draws:
            counts = class_counts(draw.dataset.train, draw.dataset.num_classes)
            self._mixes[draw.partition].append(counts / counts.sum(axis=1, keepdims=True))

    def values(self, partition: str, arm: str, site: str = "all") -> npt.NDArray[np.float64]:
        """float64[S], by seed: the accuracy on the test set, or on one class of it, averaged over the rounds that count."""
        return self._means[f"{arm}, {partition}", site]

    def difference(self, partition: str, arm: str, other: str) -> npt.NDArray[np.float64]:
        """float64[S]: arm - other in the same seed."""
        return self.values(partition, arm) - self.values(partition, other)

    def gain(self, partition: str, arm: str, other: str = FEDAVG) -> Interval:
        """The mean difference, paired by seed."""
        return paired_difference(self.values(partition, arm), self.values(partition, other))

    def worst_client(self, partition: str, arm: str) -> npt.NDArray[np.float64]:
        """float64[S]: the least over clients of the accuracy on test images in the client's own mix of classes."""
        of_classes = np.stack([self.values(partition, arm, name) for name in self._classes], axis=1)
        return np.array([(mix @ accuracy).min() for mix, accuracy in zip(self._mixes[partition], of_classes, strict=True)])

    def rounds_to_target(self, partition: str, arm: str) -> npt.NDArray[np.float64]:
        """float64[S], by seed, as results.crossing counts them: the best measurement so far, interpolated; NaN where none reaches
        the target."""
        rows = self.accuracies[(self.accuracies["arm"] == f"{arm}, {partition}") & (self.accuracies["site"] == "all")]
        by_seed = rows.sort_values("round").groupby("seed")
        return np.array([rounds_to_target(own["round"], own["value"], self.config.target) for _, own in by_seed])

    def score(self, partition: str, arm: str) -> float:
        """The validation accuracy of an arm's point of its grid."""
        axes, scores, choice = self.tried[partition][FEDAVG if arm == PLAIN else arm]
        points = rate_grid.points(axes)
        return float(scores.mean(axis=1)[points.index(choice.point if arm != PLAIN else dict(self.chosen[arm][partition]))])

    def near(self, partition: str, arm: str) -> tuple[int, int]:
        """How many points of a grid are near the best, and how many there are; those that diverged are far."""
        means = self.tried[partition][arm].scores.mean(axis=1)
        return int((means > np.nanmax(means) - NEAR).sum()), len(means)

    def table(self, partition: str) -> Table:
        """One row an arm: its rates, what they were chosen by, and what came of them on test images."""
        rows = []
        for arm in self.arms:
            point, reached = self.chosen[arm][partition], self.rounds_to_target(partition, arm)
            row: dict[str, Any] = {
                "arm": arm, **point, "score": self.score(partition, arm), "test": mean_interval(self.values(partition, arm)),
                "worst": mean_interval(self.worst_client(partition, arm)),
                "rounds": Missing(f"accuracy {self.config.target:g} is not reached in every seed") if np.isnan(reached).any()
                else reached.mean()}
            if arm != PLAIN:
                row["near"] = "{} of {}".format(*self.near(partition, arm))
            if arm != FEDAVG:
                row["gain"] = self.gain(partition, arm)
            rows.append(row)
        short, margin = "{:.3g}".format, with_margin()
        columns = [
            Column("arm", "", right=False), Column(CLIENT, CLIENT, short), Column(SERVER, SERVER, short),
            Column("score", "validation", number()), Column("near", f"within {NEAR:g}"),
            Column("test", "test", margin), Column("worst", "worst client", margin),
            Column("rounds", f"rounds to {self.config.target:g}", number(0)), Column("gain", "Δ FedAvg", _difference)]
        first = self.config.counted_after + 1
        title = (
            f"Accuracy in rounds {first} to {self.config.rounds}, {partition}, {self.config.seeds} seeds; "
            "± half of the 95 % interval; Δ paired by seed")
        return comparison_table(rows, columns, title)

    def reading(self) -> list[str]:
        """Sentences that follow from the numbers, whatever these are."""
        others = [arm for arm in self.arms if arm not in (PLAIN, FEDAVG)]
        sentences = [self._comparison(partition, others) for partition in self.tried if others]
        for partition in self.tried:
            gain = self.gain(partition, FEDAVG, PLAIN)
            sentences.append(f"{partition}: a tuned server rate ({self.chosen[FEDAVG][partition][SERVER]:.3g}) changes FedAvg by "
                             f"{_difference(gain)} against server rate 1, whose client rate is tuned too.")
        if len(self.tried) > 1 and others:
            where = skewed(self.config)
            more = {arm: self.difference(where, arm, FEDAVG) - self.difference(IID, arm, FEDAVG) for arm in others}
            parts = [f"{arm} {_difference(mean_interval(values))}" for arm, values in more.items()]
            sentences.append(f"How much larger the gain over FedAvg is with skew than without: {', '.join(parts)}.")
        for partition in self.tried:
            parts = ["{} {} of {}".format(arm, *self.near(partition, arm)) for arm in self.arms if arm != PLAIN]
            sentences.append(f"{partition}: pairs of rates that come within {NEAR:g} of the method's best: {', '.join(parts)}.")
        edges = [f"{arm}'s {' and '.join(of[arm].choice.edges)} ({partition})" for partition, of in self.tried.items()
                 for arm in of if of[arm].choice.edges]
        sentences.append(
            f"On the edge of their grids, so that better ones may lie beyond: {', '.join(edges)}." if edges
            else "No chosen rate lies on the edge of its grid.")
        return sentences

    def _comparison(self, partition: str, arms: Sequence[str]) -> str:
        gains = {arm: self.gain(partition, arm) for arm in arms}
        groups = {
            "above FedAvg": [arm for arm, gain in gains.items() if gain.low > 0],
            "below it": [arm for arm, gain in gains.items() if gain.high < 0]}
        groups["not told apart from it"] = [arm for arm in gains if not any(arm in group for group in groups.values())]
        named = {what: ", ".join(f"{arm} {_difference(gains[arm])}" for arm in group) for what, group in groups.items() if group}
        parts = [f"{found} {what}" for what, found in named.items()]
        return f"{partition}: {'; '.join(parts)}."

    def summary(self) -> dict[str, Any]:
        """Rates, grids, intervals and the reading, by partition and arm."""
        found: dict[str, Any] = {}
        for partition, of in self.tried.items():
            found[partition] = {arm: {
                "rates": dict(self.chosen[arm][partition]), "validation": self.score(partition, arm),
                "test": mean_interval(self.values(partition, arm))._asdict(),
                "worst_client": mean_interval(self.worst_client(partition, arm))._asdict(),
                "worst_class": mean_interval(self.values(partition, arm, "worst"))._asdict(),
                "rounds_to_target": self.rounds_to_target(partition, arm).tolist(),
                "minus_fedavg": None if arm == FEDAVG else self.gain(partition, arm)._asdict(),
            } for arm in self.arms}
            for arm, (axes, scores, choice) in of.items():
                found[partition][arm]["grid"] = [
                    {**point, "validation": values.tolist()}
                    for point, values in zip(rate_grid.points(axes), scores, strict=True)]
                found[partition][arm]["edges"] = list(choice.edges)
        return {"target": self.config.target, "partitions": found, "reading": self.reading()}

    def curves(self, partition: str) -> Figure:
        """Test accuracy over rounds, with bands over seeds."""
        names = {f"{arm}, {partition}": arm for arm in self.arms}
        rows = self.accuracies[self.accuracies["arm"].isin(names)]
        return curves(
            rows.assign(arm=rows["arm"].map(names)), "accuracy", "test", "all", [*self.chosen],
            bounds=(0.0, 1.0), size=(7.0, 3.8))


def grid_figure(tried: Mapping[str, "Tried"]) -> Figure:
    """Validation accuracy of every point of every grid: one panel a method, the chosen point in a frame."""
    figure = Figure(figsize=(2.1 * len(tried), 2.6), layout="constrained")
    means = {arm: of.scores.mean(axis=1).reshape([len(values) for values in of.axes.values()]) for arm, of in tried.items()}
    top = max(np.nanmax(values) for values in means.values())
    norm = TwoSlopeNorm(top - 0.1, vmin=top - 0.3, vmax=top + 1e-6)
    for i, (arm, (axes, _, choice)) in enumerate(tried.items()):
        panel = figure.add_subplot(1, len(tried), i + 1)
        panel.imshow(means[arm], norm=norm, cmap="viridis", origin="lower", aspect="auto")
        for (row, column), value in np.ndenumerate(means[arm]):
            best = choice.point == {CLIENT: axes[CLIENT][row], SERVER: axes[SERVER][column]}
            panel.text(column, row, number(2)(value) if np.isfinite(value) else "–", ha="center", va="center", fontsize=7.5,
                       color="white" if value <= top - 0.1 else "black", fontweight="bold" if best else "normal",
                       bbox=_FRAME if best else None)
        panel.set_title(arm, fontsize=9)
        for axis, name in ((panel.xaxis, SERVER), (panel.yaxis, CLIENT)):
            axis.set_ticks(range(len(axes[name])), [f"{value:.2g}" for value in axes[name]])
        panel.tick_params(labelsize=7.5, length=0)
        panel.set_xlabel(SERVER, fontsize=8)
        if i == 0:
            panel.set_ylabel(CLIENT, fontsize=8)
    return figure


def _file(partition: str) -> str:
    """A partition's name as part of a file's."""
    return partition.lower().replace("(", "_").replace(")", "").replace(".", "_")
