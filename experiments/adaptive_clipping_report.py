"""What the study of adaptive clipping says: a table with a row for each bound, a reading, figures."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.rule import Rule

from experiments import adaptive_clipping_figures
from experiments.adaptive_clipping_protocol import FIXED, MEDIAN, PLAIN, SERVER, bounds, short, stated
from experiments.common import rate_grid
from experiments.common.report import Results, bullets, say_where
from experiments.common.reproduction import judged
from fl_jax.privacy import Accountant, PrivacyLedger, coverage
from fl_jax.results import (
    Column,
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
from fl_jax.statistics import Interval, mean_interval

if TYPE_CHECKING:
    from experiments.adaptive_clipping import Config, Rates, Tried

_EPSILON = "epsilon_client_rdp"
_ACCURACY = (0.0, 1.0)
_difference, _level = with_bounds(signed()), with_bounds(number())


def conclude(
    folder: RunFolder, config: "Config", rates: "Rates", tried: Mapping[str, "Tried"], metrics: pd.DataFrame,
    ledgers: Mapping[str, PrivacyLedger],
) -> None:
    """Prints the table and its reading; writes claims, summary and figures."""
    console, found = Console(), Measured(config, rates, tried, metrics, ledgers)
    verdicts = judged("adaptive_clipping", stated(config), found)
    folder.write_claims(verdicts)
    reading = found.reading()
    console.print("", found.table(), "", Rule("Reading", align="left"), bullets([*reading, *coverage(ledgers[MEDIAN])]), "",
                  claims_table(verdicts, "Claims"))
    folder.save_figure("accuracy_by_clip", adaptive_clipping_figures.by_clip(found))
    folder.save_figure("bound_over_rounds", adaptive_clipping_figures.over_rounds(found))
    folder.save_figure("accuracy_over_rounds", found.curves())
    folder.write_summary(found.summary(reading))
    say_where(console, folder, f"{config.seeds} seeds")


class Measured(Results):
    """The last round's test accuracies, the bounds and what they cut, and what follows from them."""

    def __init__(
        self, config: "Config", rates: "Rates", tried: Mapping[str, "Tried"], metrics: pd.DataFrame,
        ledgers: Mapping[str, PrivacyLedger],
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
            row["score"] = self.tried[name].choice.score if self.tried else Missing(
                "the server rates are those that the full form chooses")
            if name != PLAIN:
                row |= {"bound": self.settled(name, "clip").mean(), "cut": self.cut(name).mean(),
                        "noise": (self.settled(name, "noise_norm") / self.settled(name, "signal_norm")).mean()}
            if name != MEDIAN:
                row["minus"] = self.difference(MEDIAN, name, "test", "all", "accuracy")
            rows.append(row)
        short_number, margin = "{:.3g}".format, with_margin()
        columns = [
            Column("arm", "", right=False), Column(SERVER, SERVER, short_number), Column("score", "validation", number()),
            Column("test", "test", margin), Column("digit", "worst digit", margin),
            Column("minus", "median bound minus it", _difference), Column("bound", "bound", short_number),
            Column("cut", "share cut", number(2)), Column("noise", "noise / signal", number(0))]
        after = self.config.settled + 1
        title = (
            f"Accuracy after round {self.config.rounds}, {self.config.seeds} seeds, client rate {self.rates.client:.3g}; "
            "± half of the 95 % interval; differences are paired by seed; bound, share cut and norms of noise and signal: "
            f"means of rounds {after} to {self.config.rounds}")
        return comparison_table(rows, columns, title)

    def reading(self) -> list[str]:
        """Sentences that follow from the numbers, whatever these are."""
        config, ledger = self.config, self.ledgers[MEDIAN]
        z, own = config.noise, config.adaptive.multiplier(config.noise)
        same = "the same ledger" if ledger == self.ledgers[FIXED] else "another ledger"
        best, worst = (f"{name.rpartition(' ')[2]}, and the median bound minus it {_difference(self._minus(name))}"
                       for name in (self.best, self.worst))
        sentences = [
            (f"The budget needs noise of {z:.3f} clips; the median bound pays for its count with {own:.3f} clips on the sum, "
             f"{100 * (own / z - 1):.1f} % more, and has {same} as the fixed ones: epsilon {ledger.epsilon(config.delta):.4f} "
             f"by RDP, and {ledger.epsilon(config.delta, Accountant.PLD):.3f} by PLD, which is the tighter account of "
             "the same noise."),
            f"The best fixed clip on test images is {best}; the worst is {worst}.",
            f"Privacy costs the median bound {_level(self.difference(PLAIN, MEDIAN, 'test', 'all', 'accuracy'))} of accuracy."]
        reached = self.first_half()
        after = "in no round of some seed" if np.isnan(reached).any() else f"in round {np.mean(reached):.0f}"
        sentences.append(
            f"The median bound cuts half of the updates or less for the first time {after}, and "
            f"{100 * self.cut(MEDIAN).mean():.0f} % of them in the rounds after {config.settled}, where it is "
            f"{self.settled(MEDIAN, 'clip').mean():.2f} on average.")
        whole = [name for name in self.bounds[:-1] if self.cut(name).min() > 0.995]
        if len(whole) > 1:
            listed = ", ".join(name.rpartition(" ")[2] for name in whole)
            sentences.append(
                f"The clips {listed} cut every update, or nearly: there only the product of clip and server rate counts, "
                "so that a smaller one costs nothing but a larger rate.")
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
                "server_rate": self.rates.server[name], "test": mean_interval(self.accuracy(name))._asdict(),
                "by_seed": self.accuracy(name).tolist(),
                "worst_digit": mean_interval(self.accuracy(name, "worst"))._asdict()}
            if name != PLAIN:
                own |= {"share_cut": mean_interval(self.cut(name))._asdict(),
                        "bound": mean_interval(self.settled(name, "clip"))._asdict()}
            if name != MEDIAN:
                own["median_minus_it"] = self._minus(name)._asdict()
            if self.tried:
                axes, scores, choice = self.tried[name]
                own["grid"] = [{**point, "validation": values.tolist()}
                               for point, values in zip(rate_grid.points(axes), scores, strict=True)]
                own["edges"] = list(choice.edges)
            arms[name] = own
        ledger = self.ledgers[MEDIAN]
        return {
            "client_rate": self.rates.client, "noise_multiplier": config.noise,
            "noise_multiplier_of_the_sum": config.adaptive.multiplier(config.noise), "epsilon_rdp": ledger.epsilon(config.delta),
            "epsilon_pld": ledger.epsilon(config.delta, Accountant.PLD), "arms": arms,
            "best_fixed": self.best, "chosen_fixed": self.chosen if self.tried else None, "worst_fixed": self.worst,
            "rounds_to_half": self.first_half().tolist(), "reading": reading}

    def curves(self) -> Figure:
        """Test accuracy over rounds, with bands over seeds."""
        rows = select(self.metrics, "accuracy", "test", "all")
        arms = [MEDIAN, *self.bounds[:-1], PLAIN]
        return curves(
            rows.assign(arm=rows["arm"].map(short)), "accuracy", "test", "all", [short(arm) for arm in arms], bounds=_ACCURACY,
            size=(7.0, 3.8))
