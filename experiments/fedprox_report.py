"""What the study of FedProx's synthetic federations says: claims, a table, the paper's figure, a reading."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.rule import Rule

from experiments.common.report import bullets, say_where
from experiments.common.reproduction import judged
from fl_jax.results import (
    Claim,
    Column,
    Direction,
    RunFolder,
    Table,
    claims_table,
    comparison_table,
    signed,
    with_bounds,
    with_margin,
)
from fl_jax.results.figures import PALETTE
from fl_jax.results.seeds import over_seeds
from fl_jax.statistics import mean_interval, paired_difference

if TYPE_CHECKING:
    from experiments.fedprox_synthetic import Config

IID = "Synthetic-IID"
LAST = 50
"""rounds over which the results are averaged, at the end: single rounds of 10 devices swing"""
LOSS, ACCURACY = ("loss", "validation"), ("accuracy", "test")  # the split "validation" holds the training records
_SOURCE = "arXiv 1812.06127, 5.2"  # its figures have no numbers: these are a NumPy restatement's of its code
TIED = 5
_TIED = (
    f"on data seed {TIED}, and on no other of ten, FedAvg is as good with one device a round, .88: plain NumPy on the same records has, for three "
    "draws of the cohorts, FedAvg at .900, .903 and .852, FedProx at .895, .889 and .897")
_difference = with_bounds(signed())
Law = Callable[["Results"], npt.NDArray[np.float64]]


def synthetic(alpha: float) -> str:
    """The name of Synthetic(alpha, alpha)."""
    return f"Synthetic({alpha:g}, {alpha:g})"


def arm(share: float, dropped: bool) -> str:
    """The name of the arm with a share of stragglers."""
    return f"{share:.0%} stragglers{' dropped' if dropped else ''}"


def variant(mu: float, federation: str) -> str:
    """What the rows of a run add to its arm's name."""
    return f", mu {mu:g}, {federation}"


def methods(config: "Config", share: float) -> dict[str, tuple[float, bool]]:
    """The methods that are compared at a share of stragglers: name -> (mu, whether stragglers are dropped)."""
    kept = {"FedAvg" if mu == 0 and share == 0 else f"FedProx, mu {mu:g}": (mu, False) for mu in config.mu}
    return {"FedAvg": (0.0, True), **kept} if share else kept


def federations(config: "Config") -> list[str]:
    """The names of the federations, the most alike devices first."""
    return [*([IID] if config.iid else []), *(synthetic(alpha) for alpha in config.heterogeneity)]


def claims(config: "Config") -> list[Claim]:
    """What of the published behaviour the configuration can show."""
    return [claim for claim, _ in _stated(config)]


def _stated(config: "Config") -> Iterator[tuple[Claim, Law]]:
    """Each claim with the function that measures it, one value a data seed."""
    where = synthetic(1.0)
    none, most = 0.0 in config.stragglers, 0.9 in config.stragglers
    both = {0.0, 1.0} <= {*config.mu}

    def law(
        text: str, published: float, direction: Direction, tolerance: float, reason: str, of: Law, cause: str = ""
    ) -> tuple[Claim, Law]:
        return Claim(text, _SOURCE, published, direction, tolerance, reason, expected=not cause, cause=cause), of

    def level(text: str, published: float, tolerance: float, deviation: float, of: Law) -> tuple[Claim, Law]:
        """A level, of the mean over data seeds; the quick form's few may be a standard error farther away."""
        reason = f"the value is a NumPy restatement's, of other data seeds; these have a standard deviation of {deviation:g}"
        if config.quick:
            tolerance = round(tolerance + deviation / config.seeds**0.5, 2)
            reason += f", so that a mean of {config.seeds} is granted a standard error more"
        return Claim(text, _SOURCE, published, Direction.WITHIN, tolerance, reason, quick=config.quick), of

    if both and where in federations(config):
        if none:
            yield level(f"{where}: training loss of FedAvg", 1.0, 0.25, 0.9, lambda s: s.last(LOSS, 0.0, "FedAvg", where))
            yield level(f"{where}: training loss of FedProx, mu 1", 0.45, 0.15, 0.15, lambda s: s.last(LOSS, 0.0, "FedProx, mu 1", where))
        if most:
            yield level(f"{where}, 90 % stragglers: accuracy of FedAvg", 0.71, 0.05, 0.11, lambda s: s.last(ACCURACY, 0.9, "FedAvg", where))
            yield level(f"{where}, 90 % stragglers: accuracy of FedProx, mu 1", 0.82, 0.04, 0.05,
                        lambda s: s.last(ACCURACY, 0.9, "FedProx, mu 1", where))
            yield law(f"{where}, 90 % stragglers: share of data seeds on which FedProx, mu 1, is ahead", 1.0, Direction.AT_LEAST, 0.0,
                      "ahead on every one of them", lambda s: s.ahead(where), _TIED if config.seeds > TIED else "")
        if none and most:
            yield law(f"{where}: accuracy of FedProx, mu 1, with 90 % stragglers minus without", 0.0, Direction.WITHIN, 0.01,
                      "they make no difference to it", lambda s: s.last(ACCURACY, 0.9, "FedProx, mu 1", where) - s.last(
                          ACCURACY, 0.0, "FedProx, mu 1", where))
    if both and none and config.iid:
        yield law(f"{IID}: training loss of FedProx, mu 1, minus FedAvg's, over all rounds", 0.0, Direction.AT_LEAST, 0.0,
                  "it is slower where devices are alike", lambda s: s.path(LOSS, 0.0, "FedProx, mu 1", IID) - s.path(LOSS, 0.0, "FedAvg", IID))


