"""What fedavg_mnist says: rounds published and here, the choice of the learning rate, traffic, a reading, and the learning curves."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.rule import Rule

from experiments.common.figures import GREY, dress
from experiments.common.report import bullets, say_where
from experiments.fedavg_mnist_protocol import Outcome
from fl_jax.results import (
    Column,
    Missing,
    RunFolder,
    Table,
    Verdict,
    claims_table,
    comparison_table,
    number,
    over_seeds,
    select,
    with_bounds,
)
from fl_jax.results.crossing import running_best
from fl_jax.results.figures import PALETTE
from fl_jax.statistics import Interval, mean_interval

MEGABYTE = 1e6
ACCURACY = (0.0, 1.0)
_rounds = with_bounds(number(1))


def conclude(folder: RunFolder, outcomes: Sequence[Outcome], verdicts: Sequence[Verdict]) -> None:
    """Prints tables and their reading; writes summary and figures."""
    console = Console()
    chosen = [outcome for outcome in outcomes if outcome.tried]
    for table in (overview(outcomes), *([grid(chosen)] if chosen else [])):
        console.print("", table)
    sentences = [sentence for outcome in outcomes for sentence in reading(outcome)]
    console.print("", Rule("Reading", align="left"), bullets(sentences), "", claims_table(verdicts, "Claims"))
    folder.save_figure("accuracy_over_rounds", figure(outcomes))
    folder.write_summary({"problems": {outcome.problem.name: summary(outcome) for outcome in outcomes}, "reading": sentences})
    say_where(console, folder)


def overview(outcomes: Sequence[Outcome]) -> Table:
    """One row a problem: rounds published and here, by seed, and what travelled until then."""
    rows: list[dict[str, Any]] = []
    for outcome in outcomes:
        rounds, published = outcome.rounds(), outcome.setting.target == outcome.problem.target
        traffic = mean_interval(rounds * megabytes_of_round(outcome))
        rows.append({
            "problem": outcome.problem.name, "target": 100 * outcome.setting.target, "rate": outcome.rate,
            "published": outcome.problem.rounds if published else Missing("another target than the published one"),
            "here": _interval(outcome), "seeds": ", ".join("–" if np.isnan(value) else f"{value:.1f}" for value in rounds),
            "ratio": mean_interval(rounds).mean / outcome.problem.rounds if published and not np.isnan(rounds).any() else None,
            "traffic": traffic.mean if not np.isnan(rounds).any() else None,
        })
    columns = [
        Column("problem", "", right=False), Column("target", "% to reach", "{:g}".format), Column("rate", "learning rate", "{:.3g}".format),
        Column("published", "published", "{:d}".format), Column("here", "here", _rounds), Column("ratio", "here / published", number(2)),
        Column("seeds", "by seed"), Column("traffic", "MB until then", "{:.0f}".format),
    ]
    return comparison_table(rows, columns, "Rounds until the best test accuracy so far reaches the target, mean [95 % interval] over seeds")


def _interval(outcome: Outcome) -> Interval | Missing:
    rounds = outcome.rounds()
    if np.isnan(rounds).any():
        last, most = int(outcome.rows["round"].max()), 100 * np.nanmax(best_accuracy(outcome))
        return Missing(f"{np.isnan(rounds).sum()} of {len(rounds)} seeds did not reach it in {last} rounds; the best had {most:.2f} %")
    return mean_interval(rounds)


def grid(outcomes: Sequence[Outcome]) -> Table:
    """One row a learning rate: what the choice was made by."""
    rates = sorted({rate for outcome in outcomes for rate in outcome.tried})
    rows: list[dict[str, Any]] = [{"rate": rate} for rate in rates]
    columns = [Column("rate", "learning rate", "{:.3g}".format)]
    for outcome in outcomes:
        name, target = outcome.problem.name, f"{100 * outcome.setting.target:g} %"
        columns += [Column(name, name, number(4)), Column(f"{name}, rounds", f"rounds to {target}", number(1))]
        for row in rows:
            row[name], row[f"{name}, rounds"] = _tried(outcome, row["rate"])
    title = (
        "Choice of the learning rate, on validation images: mean over the last half of the rounds of the best accuracy so far; and for "
        "comparison the rounds to the target")
    return comparison_table(rows, columns, title)


def _tried(outcome: Outcome, rate: float) -> tuple[float | Missing, float | Missing]:
    if rate not in outcome.tried:
        return Missing("not in its grid"), Missing("not in its grid")
    score, rounds = outcome.tried[rate]
    return (Missing("diverged: in some round every update was not finite") if np.isnan(score) else score,
            Missing("not reached in the rounds of the choice") if np.isnan(rounds) else rounds)


def reading(outcome: Outcome) -> list[str]:
    """Sentences that follow from the numbers, whatever these are."""
    problem, setting, rounds = outcome.problem, outcome.setting, outcome.rounds()
    goal = f"{problem.name}: {100 * setting.target:g} %"
    if np.isnan(rounds).any():
        interval = _interval(outcome)
        sentences = [f"{goal}: {interval.reason if isinstance(interval, Missing) else ''}."]
    else:
        found = mean_interval(rounds)
        sentences = [f"{goal} takes {_rounds(found)} rounds" + _against(found, problem.rounds if setting.target == problem.target else None)]
    if outcome.edge:
        sentences.append(f"{problem.name}: the chosen learning rate, {outcome.rate:g}, is at the grid's edge; a better one may lie beyond.")
    return sentences


def _against(found: Interval, published: int | None) -> str:
    """What a number of rounds is beside the published one, which is of one run."""
    if published is None:
        return "."
    ratio = found.mean / published
    where = "" if np.isnan(found.low) else (
        ", inside the interval over seeds" if found.low <= published <= found.high else ", outside the interval over seeds")
    return f", {ratio:.2f} times the published {published}{where}."


def best_accuracy(outcome: Outcome) -> npt.NDArray[np.float64]:
    """float64[S]: the best test accuracy of all rounds, seeds ascending."""
    kept = select(outcome.rows, "accuracy", "test", "all", [outcome.problem.name])
    return np.asarray(kept.groupby("seed")["value"].max())


def megabytes_of_round(outcome: Outcome) -> float:
    """What the server sends and receives in a round, in 10^6 bytes."""
    rows = outcome.rows[(outcome.rows["split"] == "round") & outcome.rows["metric"].isin(["bytes_down", "bytes_up"])]
    return float(rows.groupby("metric")["value"].mean().sum()) / MEGABYTE


def summary(outcome: Outcome) -> dict[str, Any]:
    """A problem's numbers for summary.json; rounds that were not reached are null."""
    rounds = [None if np.isnan(value) else float(value) for value in outcome.rounds()]
    return {
        "target": outcome.setting.target, "published_rounds": outcome.problem.rounds, "published_target": outcome.problem.target,
        "source": outcome.problem.source, "rounds": rounds, "rounds_trained": int(outcome.rows["round"].max()),
        "best_accuracy": best_accuracy(outcome).tolist(), "learning_rate": outcome.rate, "at_edge_of_grid": outcome.edge,
        "grid": {f"{rate:g}": {name: None if np.isnan(value) else value for name, value in tried._asdict().items()}
                 for rate, tried in outcome.tried.items()},
        "megabytes_of_a_round": megabytes_of_round(outcome),
    }


