"""What private mechanisms share: checks of their parameters, and the events with which they state what they cost.

DP-FTRL's noise is correlated over rounds, so that what a client pays depends on which rounds together it takes part in, and no event of a
single round says it. Its event is therefore one of which nothing is known (epsilon is infinite), whoever accounts for it, and only a
sampler that keeps a client's participations far enough apart puts the known one in its place (`once_in`, `kept_apart`).
"""

import math
from numbers import Real

import dp_accounting

from fl_jax.clipping import Clipping
from fl_jax.errors import FlJaxError
from fl_jax.types import Array


def check(clip: float | Array | Clipping, noise_multiplier: float | Array, expected: float = 1.0) -> None:
    """Raises FlJaxError for a mechanism that means nothing; what is a tracer is taken as it is. expected: what a sum is divided by."""
    if isinstance(clip, Real) and not 0 < clip < math.inf:
        raise FlJaxError(f"clip must be above 0 and finite, and is {clip}.")
    if isinstance(noise_multiplier, Real) and not 0 <= noise_multiplier < math.inf:
        raise FlJaxError(f"noise_multiplier must be 0 or more and finite, and is {noise_multiplier}.")
    if not 0 < expected < math.inf:
        raise FlJaxError(f"expected_cohort must be above 0 and finite, and is {expected}.")


def gaussian(noise_multiplier: float | Array) -> dp_accounting.DpEvent:
    """The event of Gaussian noise, in clips; not private without any."""
    private = not isinstance(noise_multiplier, Real) or noise_multiplier > 0
    return dp_accounting.GaussianDpEvent(noise_multiplier) if private else dp_accounting.NonPrivateDpEvent()


def replacing(event: dp_accounting.DpEvent) -> dp_accounting.DpEvent:
    """The event of a mechanism that is one of replace-one alone, e.g. since its observers see who takes part: infinite under
    add-or-remove-one, and not amplified by the sampling of clients. It is written as all of one drawn without replacement."""
    return event if event == dp_accounting.NonPrivateDpEvent() else dp_accounting.SampledWithoutReplacementDpEvent(1, 1, event)


def shows_cohort(event: dp_accounting.DpEvent) -> bool:
    """Whether an event is one of `replacing`."""
    return isinstance(event, dp_accounting.SampledWithoutReplacementDpEvent) and event.source_dataset_size == 1


def once_in(period: int, event: dp_accounting.DpEvent) -> dp_accounting.DpEvent:
    """What a client pays for `period` rounds in a row, if it takes part in one of them at most: infinite until `kept_apart` says so."""
    if period == 1 or event == dp_accounting.NonPrivateDpEvent():
        return event
    distance = dp_accounting.SelfComposedDpEvent(dp_accounting.NoOpDpEvent(), period)
    return dp_accounting.ComposedDpEvent((dp_accounting.UnsupportedDpEvent(), distance, event))


def kept_apart(event: dp_accounting.DpEvent, separation: int) -> dp_accounting.DpEvent:
    """The event for clients whose participations are at least `separation` rounds apart: the known one of `once_in` where it suffices."""
    match event:
        case dp_accounting.ComposedDpEvent(events=(
            dp_accounting.UnsupportedDpEvent(), dp_accounting.SelfComposedDpEvent(event=dp_accounting.NoOpDpEvent(), count=period), known,
        )) if period <= separation:
            return known
    return event