class Results:
    """The metrics of all runs, as curves over rounds."""

    def __init__(self, config: "Config", metrics: pd.DataFrame) -> None:
        self.config = config
        rows = metrics[metrics["site"] == "all"]
        self.rows = {name: found for name, found in rows.groupby(["metric", "split", "arm"], sort=False)}

    def of(self, measure: tuple[str, str], share: float, method: str, federation: str) -> pd.DataFrame:
        """The rows of one curve, of all seeds."""
        mu, dropped = methods(self.config, share)[method]
        return self.rows[(*measure, arm(share, dropped) + variant(mu, federation))]

    def last(self, measure: tuple[str, str], share: float, method: str, federation: str) -> npt.NDArray[np.float64]:
        """float64[S]: the mean over the last rounds, by data seed."""
        rows = self.of(measure, share, method, federation)
        return _by_seed(rows[rows["round"] > rows["round"].max() - LAST])

    def path(self, measure: tuple[str, str], share: float, method: str, federation: str) -> npt.NDArray[np.float64]:
        """float64[S]: the mean over all measured rounds: the higher a loss, the slower it fell."""
        return _by_seed(self.of(measure, share, method, federation))

    def ahead(self, federation: str) -> npt.NDArray[np.float64]:
        """float64[S]: 1 where FedProx with mu = 1 ends ahead of FedAvg with 90 % stragglers."""
        ours, theirs = (self.last(ACCURACY, 0.9, method, federation) for method in ("FedProx, mu 1", "FedAvg"))
        return (ours > theirs).astype(np.float64)


def _by_seed(rows: pd.DataFrame) -> npt.NDArray[np.float64]:
    return rows.groupby("seed")["value"].mean().sort_index().to_numpy()


def conclude(folder: RunFolder, config: "Config", metrics: pd.DataFrame) -> None:
    """Prints the table and its reading; writes claims, summary and figures."""
    console, results = Console(), Results(config, metrics)
    verdicts = judged("fedprox_synthetic", _stated(config), results)
    folder.write_claims(verdicts)
    sentences = reading(config, results)
    console.print("", table(config, results))
    console.print("", Rule("Reading", align="left"), bullets(sentences), "", claims_table(verdicts, "Claims"))
    folder.save_figure("training_loss", figure(config, results, LOSS, "training loss"))
    folder.save_figure("test_accuracy", figure(config, results, ACCURACY, "test accuracy"))
    folder.write_summary({"results": summary(config, results), "reading": sentences})
    say_where(console, folder, f"{config.seeds} data seeds")


def _cases(config: "Config") -> Iterator[tuple[str, float, str]]:
    for federation in federations(config):
        for share in config.stragglers:
            for method in methods(config, share):
                yield federation, share, method