def figure(outcomes: Sequence[Outcome]) -> Figure:
    """A panel a problem: each seed's accuracy, the best so far with its band over seeds, the target, and the rounds published and here."""
    drawing = Figure(figsize=(3.4 * len(outcomes), 3.1), layout="constrained")
    panels = drawing.subplots(1, len(outcomes), squeeze=False)[0]
    here, theirs = PALETTE[0], PALETTE[1]
    for axes, outcome in zip(panels, outcomes, strict=True):
        kept = select(outcome.rows, "accuracy", "test", "all", [outcome.problem.name]).sort_values("round")
        for _, one in kept.groupby("seed"):
            axes.plot(one["round"], one["value"], color=here, alpha=0.45, linewidth=0.6)
        best = kept.assign(value=kept.groupby("seed")["value"].transform(running_best))
        at, (mean, low, high) = _band(best)
        axes.fill_between(at, low, high, color=here, alpha=0.18, linewidth=0)
        axes.plot(at, mean, color=here, linewidth=1.5)
        target, published = outcome.setting.target, outcome.setting.target == outcome.problem.target
        axes.axhline(target, color=GREY, linewidth=0.8, linestyle=(0, (4, 2)))
        rounds = outcome.rounds()
        axes.plot(rounds, np.full(len(rounds), target), "o", color=here, markersize=4)
        if published:
            axes.plot([outcome.problem.rounds], [target], "D", color=theirs, markersize=5)
        span = max(at[-1], outcome.problem.rounds if published else 0)
        axes.set_xlim(0, 1.04 * span)
        axes.set_ylim(1 - 5 * (1 - target), 1 - 0.2 * (1 - target))
        dress(axes, "round", title=outcome.problem.name)
    panels[0].set_ylabel("test accuracy", fontsize=9)
    panels[0].plot([], [], color=here, linewidth=1.5, label="best so far, mean of seeds and 95 % interval")
    panels[0].plot([], [], color=here, alpha=0.45, linewidth=0.6, label="accuracy of a seed")
    panels[0].plot([], [], "o", color=here, markersize=4, label="target reached, by seed")
    panels[0].plot([], [], "D", color=theirs, markersize=5, label="published")
    drawing.legend(loc="outside upper center", ncols=(1, 2, 4)[min(len(outcomes), 3) - 1], frameon=False, fontsize=8)
    return drawing


def _band(best: pd.DataFrame) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Rounds [T] and the mean, low and high over seeds [3, T]."""
    intervals = over_seeds(best, ["round"], bounds=ACCURACY)
    return intervals["round"].to_numpy(np.float64), np.array([interval[:3] for interval in intervals["interval"]]).T
