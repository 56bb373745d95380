"""How much noise a budget needs: the smallest multiplier whose rounds stay within it."""

import contextlib
import functools
import math
from collections.abc import Callable

import dp_accounting
from dp_accounting import NeighboringRelation
from scipy.optimize import brentq

from fl_jax.errors import FlJaxError
from fl_jax.privacy.accounting import PLD_INTERVAL, Accountant, epsilon, natural_relation
from fl_jax.privacy.budget import Budget
from fl_jax.privacy.events import checked

_PRECISION = 1e-5  # of the multiplier's logarithm
_SLACK = 2e-4  # by which PLD's multiplier is larger than it is thought to be needed
_COARSE = 10 * PLD_INTERVAL
_LEAST, _MOST = 2.0**-10, 2.0**30


def calibrate(
    budget: Budget, rounds: int, sampled: Callable[[dp_accounting.DpEvent], dp_accounting.DpEvent] = lambda event: event,
    relation: NeighboringRelation | None = None,
) -> float:
    """The smallest noise multiplier, in clips, with which so many rounds stay within a budget: to 1 part in 1,000, and never too small.

    sampled: the event of one clipped and noised sum -> the event of one round, e.g. sampling.fixed_size(50, 1_000).amplify, or
    functools.partial(batches.poisson(.01, 100, 6_000).account, num_records=6_000). relation: default: the one under which that is commonly
    accounted; under replace-one the sensitivity is 2 clips. Takes .3 s by RDP and 3 s by PLD.

    Raises FlJaxError where the accountant can say nothing whatever the noise, and where hardly any noise would be enough.
    """
    if rounds < 1:
        raise FlJaxError(f"The number of rounds must be 1 or more, and is {rounds}.")

    target = budget.epsilon

    @functools.cache
    def spent(noise: float, accountant: Accountant, interval: float = PLD_INTERVAL) -> float:
        event = checked(sampled(dp_accounting.GaussianDpEvent(noise)))
        return epsilon([(event, rounds)], relation or natural_relation(event), budget.delta, accountant, interval)

    def smallest(accountant: Accountant, guess: float, stride: float) -> float:
        found = _smallest(target, lambda noise: spent(noise, accountant, _COARSE), guess, stride)
        if found is None:
            event = checked(sampled(dp_accounting.GaussianDpEvent(1.0)))
            name = (relation or natural_relation(event)).name.lower().replace("_", "-")
            raise FlJaxError(f"{accountant.upper()} cannot account for this sampling under {name} at delta {budget.delta:g}, whatever the noise: "
                             "choose the other accountant, another sampling, or a larger delta.")
        return found

    unsampled = math.sqrt(rounds * math.log(1.25 / budget.delta)) / target
    if budget.accountant is Accountant.RDP:
        return smallest(Accountant.RDP, min(max(unsampled / 2, 0.1), 1e4), 4.0)
    with contextlib.suppress(FlJaxError):  # a bound to begin from
        unsampled = smallest(Accountant.RDP, min(max(unsampled / 2, 0.1), 1e4), 4.0)
    rough = smallest(Accountant.PLD, 0.95 * unsampled, 1.1)
    # on a fine grid by the slope on the coarse one: a fine distribution takes a second
    slope = math.log(spent(1.02 * rough, Accountant.PLD, _COARSE) / spent(rough, Accountant.PLD, _COARSE)) / math.log(1.02)
    noise = rough * (target / spent(rough, Accountant.PLD)) ** (1 / slope) * (1 + _SLACK)
    while spent(noise, Accountant.PLD) > target:
        noise *= 1 + _SLACK
    return noise


def _smallest(target: float, spent: Callable[[float], float], guess: float, stride: float) -> float | None:
    """The smallest noise that spends at most the target; None where none does. stride: by which factor to look for bounds."""
    low, high, factor = guess, guess, stride
    while spent(high) > target:
        low, high, factor = high, high * factor, factor**1.5
        if high > _MOST:
            return None
    while low == high or spent(low) <= target:
        low, high, factor = low / factor, low, factor**1.5
        if low < _LEAST:
            raise FlJaxError(f"An epsilon of {target:g} needs hardly any noise here: sampling alone hides a unit but for delta.")
    root = brentq(lambda x: min(math.log(max(spent(math.exp(x)), 1e-30) / target), 100.0), math.log(low), math.log(high), xtol=_PRECISION)
    noise = math.exp(root + 2 * _PRECISION)
    while spent(noise) > target:  # the root is as precise as that, unless epsilon jumps there
        noise *= 1 + 2 * _PRECISION
    return noise
