"""What the study of adaptive clipping says: claims, a table with a row for each bound, a reading, figures."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.console import Console
from rich.rule import Rule

from experiments.common import rate_grid
from experiments.common.report import Results, bullets, say_where
from fl_jax.privacy import Accountant, PrivacyLedger, coverage
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
    judge,
    number,
    over_seeds,
    select,
    signed,
    with_bounds,
    with_margin,
)
from fl_jax.results.figures import PALETTE
from fl_jax.statistics import Interval, mean_interval

if TYPE_CHECKING:
    from experiments.adaptive_clipping import Config, Rates, Tried

CLIENT, SERVER, CLIP = "client rate", "server rate", "clip"
MEDIAN, FIXED, PLAIN = "median bound", "fixed bound", "no privacy"
_PAPER = "arXiv 1905.03871"
_EPSILON = "epsilon_client_rdp"
_ACCURACY = (0.0, 1.0)
_GREY = "#555555"
_difference, _level = with_bounds(signed()), with_bounds(number())
Law = Callable[["Measured"], npt.NDArray[np.float64]]


def bounds(config: "Config") -> list[str]:
    """What the arms with a bound are called in the rows: the fixed ones, ascending, and the one that adapts."""
    return [*(f"{FIXED}{rate_grid.suffix({CLIP: clip})}" for clip in config.clips), MEDIAN]


def claims(config: "Config") -> list[Claim]:
    """What the configuration is to show."""
    return [claim for claim, _ in _stated(config)]


def _stated(config: "Config") -> Iterator[tuple[Claim, Law]]:
    """Each claim with the function that measures it, one value a seed."""
    quick = config.quick
    yield Claim(
        f"{MEDIAN} minus the best fixed clip", f"a bar of our own, from {_PAPER}, section 3", 0.0, Direction.AT_LEAST, 0.05 if quick else 0.01,
        "half of these few rounds pass before the bound has come up from .1: on another seed's validation images it is .02 behind after 25 and "
        "after 50 rounds; three standard errors of two seeds that differ by .015 are as much again" if quick else
        "published as as good as the best fixed clip or better, over thousands of rounds; one point is what the choice of a rate and the noise of "
        "a mean of ten seeds may cost. The best is picked by the same test images, which favours it", quick=quick,
    ), lambda found: found.minus(found.best)
    if not config.chosen:
        yield Claim(
            f"{MEDIAN} minus the fixed clip that validation images choose", f"a bar of our own, from {_PAPER}, section 3", 0.0,
            Direction.AT_LEAST, 0.01, "as for the best one, which this may or may not be"), lambda found: found.minus(found.chosen)
    yield Claim(
        f"{MEDIAN} minus the worst fixed clip", "a bar of our own", 0.03, Direction.AT_LEAST, 0.0,
        "the largest clip is four times the median norm: for the same updates it has four times the noise, as if a fourth of the users took "
        "part; three points are less than that cost on other seeds' validation images", quick=quick), lambda found: found.minus(found.worst)
    budget = f"{config.epsilon:g} at delta {config.delta:g}"
    yield Claim(f"largest epsilon of a user, of {budget}", "the budget", config.epsilon, Direction.AT_MOST, 0.0,
                "a budget is not exceeded", digits=4), lambda found: found.epsilons().max(axis=0)
    yield Claim(f"least epsilon of a user, of {budget}", "the budget", config.epsilon, Direction.AT_LEAST, 0.01,
                "every bound has the same noise to spend, and the calibration is good to a part in a thousand",
                digits=4), lambda found: found.epsilons().min(axis=0)
    rounds = config.rounds - config.settled
    tolerance = 0.1 if quick else 0.05
    yield Claim(
        f"share of updates cut by the {MEDIAN} after round {config.settled}", f"{_PAPER}, Algorithm 1", config.target, Direction.WITHIN, tolerance,
        f"the mean of the noisy share over {rounds} rounds is off by the change of log C / ({config.bound_rate:g} x {rounds}): the bound may drift by "
        f"a factor {np.exp(tolerance * config.bound_rate * rounds):.1f}; the noise of the count adds {config.count_noise / rounds**0.5:.3f}",
        quick=quick), lambda found: found.cut(MEDIAN)


def conclude(
    folder: RunFolder, config: "Config", rates: "Rates", tried: Mapping[str, "Tried"], metrics: pd.DataFrame,
    ledgers: Mapping[str, PrivacyLedger],
) -> None:
    """Prints the table and its reading; writes claims, summary and figures."""
    console, found = Console(), Measured(config, rates, tried, metrics, ledgers)
    stated = [*_stated(config)]
    verdicts = judge("adaptive_clipping", [claim for claim, _ in stated], {claim.claim: law(found) for claim, law in stated})
    folder.write_claims(verdicts)
    reading = found.reading()
    console.print("", found.table(), "", Rule("Reading", align="left"), bullets([*reading, *coverage(ledgers[MEDIAN])]), "",
                  claims_table(verdicts, "Claims"))
    folder.save_figure("accuracy_by_clip", by_clip(found))
    folder.save_figure("bound_over_rounds", over_rounds(found))
    folder.save_figure("accuracy_over_rounds", found.curves())
    folder.write_summary(found.summary(reading))
    say_where(console, folder, f"{config.seeds} seeds")


class Measured(Results):
    """The last round's test accuracies, the bounds and what they cut, and what follows from them."""

    def __init__(
        self, config: "Config", rates: "Rates", tried: Mapping[str, "Tried"], metrics: pd.DataFrame, ledgers: Mapping[str, PrivacyLedger]
    ) -> None:
        super().__init__(metrics)
        self.config, self.rates, self.tried, self.ledgers = config, rates, tried, ledgers
        self.bounds = bounds(config)
        means = {name: float(self.accuracy(name).mean()) for name in self.bounds[:-1]}
        self.best = max(means, key=means.__getitem__)
        self.worst = min(means, key=means.__getitem__)

    @property
    def chosen(self) -> str:
        """The fixed bound that is best on validation images; of equal ones the smallest."""
        return max(self.bounds[:-1], key=lambda name: self.tried[name].choice.score)

    def accuracy(self, name: str, site: str = "all") -> npt.NDArray[np.float64]:
        """float64[S]: on the test set, or on one digit of it, after the last round."""
        return self.values(name, "test", site, "accuracy")

    def minus(self, other: str) -> npt.NDArray[np.float64]:
        """float64[S]: the median bound's accuracy minus another's in the same seed."""
        return self.accuracy(MEDIAN) - self.accuracy(other)

    def epsilons(self) -> npt.NDArray[np.float64]:
        """float64[bounds, S]: what a user has paid after the last round, by RDP."""
        return np.stack([self.values(name, "round", "all", _EPSILON) for name in self.bounds])

    def settled(self, name: str, metric: str) -> npt.NDArray[np.float64]:
        """float64[S]: the mean of a round's metric over the rounds in which the bound has settled."""
        rows = select(self.metrics, metric, "round", "all", [name])
        return rows[rows["round"] > self.config.settled].groupby("seed")["value"].mean().to_numpy()

    def cut(self, name: str) -> npt.NDArray[np.float64]:
        """float64[S]: the share of the updates whose norm was above the bound, in these rounds."""
        return self.settled(name, "clipped")

    def table(self) -> Table:
        """One row an arm: its rates, what they were chosen by, what came of them on test images, and what it cut."""
        rows: list[dict[str, Any]] = []
        for name in (*self.bounds, PLAIN):
            row: dict[str, Any] = {
                "arm": short(name), SERVER: self.rates.server[name], "test": mean_interval(self.accuracy(name)),
                "digit": mean_interval(self.accuracy(name, "worst"))}
            row["score"] = self.tried[name].choice.score if self.tried else Missing("the server rates are those that the full form chooses")
            if name != PLAIN:
                row |= {"bound": self.settled(name, "clip").mean(), "cut": self.cut(name).mean(),
                        "noise": (self.settled(name, "noise_norm") / self.settled(name, "signal_norm")).mean()}
            if name != MEDIAN:
                row["minus"] = self.difference(MEDIAN, name, "test", "all", "accuracy")
            rows.append(row)
        short_number, margin = "{:.3g}".format, with_margin()
        columns = [
            Column("arm", "", right=False), Column(SERVER, SERVER, short_number), Column("score", "validation", number()),
            Column("test", "test", margin), Column("digit", "worst digit", margin), Column("minus", "median bound minus it", _difference),
            Column("bound", "bound", short_number), Column("cut", "share cut", number(2)), Column("noise", "noise / signal", number(0))]
        after = self.config.settled + 1
        title = (
            f"Accuracy after round {self.config.rounds}, {self.config.seeds} seeds, client rate {self.rates.client:.3g}; ± half of the 95 % interval; "
            f"Δ paired by seed; bound, share cut and norms of noise and signal: means of rounds {after} to {self.config.rounds}")
        return comparison_table(rows, columns, title)

    def reading(self) -> list[str]:
        """Sentences that follow from the numbers, whatever these are."""
        config, ledger = self.config, self.ledgers[MEDIAN]
        z, own = config.noise, config.adaptive.multiplier(config.noise)
        same = "the same ledger" if ledger == self.ledgers[FIXED] else "another ledger"
        sentences = [
            (f"The budget needs noise of {z:.3f} clips; the median bound pays for its count with {own:.3f} clips on the sum, {100 * (own / z - 1):.1f} % "
            f"more, and has {same} as the fixed ones: epsilon {ledger.epsilon(config.delta):.4f} by RDP, and {ledger.epsilon(config.delta, Accountant.PLD):.3f} "
            "by PLD, which is the tighter account of the same noise."),
            (f"The best fixed clip on test images is {self.best.rpartition(' ')[2]}, and the median bound minus it {_difference(self._minus(self.best))}; the "
            f"worst is {self.worst.rpartition(' ')[2]}, and the median bound minus it {_difference(self._minus(self.worst))}."),
            f"Privacy costs {_level(mean_interval(self.accuracy(PLAIN) - self.accuracy(MEDIAN)))} of accuracy with the median bound."]
        reached = self.first_half()
        sentences.append(
            f"The median bound first cuts half of the updates or less after {'–' if np.isnan(reached).any() else format(np.mean(reached), '.0f')} rounds, and "
            f"{100 * self.cut(MEDIAN).mean():.0f} % of them in the rounds after {config.settled}, where it is {self.settled(MEDIAN, 'clip').mean():.2f} on average.")
        whole = [name for name in self.bounds[:-1] if self.cut(name).min() > 0.995]
        if len(whole) > 1:
            sentences.append(
                f"The clips {', '.join(name.rpartition(' ')[2] for name in whole)} cut every update: there only the product of clip and server rate "
                "counts, and a smaller one costs nothing but a larger rate.")
        edges = [short(name) for name, of in self.tried.items() if of.choice.edges]
        if self.tried:
            sentences.append(f"On the edge of a grid of rates, so that a better one may lie beyond: {', '.join(edges)}." if edges
                             else "No chosen rate lies on the edge of its grid.")
        return sentences

    def _minus(self, other: str) -> Interval:
        return mean_interval(self.minus(other))

    def first_half(self) -> npt.NDArray[np.float64]:
        """float64[S]: the first round in which the median bound cut at most half of the updates; NaN where there is none."""
        rows = select(self.metrics, "clipped", "round", "all", [MEDIAN]).sort_values("round")
        first = rows[rows["value"] <= 0.5].groupby("seed")["round"].min()
        return first.reindex(sorted(rows["seed"].unique())).to_numpy(np.float64)

    def summary(self, reading: list[str]) -> dict[str, Any]:
        """Rates, grids, intervals and the reading, by arm."""
        config = self.config
        arms: dict[str, Any] = {}
        for name in (*self.bounds, PLAIN):
            own: dict[str, Any] = {
                "server_rate": self.rates.server[name], "test": mean_interval(self.accuracy(name))._asdict(), "by_seed": self.accuracy(name).tolist(),
                "worst_digit": mean_interval(self.accuracy(name, "worst"))._asdict()}
            if name != PLAIN:
                own |= {"share_cut": mean_interval(self.cut(name))._asdict(), "bound": mean_interval(self.settled(name, "clip"))._asdict()}
            if name != MEDIAN:
                own["median_minus_it"] = self._minus(name)._asdict()
            if self.tried:
                axes, scores, choice = self.tried[name]
                own["grid"] = [{**point, "validation": values.tolist()} for point, values in zip(rate_grid.points(axes), scores, strict=True)]
                own["edges"] = list(choice.edges)
            arms[name] = own
        ledger = self.ledgers[MEDIAN]
        return {
            "client_rate": self.rates.client, "noise_multiplier": config.noise, "noise_multiplier_of_the_sum": config.adaptive.multiplier(config.noise),
            "epsilon_rdp": ledger.epsilon(config.delta), "epsilon_pld": ledger.epsilon(config.delta, Accountant.PLD), "arms": arms,
            "best_fixed": self.best, "chosen_fixed": self.chosen if self.tried else None, "worst_fixed": self.worst,
            "rounds_to_half": self.first_half().tolist(), "reading": reading}

    def curves(self) -> Figure:
        """Test accuracy over rounds, with bands over seeds."""
        rows = select(self.metrics, "accuracy", "test", "all")
        arms = [MEDIAN, *self.bounds[:-1], PLAIN]
        return curves(rows.assign(arm=rows["arm"].map(short)), "accuracy", "test", "all", [short(arm) for arm in arms], bounds=_ACCURACY, size=(7.0, 3.8))