def table(config: "Config", results: Results) -> Table:
    """One row a federation, share of stragglers and method."""
    rows = []
    for federation, share, method in _cases(config):
        own = {name: results.last(measure, share, method, federation) for name, measure in (("loss", LOSS), ("accuracy", ACCURACY))}
        row: dict[str, Any] = {"federation": federation, "stragglers": f"{share:.0%}", "method": method}
        row |= {name: mean_interval(values) for name, values in own.items()}
        if method != "FedAvg" and "FedAvg" in methods(config, share):
            row["gain"] = paired_difference(own["accuracy"], results.last(ACCURACY, share, "FedAvg", federation))
        rows.append(row)
    margin = with_margin()
    columns = [
        Column("federation", "", right=False), Column("stragglers", "stragglers"), Column("method", "", right=False),
        Column("loss", "training loss", margin), Column("accuracy", "test accuracy", margin), Column("gain", "Δ accuracy FedAvg", _difference)]
    title = (f"Means over rounds {max(config.rounds - LAST, 0) + 1} to {config.rounds} and {config.seeds} data seeds ± half of the 95 % interval; "
             "Δ paired by seed")
    return comparison_table(rows, columns, title)


def summary(config: "Config", results: Results) -> list[dict[str, Any]]:
    """The numbers of the table, one object a row."""
    return [
        {"federation": federation, "stragglers": share, "method": method} | {
            name: mean_interval(results.last(measure, share, method, federation))._asdict()
            for name, measure in (("training loss", LOSS), ("test accuracy", ACCURACY))}
        for federation, share, method in _cases(config)]


def reading(config: "Config", results: Results) -> list[str]:
    """Sentences that follow from the numbers, whatever these are."""
    most, sentences = max(config.stragglers), []
    for federation in federations(config) if most and 0.0 in config.stragglers else ():
        parts = []
        for method in methods(config, most):
            calm = method if method in methods(config, 0.0) else "FedAvg"  # mu = 0 without stragglers is FedAvg
            lost = paired_difference(results.last(ACCURACY, most, method, federation), results.last(ACCURACY, 0.0, calm, federation))
            parts.append(f"{method} {_difference(lost)}")
        sentences.append(f"{federation}: {most:.0%} stragglers change test accuracy by {'; '.join(parts)}.")
    return sentences


def figure(config: "Config", results: Results, measure: tuple[str, str], label: str) -> Figure:
    """As the paper's figures 1 and 2: a column a federation, a row a share of stragglers; bands are 95 % intervals over data seeds."""
    names, shares = federations(config), config.stragglers
    figure = Figure(figsize=(1.2 + 2.3 * len(names), 0.9 + 1.8 * len(shares)), layout="constrained")
    grid = figure.subplots(len(shares), len(names), sharex=True, sharey="col", squeeze=False)
    lines: dict[str, Any] = {}
    colors = _colors(config)
    for i, share in enumerate(shares):
        for j, federation in enumerate(names):
            axes: Axes = grid[i][j]
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
            for method in methods(config, share):
                lines[method] = _band(axes, results.of(measure, share, method, federation), *colors[method])
            if i == 0:
                axes.set_title(federation, fontsize=9)
            if j == 0:
                axes.set_ylabel(f"{share:.0%} stragglers\n{label}", fontsize=9)
            if i == len(shares) - 1:
                axes.set_xlabel("round", fontsize=9)
    order = [method for method in colors if method in lines]
    figure.legend([lines[method] for method in order], order, loc="outside upper center", ncols=len(order), frameon=False, fontsize=9)
    return figure


def _colors(config: "Config") -> Mapping[str, tuple[str, str]]:
    names = dict.fromkeys(["FedAvg", *(method for share in config.stragglers for method in methods(config, share))])
    return {name: (PALETTE[i % len(PALETTE)], ("-", "--", ":", "-.")[i % 4]) for i, name in enumerate(names)}


def _band(axes: Axes, rows: pd.DataFrame, color: str, style: str) -> Any:
    intervals = over_seeds(rows, ["round"])
    mean, low, high = np.array([interval[:3] for interval in intervals["interval"]]).T
    axes.fill_between(intervals["round"], low, high, color=color, alpha=0.16, linewidth=0)
    (line,) = axes.plot(intervals["round"], mean, style, color=color, linewidth=1.5)
    return line
