"""Metrics in the long format, reduced over seeds: one interval per arm, round, site, whatever is asked for."""

from collections.abc import Sequence

import pandas as pd

from fl_jax.errors import FlJaxError
from fl_jax.statistics import Bounds, Interval, mean_interval


def select(
    metrics: pd.DataFrame, metric: str, split: str, site: str | None = None, arms: Sequence[str] | None = None
) -> pd.DataFrame:
    """The rows of one metric and split (of one site, and of some arms where given), in their order.

    Raises FlJaxError, saying what there is, where nothing is left or an arm has no row.
    """
    rows = metrics
    wanted = {"metric": metric, "split": split} | ({} if site is None else {"site": site})
    for column, value in wanted.items():
        known = rows[column].unique()
        rows = rows[rows[column] == value]
        if rows.empty:
            names = ", ".join(map(repr, known)) or "none at all"
            raise FlJaxError(f"There are no metrics with {column} {value!r}; there are {names}.")
    if arms is not None:
        if not arms:
            raise FlJaxError("No arm is asked for; name at least one, or leave `arms` out for all.")
        known = rows["arm"].unique()
        for arm in arms:
            if arm not in known:
                names = ", ".join(map(repr, known))
                raise FlJaxError(f"There are no such metrics of the arm {arm!r}; there are those of {names}.")
        rows = rows[rows["arm"].isin(arms)]
    return rows


def last_round(metrics: pd.DataFrame) -> pd.DataFrame:
    """The rows of each arm's last round, in their order; every split, site and metric is looked at by itself."""
    latest = metrics.groupby(["arm", "split", "site", "metric"], sort=False)["round"].transform("max")
    return metrics[metrics["round"] == latest]


def over_seeds(
    metrics: pd.DataFrame, by: Sequence[str], confidence: float = 0.95, bounds: Bounds | None = None
) -> pd.DataFrame:
    """One row per combination of the columns `by`, in order of appearance, with the Interval of its values over seeds.

    Returns the columns `by` and "interval"; an interval of no values has the reason that the metrics note. confidence, bounds: as
    for `mean_interval`. Raises FlJaxError where a combination has two values of one seed: `by` then mixes what differs.
    """
    keys = list(by)
    repeated = metrics.duplicated([*keys, "seed"])
    if repeated.any():
        first = metrics.loc[repeated.idxmax(), [*keys, "seed"]].to_dict()
        raise FlJaxError(f"There are several values for {first}; select one split, site, metric and round of them.")

    def interval(rows: pd.DataFrame) -> Interval:
        found = mean_interval(rows["value"].to_numpy(), confidence, bounds)
        reason = "; ".join(note for note in rows.loc[rows["value"].isna(), "note"].unique() if note)
        return found._replace(note=reason) if found.n == 0 and reason else found

    groups = metrics.groupby(keys, sort=False)
    return pd.DataFrame([(*group, interval(rows)) for group, rows in groups], columns=[*keys, "interval"])