def short(name: str) -> str:
    """An arm's name in tables and figures: "clip 0.1", "median bound", "no privacy"."""
    return name.removeprefix(f"{FIXED}, ")


def by_clip(found: Measured) -> Figure:
    """Test accuracy of each fixed clip with its interval; the median bound and no privacy as lines with theirs."""
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = _axes(figure, 111, "clip", "test accuracy")
    clips = np.array(found.config.clips)
    fixed = [mean_interval(found.accuracy(name), bounds=_ACCURACY) for name in found.bounds[:-1]]
    for name, color, dashes in ((PLAIN, PALETTE[6], (0, (5, 1.5))), (MEDIAN, PALETTE[1], "-")):
        interval = mean_interval(found.accuracy(name), bounds=_ACCURACY)
        axes.axhspan(interval.low, interval.high, color=color, alpha=0.15, linewidth=0)
        axes.axhline(interval.mean, color=color, linewidth=1.5, linestyle=dashes, label=name)
    low, high = ([abs(interval.mean - getattr(interval, side)) for interval in fixed] for side in ("low", "high"))
    axes.errorbar(clips, [interval.mean for interval in fixed], yerr=[low, high], fmt="o-", color=PALETTE[0], linewidth=1.2, markersize=4.5, capsize=3,
                  label="fixed clip")
    bound = found.settled(MEDIAN, "clip").mean()
    axes.axvline(bound, color=PALETTE[1], linewidth=0.9, linestyle=(0, (1.5, 1.5)))
    axes.annotate(f"median bound, {bound:.2f}", (bound, 0.03), xycoords=("data", "axes fraction"), xytext=(3, 0), textcoords="offset points",
                  fontsize=7.5, color=PALETTE[1])
    _log(axes.xaxis, axes.set_xscale, clips)
    _legend(figure, axes)
    return figure


