"""How many rounds a learning curve takes to a target: what papers on communication compare."""

import numpy as np
import numpy.typing as npt

from fl_jax.errors import FlJaxError


def running_best(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """float64[T]: the largest of the values up to each; NaN before the first that is not NaN."""
    return np.fmax.accumulate(np.asarray(values, np.float64))


def rounds_to_target(rounds: npt.ArrayLike, values: npt.ArrayLike, target: float) -> float:
    """The round at which the best value so far reaches the target, NaN where it never does (McMahan et al. 2017, section 3).

    rounds: [T], ascending, the rounds at which the values [T] were measured; larger is better, and a NaN is no value. The curve is made
    monotone by the best value of all rounds so far, and its crossing is interpolated between the two measured rounds around it; a curve
    that begins at or above the target crosses it in the first measured round. Raises FlJaxError for rounds that do not ascend.
    """
    at, best = np.asarray(rounds, np.float64), running_best(values)
    if at.shape != best.shape or at.ndim != 1 or not (np.diff(at) > 0).all():
        raise FlJaxError(f"A learning curve needs a value for each of its ascending rounds, not {at.shape} rounds and {best.shape} values.")
    reached = np.flatnonzero(best >= target)
    if not reached.size:
        return float("nan")
    i = int(reached[0])
    if i == 0 or np.isnan(best[i - 1]):
        return float(at[i])
    share = (target - best[i - 1]) / (best[i] - best[i - 1])
    return float(at[i - 1] + share * (at[i] - at[i - 1]))
