"""A grid of learning rates: its points, the rows of runs that try them all in one program, and the choice by validation records.

    runs = rate_grid.rows(axes, training.seeds_of(seeds, stacked=True))
    variants, labels = rate_grid.labels(axes, seeds)
    fits = training.fit(study, arms, labels, runs, variants=variants)
    chosen = rate_grid.choose(axes, rate_grid.validation_scores(axes, fits[name].rows, name, "accuracy"))
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pandas as pd

from fl_jax import sweep
from fl_jax.errors import FlJaxError
from fl_jax.results import select
from fl_jax.training import Runs

Axes = Mapping[str, Sequence[float]]
"""Name of a hyper-parameter -> its values, ascending. The grid is their product, the last name changing fastest."""


class Choice(NamedTuple):
    """The best point of a grid. score: its mean over seeds. edges: the hyper-parameters that are the least or the largest of
    their several values: a better point may lie beyond."""

    point: dict[str, float]
    score: float
    edges: tuple[str, ...]


def decades(*steps: int, parts: int = 2) -> tuple[float, ...]:
    """10 to the power of each step, of `parts` to a decade."""
    return tuple(10 ** (step / parts) for step in steps)


def points(axes: Axes) -> list[dict[str, float]]:
    """All points, name -> value. Raises FlJaxError where there is no axis, or one has no value, or values that do not ascend."""
    if not axes:
        raise FlJaxError("A grid needs at least one hyper-parameter with its values.")
    for name, values in axes.items():
        if not values or not all(a < b for a, b in itertools.pairwise(values)):
            raise FlJaxError(f"The values of {name} in a grid must ascend, and there must be one, but they are {list(values)}.")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def rows(axes: Axes, seeds: Runs) -> Runs:
    """Every point with every seed: G * S runs, the seeds of a point side by side; hyper is a dict, name -> float32[G * S].

    seeds: S runs without hyper-parameters, e.g. of training.seeds_of.
    """
    every = points(axes)
    columns = {name: jnp.asarray([point[name] for point in every], jnp.float32) for name in axes}
    key, hyper = sweep.grid(seeds.key, columns)
    return Runs(key, jnp.tile(seeds.data, len(every)), hyper)


def labels(axes: Axes, seeds: Sequence[int]) -> tuple[list[str], list[int]]:
    """What training.fit calls these runs, in the order of `rows`: its arguments `variants` and `seeds`, G * S of each."""
    every = points(axes)
    return [suffix(point) for point in every for _ in seeds], [seed for _ in every for seed in seeds]


def suffix(point: Mapping[str, float]) -> str:
    """What the rows of a point add to the arm's name: ", client rate 0.1, server rate 1"."""
    return "".join(f", {name} {value:.4g}" for name, value in point.items())


def validation_scores(
    axes: Axes, metrics: pd.DataFrame, arm: str, metric: str, *, site: str = "all", after: int = 0
) -> npt.NDArray[np.float64]:
    """The mean of a metric on validation records over the rounds that follow round `after`: float64[G, S], seeds ascending.

    metrics: rows of runs that are called by `labels`; other arms and splits are not looked at. NaN for a run that has diverged:
    one of the rounds has no value, or no message of some round was finite (training.fit with may_diverge). Raises FlJaxError
    where a point has no such rows, or other seeds than the first.
    """
    names = [f"{arm}{suffix(point)}" for point in points(axes)]
    kept = select(metrics, metric, "validation", site, names)
    kept = kept[kept["round"] > after]
    means = kept.groupby(["arm", "seed"])["value"].agg(lambda values: values.mean(skipna=False))
    table = means.unstack()
    counts = kept.groupby(["arm", "seed"]).size()
    if set(table.index) != set(names) or len(counts) != table.size or counts.nunique() != 1:
        raise FlJaxError(
            f"The grid of {arm} is not complete: measure all of its points in the same seeds and rounds after round {after}.")
    return np.where(_diverged(metrics, table.loc[names]), np.nan, table.loc[names])


def _diverged(metrics: pd.DataFrame, runs: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """bool like `runs`, which has an arm a row and a seed a column: whether every message of some round was not finite."""
    rounds = metrics[(metrics["split"] == "round") & metrics["metric"].isin(("participants", "nonfinite"))]
    wide = rounds.pivot(index=["arm", "seed", "round"], columns="metric", values="value")
    wide = wide.reindex(columns=["participants", "nonfinite"])
    dead = {label[:2] for label in wide.index[(wide["participants"] == 0) & (wide["nonfinite"] > 0)]}
    return np.array([[(arm, seed) in dead for seed in runs.columns] for arm in runs.index])


def choose(axes: Axes, scores: npt.ArrayLike) -> Choice:
    """The point whose mean score over seeds is the largest; of equal ones the first.

    scores: float[G, S] in the order of `points`, larger is better. A point that lacks a score (NaN) in some seed is not chosen;
    raises FlJaxError where all do.
    """
    every, means = points(axes), np.asarray(scores, np.float64).mean(axis=1)
    if len(means) != len(every):
        raise FlJaxError(f"A grid of {len(every)} points needs a score of each, but there are {len(means)}.")
    if np.isnan(means).all():
        raise FlJaxError("No point of the grid has a score in all of its seeds: lower the rates.")
    best = every[int(np.nanargmax(means))]
    edges = tuple(name for name, values in axes.items() if len(values) > 1 and best[name] in (values[0], values[-1]))
    return Choice(best, float(np.nanmax(means)), edges)