def over_rounds(found: Measured) -> Figure:
    """Left the median bound of every seed beside the fixed ones, right the share of the updates that each cuts."""
    figure = Figure(figsize=(8.2, 3.4), layout="constrained")
    left, right = _axes(figure, 121, "round", "bound"), _axes(figure, 122, "round", "share of updates that are cut")
    colors = [PALETTE[i] for i in (0, 2, 3, 4, 5)]
    for i, (name, clip) in enumerate(zip(found.bounds[:-1], found.config.clips, strict=True)):
        left.axhline(clip, color=colors[i % len(colors)], linewidth=1.0, linestyle=(0, (4, 2)))
        _line(right, found, name, colors[i % len(colors)], 1.0, short(name))
    rows = select(found.metrics, "clip", "round", "all", [MEDIAN]).sort_values("round")
    for _, one in rows.groupby("seed"):
        left.plot(one["round"], one["value"], color=PALETTE[1], linewidth=0.8, alpha=0.5)
    _line(right, found, MEDIAN, PALETTE[1], 1.8, f"{MEDIAN}{' (left: of each seed)' if found.config.seeds > 1 else ''}")
    right.axhline(1 - found.config.target, color=_GREY, linewidth=0.8, linestyle=(0, (4, 2)))
    right.set_ylim(-0.02, 1.02)
    for axes in (left, right):
        axes.set_xlim(1, found.config.rounds)
        axes.axvline(found.config.settled, color=_GREY, linewidth=0.6, linestyle=(0, (1, 2)))
    _log(left.yaxis, left.set_yscale, np.array(found.config.clips))
    _legend(figure, right)
    return figure


def _line(axes: Axes, found: Measured, name: str, color: str, width: float, label: str) -> None:
    """The share that an arm cuts, its mean over seeds and the interval."""
    rows = over_seeds(select(found.metrics, "clipped", "round", "all", [name]), ["round"], bounds=_ACCURACY)
    mean, low, high = np.array([interval[:3] for interval in rows["interval"]]).T
    axes.fill_between(rows["round"], low, high, color=color, alpha=0.16, linewidth=0)
    axes.plot(rows["round"], mean, color=color, linewidth=width, label=label)


def _axes(figure: Figure, place: int, x: str, y: str) -> Axes:
    axes = figure.add_subplot(place)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.tick_params(labelsize=8)
    return axes


def _log(axis: Any, set_scale: Callable[[str], None], ticks: npt.NDArray[np.float64]) -> None:
    """A logarithmic axis whose ticks are the clips."""
    set_scale("log")
    axis.set_ticks(ticks, minor=False)
    axis.set_ticks([], minor=True)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _legend(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 3), frameon=False, fontsize=8)
