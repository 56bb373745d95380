"""What niid_bench says: a table a cell with published accuracy beside what came out, a reading, figures."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.rule import Rule

from experiments.common.report import BestRounds, bullets, say_where
from experiments.niid_bench_protocol import CENTRAL, FEDAVG, FEDERATED, LOCAL, PUBLISHED, PUBLISHED_ROUNDS, Cell, Config, label
from fl_jax.data import FederatedDataset, label_distribution, no_records
from fl_jax.results import (
    Column,
    Missing,
    RunFolder,
    Table,
    Verdict,
    claims_table,
    comparison_table,
    curves,
    number,
    signed,
    with_bounds,
    with_margin,
)
from fl_jax.statistics import Interval, mean_interval, paired_difference

_difference = with_bounds(signed(4))
_accuracy = number(4)
Datasets = Mapping[Cell, Sequence[FederatedDataset]]
"""The federations of every cell, by seed."""


class Measured:
    """The test accuracies of all arms in all cells, and what follows from them. Of each run its best measurement counts."""

    def __init__(self, config: Config, datasets: Datasets, metrics: pd.DataFrame) -> None:
        self.config, self.datasets, self.arms = config, datasets, list(config.arms)
        self.best = BestRounds(metrics)

    def name(self, cell: Cell, arm: str) -> str:
        """An arm as its rows call it."""
        return f"{arm}, {label(self.config, cell)}"

    def values(self, cell: Cell, arm: str, site: str = "all") -> npt.NDArray[np.float64]:
        """float64[S], by seed: on the test set; of local training the mean over clients, each on a random part of it."""
        return self.best.values(self.name(cell, arm), site)

    def last(self, cell: Cell, arm: str) -> npt.NDArray[np.float64]:
        """float64[S]: after the last round."""
        return self.best.last(self.name(cell, arm))

    def difference(self, cell: Cell, arm: str, other: str = FEDAVG) -> npt.NDArray[np.float64]:
        """float64[S]: arm - other in the same seed."""
        return self.values(cell, arm) - self.values(cell, other)

    def gain(self, cell: Cell, arm: str, other: str = FEDAVG) -> Interval:
        """The mean difference, paired by seed."""
        return paired_difference(self.values(cell, arm), self.values(cell, other))

    def published(self, cell: Cell, arm: str) -> float | None:
        """The published accuracy, whatever the configuration, of a cell that is dealt as published; None where there is none."""
        as_published = label(self.config, cell) == label(Config(), cell)
        return PUBLISHED.get(cell, {}).get(arm) if as_published else None


def conclude(folder: RunFolder, measured: Measured, verdicts: Sequence[Verdict]) -> None:
    """Prints tables and their reading; writes summary and figures."""
    console, sentences = Console(), list(reading(measured))
    for cell in measured.datasets:
        console.print("", overview(measured, cell))
    console.print("", Rule("Reading", align="left"), bullets(sentences), "", claims_table(verdicts, "Claims"))
    for cell in measured.datasets:
        folder.save_figure(f"accuracy_{_file(measured.config, cell)}", over_rounds(measured, cell))
        folder.save_figure(f"labels_{_file(measured.config, cell)}", labels(measured, cell))
    folder.write_summary(summary(measured) | {"reading": sentences})
    say_where(console, folder, f"{measured.config.seeds} seeds")


def overview(measured: Measured, cell: Cell) -> Table:
    """One row an arm: accuracy published and here, after the last round, and the difference from FedAvg."""
    rows: list[dict[str, Any]] = []
    for arm in measured.arms:
        published = measured.published(cell, arm)
        row: dict[str, Any] = {
            "arm": arm, "published": Missing("not in the published table") if published is None else published,
            "here": mean_interval(measured.values(cell, arm)), "last": mean_interval(measured.last(cell, arm)),
            "round": measured.best.rounds(measured.name(cell, arm)).mean(),
            "worst": mean_interval(measured.values(cell, arm, "worst")) if arm == LOCAL else Missing("one model for all, tested on one test set")}
        rows.append(row if arm == FEDAVG else row | {"gain": measured.gain(cell, arm)})
    margin = with_margin(4)
    columns = [
        Column("arm", "", right=False), Column("published", "published, 50 rounds", _accuracy), Column("here", "here", margin),
        Column("last", "last round", margin), Column("round", "best round", number(0)), Column("worst", "worst client", margin),
        Column("gain", "Δ FedAvg", _difference)]
    config = measured.config
    title = (
        f"{label(config, cell)}: test accuracy, {config.share:.0%} of the training images, best of {config.rounds} rounds, {config.seeds} seeds; "
        "± half of the 95 % interval; Δ paired by seed")
    return comparison_table(rows, columns, title)


def reading(measured: Measured) -> Iterator[str]:
    """Sentences that follow from the numbers, whatever these are."""
    config = measured.config
    federated = [arm for arm in FEDERATED if arm in measured.arms]
    for cell, datasets in measured.datasets.items():
        where, sizes = label(config, cell), np.stack([dataset.train.sizes for dataset in datasets])
        yield f"{where}: a client has {sizes.min():,} to {sizes.max():,} training images, and makes up to {_steps(config, sizes):,} steps a round."
        means = {arm: float(measured.values(cell, arm).mean()) for arm in federated}
        if len(means) > 1:
            best, least = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
            always = all((measured.difference(cell, best, arm) > 0).all() for arm in federated if arm != best)
            yield (f"{where}: the federated algorithms lie within {100 * (means[best] - means[least]):.2f} points, from {least} {_accuracy(means[least])} "
                   f"to {best} {_accuracy(means[best])}, which is {'ahead of every other in every seed' if always else 'not ahead in every seed'}.")
        for other, what in ((LOCAL, "a model of a client's own"), (CENTRAL, "training on all images at one place, with as many steps")):
            if other in measured.arms:
                gains = ", ".join(f"{arm} {_difference(measured.gain(cell, arm, other))}" for arm in federated)
                yield f"{where}, against {what} ({_accuracy(measured.values(cell, other).mean())}): {gains}."
    chosen = [100 * (measured.values(cell, arm) - measured.last(cell, arm)).mean() for cell in measured.datasets for arm in federated]
    if config.rounds > config.evaluate_every:
        yield (f"That test images choose the round adds {np.mean(chosen):.2f} points to a federated accuracy in the mean, and up to "
               f"{np.max(chosen):.2f}; published accuracies have it too.")
    gaps = {(cell, arm): 100 * (measured.values(cell, arm).mean() - published) for cell in measured.datasets for arm in federated
            if (published := measured.published(cell, arm)) is not None}
    if gaps:
        cell, arm = max(gaps, key=lambda at: abs(gaps[at]))
        yield (f"From the accuracies published for {PUBLISHED_ROUNDS} rounds, these differ by {np.mean([*gaps.values()]):+.2f} points in the mean, and "
               f"at most by {gaps[cell, arm]:+.2f} ({arm}, {label(config, cell)}).")


def _steps(config: Config, sizes: npt.NDArray[np.int64]) -> int:
    """The steps of the largest client in a round."""
    return config.epochs * -(-int(sizes.max()) // config.batch_size)


def summary(measured: Measured) -> dict[str, Any]:
    """The arms' numbers for summary.json, one value a seed."""
    cells = {}
    for cell, datasets in measured.datasets.items():
        arms = {arm: {
            "published": measured.published(cell, arm), "best": measured.values(cell, arm).tolist(), "last": measured.last(cell, arm).tolist(),
            "round": measured.best.rounds(measured.name(cell, arm)).tolist(),
            "minus_fedavg": measured.difference(cell, arm).tolist()} for arm in measured.arms}
        if LOCAL in arms:
            arms[LOCAL]["worst_client"] = measured.values(cell, LOCAL, "worst").tolist()
        cells[label(measured.config, cell)] = {
            "arms": arms, "sizes": [dataset.train.sizes.tolist() for dataset in datasets], "notes": list(datasets[0].notes)}
    return {"cells": cells}


def over_rounds(measured: Measured, cell: Cell) -> Figure:
    """Test accuracy over rounds, with bands over seeds."""
    names = {measured.name(cell, arm): arm for arm in measured.arms}
    rows = measured.best.rows[measured.best.rows["arm"].isin(names)]
    return curves(
        rows.assign(arm=rows["arm"].map(names)), "accuracy", "test", "all", measured.arms, bounds=(0.0, 1.0), size=(7.0, 3.8))


def labels(measured: Measured, cell: Cell) -> Figure:
    """The classes of every client's training images, in the first seed."""
    dataset = measured.datasets[cell][0]
    named = replace(dataset, name=f"{label(measured.config, cell)}, training images, seed 0", test=no_records(dataset.train, dataset.num_sites))
    return label_distribution(named)


def _file(config: Config, cell: Cell) -> str:
    """A cell's name as part of a file's."""
    kept = "".join(c if c.isalnum() else "_" for c in label(config, cell).lower())
    return "_".join(part for part in kept.split("_") if part)
