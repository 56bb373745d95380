"""What reports share: the last round's metrics as vectors over seeds, sentences as a list, and where the files are."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from fl_jax.results import Missing, RunFolder, last_round
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
