"""What reports share: the last round's metrics as vectors over seeds, sentences as a list, and where the files are."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pandas as pd
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from fl_jax.results import Missing, RunFolder, last_round, select
from fl_jax.statistics import Interval, mean_interval, paired_difference


class Results:
    """The last round's metrics of all arms, as vectors over seeds."""

    def __init__(self, metrics: pd.DataFrame) -> None:
        self.metrics = metrics
        self.last = last_round(metrics)
        by_place = self.last.sort_values("seed").groupby(["arm", "split", "site", "metric"])["value"]
        self._values = {place: values.to_numpy() for place, values in by_place}

    def values(self, arm: str, split: str, site: str, metric: str) -> np.ndarray:
        """float64[S], in the order of the seeds; NaN where undefined."""
        return self._values[arm, split, site, metric]

    def interval(self, arm: str, split: str, site: str, metric: str) -> Interval | Missing:
        """The mean over seeds with its interval; the reason where no seed has the metric."""
        values = self.values(arm, split, site, metric)
        if not np.isfinite(values).any():
            rows = self.last[(self.last["site"] == site) & (self.last["split"] == split) & (self.last["metric"] == metric)]
            notes = [note for note in rows["note"].unique() if note]
            return Missing(f"{site}: {notes[0] if notes else 'not measured'}")
        return mean_interval(values)

    def difference(self, arm: str, other: str, split: str, site: str, metric: str) -> Interval:
        """The mean difference arm - other, paired by seed."""
        return paired_difference(self.values(arm, split, site, metric), self.values(other, split, site, metric))


class BestRounds:
    """Accuracies of runs of which the best measurement counts, of all test records together, as in tables that publish the best of all
    rounds; of equal ones the first. So the test records choose the round, which flatters every arm: `last` does not.
    """

    def __init__(self, metrics: pd.DataFrame, metric: str = "accuracy") -> None:
        self.rows = select(metrics, metric, "test")
        together = self.rows[self.rows["site"] == "all"].sort_values("round")
        best = together.loc[together.groupby(["arm", "seed"])["value"].idxmax()].sort_values("seed")
        counted = self.rows.merge(best[["arm", "seed", "round"]], on=["arm", "seed", "round"]).sort_values("seed")
        last = together[together["round"] == together["round"].max()].sort_values("seed")
        self._values = {place: part.to_numpy() for place, part in counted.groupby(["arm", "site"])["value"]}
        self._rounds, self._last = (
            {str(arm): part.to_numpy() for arm, part in table.groupby("arm")[column]} for table, column in ((best, "round"), (last, "value")))

    def values(self, arm: str, site: str = "all") -> npt.NDArray[np.float64]:
        """float64[S], by seed, at the measurement that counts: of all test records together, or at one site, or over sites."""
        return self._values[arm, site]

    def rounds(self, arm: str) -> npt.NDArray[np.int64]:
        """int64[S]: the round of the measurement that counts."""
        return self._rounds[arm]

    def last(self, arm: str) -> npt.NDArray[np.float64]:
        """float64[S]: of all test records together, after the last round."""
        return self._last[arm]


def bullets(sentences: Iterable[str], mark: str = "•") -> RichTable:
    """Sentences whose further lines are indented like the first."""
    grid = RichTable.grid(padding=(0, 1, 0, 0))
    for sentence in sentences:
        grid.add_row(f" {mark}", Text(sentence))
    return grid


def say_where(console: Console, folder: RunFolder, of: str = "") -> None:
    """The last words of a report: where its files are. of: what they are of."""
    console.print(f"\nmetrics.csv, claims.json, summary.json and figures{f' of {of}' if of else ''} are in", highlight=False)
    console.print(Text(f"{folder.path}", style="bold"), soft_wrap=True)
