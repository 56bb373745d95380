"""Intervals over seeds, on the host: Student's t for a mean and a paired difference, and the percentile bootstrap.

A seed whose value is NaN (a metric that is undefined there) is left out and counted: an interval over fewer seeds says so.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.stats

from fl_jax.errors import FlJaxError

Bounds = tuple[float, float]


class Interval(NamedTuple):
    """A mean with its confidence interval, all floats in the values' own unit.

    n: how many values it rests on. missing: how many were NaN and left out. confidence: as asked for. note: "" or what the
    reader must know: why low and high are NaN, or that they were clipped.
    """

    mean: float
    low: float
    high: float
    n: int
    missing: int
    confidence: float
    note: str = ""


def mean_interval(values: npt.ArrayLike, confidence: float = 0.95, bounds: Bounds | None = None) -> Interval:
    """Student's t interval (Student 1908) of the mean of values [n], one per seed: mean +- t x sd / sqrt(n), t of n - 1 degrees.

    It assumes independent seeds and a mean that is near normal. It knows nothing of a metric's range and may leave it, as for an
    AUROC near 1: with bounds (lowest, highest) it is clipped to them, which loses no coverage, and the note says so.
    n = 1 has no interval: low and high are NaN. Raises FlJaxError for values that are not one-dimensional or outside the bounds.
    """
    kept, missing = _present(_vector(values), confidence)
    if bounds is not None and np.any((kept < bounds[0]) | (kept > bounds[1])):
        raise FlJaxError(f"values from {kept.min()} to {kept.max()} leave the bounds {bounds}: give the metric's own bounds.")
    n = kept.size
    mean, note = _mean_and_note(kept)
    if note:
        return Interval(mean, np.nan, np.nan, n, missing, confidence, note)
    half = float(scipy.stats.t.ppf((1 + confidence) / 2, n - 1) * kept.std(ddof=1) / np.sqrt(n))
    return bounded(Interval(mean, mean - half, mean + half, n, missing, confidence), bounds)


def paired_difference(a: npt.ArrayLike, b: npt.ArrayLike, confidence: float = 0.95, bounds: Bounds | None = None) -> Interval:
    """The t interval of the mean of a - b, both [n] and paired by seed: what is common to a seed cancels (Student 1908).

    A pair with a NaN on either side, or the same infinity on both, is left out and counted. bounds: of the difference, e.g.
    (-1, 1) for two AUROCs. Raises FlJaxError where a and b have different lengths.
    """
    first, second = _vector(a), _vector(b)
    if first.size != second.size:
        raise FlJaxError(f"a paired difference needs one value of each arm per seed, not {first.size} and {second.size} values.")
    with np.errstate(invalid="ignore"):  # inf - inf
        return mean_interval(first - second, confidence, bounds)


def bootstrap_interval(values: npt.ArrayLike, seed: int, confidence: float = 0.95, num_resamples: int = 9999) -> Interval:
    """The percentile bootstrap interval of the mean of values [n] (Efron 1979, "Bootstrap methods: another look at the
    jackknife").

    seed: of the resampling; the same seed gives the same interval. It never leaves the values' range, and assumes no normality,
    but is too narrow for few values: at n = 5 a nominal 95 % covers far less. n = 1 has no interval: low and high are NaN.
    """
    kept, missing = _present(_vector(values), confidence)
    mean, note = _mean_and_note(kept)
    if note:
        return Interval(mean, np.nan, np.nan, kept.size, missing, confidence, note)
    found = scipy.stats.bootstrap(
        (kept,),
        np.mean,
        confidence_level=confidence,
        n_resamples=num_resamples,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high), kept.size, missing, confidence)


def bounded(interval: Interval, bounds: Bounds | None) -> Interval:
    """The interval clipped to bounds (lowest, highest), with a note where that changed it; None: as it is.

    The true mean lies within the bounds, so that the clipped interval covers it exactly when the unclipped one does.
    """
    if bounds is None or (interval.low >= bounds[0] and interval.high <= bounds[1]) or np.isnan(interval.low):
        return interval
    low, high = max(interval.low, bounds[0]), min(interval.high, bounds[1])
    return interval._replace(low=low, high=high, note=f"clipped to [{bounds[0]:g}, {bounds[1]:g}]")


def _vector(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    if array.ndim != 1:
        raise FlJaxError(f"an interval needs a vector with one value per seed, not an array of shape {array.shape}.")
    return array


def _present(values: npt.NDArray[np.float64], confidence: float) -> tuple[npt.NDArray[np.float64], int]:
    """The values that are not NaN, and how many are."""
    if not 0 < confidence < 1:
        raise FlJaxError(f"confidence is a probability between 0 and 1, such as 0.95, not {confidence}.")
    missing = np.isnan(values)
    return values[~missing], int(missing.sum())


def _mean_and_note(values: npt.NDArray[np.float64]) -> tuple[float, str]:
    """The mean, and why there is no interval around it ("" where there is one)."""
    if values.size == 0:
        return float("nan"), "no values"
    with np.errstate(invalid="ignore"):
        mean = float(values.mean())
    if not np.isfinite(values).all():
        return mean, "no interval: infinite values"
    return mean, "no interval: one value" if values.size == 1 else ""
