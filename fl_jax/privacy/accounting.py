"""Epsilon of composed privacy events, by Renyi differential privacy and by privacy loss distributions; infinity where neither can tell.

Events state noise in clips (see fl_jax.privacy.events). Under add-or-remove-one a clipped sum moves by one clip, under replace-one by two:
one summand is replaced by another that may point the other way. dp_accounting's two accountants disagree on who converts: its
PLD accountant doubles by itself under replace-one, its RDP accountant takes the multiplier for one over the sensitivity. So events for
the latter are restated here, and only here.
"""

import enum
import functools
import logging
import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import dp_accounting
import numpy as np
from dp_accounting import NeighboringRelation, pld, rdp
from dp_accounting.pld import privacy_loss_distribution
from scipy import stats

from fl_jax.errors import FlJaxError
from fl_jax.privacy.events import parts, precision

Spent = Sequence[tuple[dp_accounting.DpEvent, int]]
"""Events of one round, each as events.checked returns it, and in how many rounds they occurred."""

_UNKNOWN = (dp_accounting.UnsupportedEventError, ArithmeticError, ValueError)
_TINY = 1e-6  # a Gaussian with less noise than this, in sensitivities, promises nothing
PLD_INTERVAL = 1e-4  # dp_accounting's default, good to three digits for an epsilon up to this ...
_FINE_EPSILON = 10.0  # ... and in proportion above it, or the memory of a useless guarantee has no bound
CUT_ANYHOW = 1e-9  # a sample that is cut with at most this probability a step need not be cut to a uniformly random subset
_RARE = 0.05  # the share of delta up to which the chance that a sample is cut is simply taken out of it


class Accountant(enum.StrEnum):
    """How epsilon is computed; both are upper bounds for what is spent, PLD the tighter one."""

    RDP = "rdp"
    PLD = "pld"


CONVERSION = {
    Accountant.RDP: "Renyi DP at dp_accounting's default orders, converted by Proposition 12 of Canonne, Kamath & Steinke 2020",
    Accountant.PLD: "privacy loss distributions (dp_accounting, pessimistic rounding); exact for Gaussians without sampling (Balle & Wang 2018)",
}


def sensitivity(relation: NeighboringRelation) -> int:
    """By how many clips a clipped sum can move between neighbouring data sets."""
    return 2 if relation is NeighboringRelation.REPLACE_ONE else 1


def epsilon(
    spent: Spent, relation: NeighboringRelation, delta: float, accountant: Accountant = Accountant.RDP, interval: float = PLD_INTERVAL
) -> float:
    """Epsilon at delta of all events together, each as many times as it was spent.

    By RDP one round's vector of divergences is computed once per process and scaled: .1 ms from then on. By PLD .5 s, and .1 s for
    another number of rounds. interval: of the grid of privacy losses, for PLD; a coarser one is faster and its epsilon larger. Infinity
    where an event is not private or this accountant cannot account for it under this relation. Raises FlJaxError for a delta outside (0, 1).

    Poisson samples that are cut to a capacity c (TruncatedSubsampledGaussianDpEvent of n records) cost what plain Poisson samples cost,
    at delta - p, where p bounds the probability that the coins of the other records of a step, of which neighbours have at most n, come
    up c times or more in any step: p <= steps * P[Binomial(n, rate) >= c]. Proof: call that event F. It is about the others' coins alone, so
    it has one probability on both neighbours, and outside of it neither sample is cut. Given any coins of the others outside of F, all
    steps together are (epsilon, delta_Poisson(epsilon)) indistinguishable, since the bounds for Poisson samples (RDP: Mironov et al. 2019,
    Theorem 4; PLD: Zhu et al. 2022, Theorem 11) hold for each outcome of these coins and are then averaged. So
    P[M(D) in S] <= e^epsilon P[M(D') in S] + delta_Poisson(epsilon) + p, whatever is kept of a sample that is cut. Where p takes more than a
    twentieth of delta, PLD uses dp_accounting's own analysis of that event, for n and for n + 1 records, if a step is cut with a probability
    above CUT_ANYHOW: it needs the kept records to be a uniformly random subset of the sample (arXiv 2508.15089), which samplers promise
    then. Otherwise, and by RDP, epsilon is infinite where p >= delta.
    """
    if not 0 < delta < 1:
        raise FlJaxError(f"delta must lie between 0 and 1, and is {delta}: choose it well below 1 / (number of units).")
    by_pld = Accountant(accountant) is Accountant.PLD
    by = partial(_epsilon_by_pld, interval=interval) if by_pld else _epsilon_by_rdp
    flat = _added(part for event, count in spent if count > 0 for part in _parts(event, count, relation))
    cut = {event: count * _cut(event) for event, count in flat}
    native = {event for event in cut if _cut(event) > CUT_ANYHOW} if by_pld and sum(cut.values()) > _RARE * delta else set()
    left = delta - sum(value for event, value in cut.items() if event not in native)
    if left <= 0:
        return math.inf
    return max(
        by(_added((_resized(event, more) if event in native else _uncut(event), count) for event, count in flat), relation, left)
        for more in ((0, 1) if native else (0,)))


def _parts(event: dp_accounting.DpEvent, count: int, relation: NeighboringRelation) -> Iterable[tuple[dp_accounting.DpEvent, int]]:
    """What an event is composed of; all records drawn without replacement, under the relation that this needs, are no sampling."""
    for part, times in parts(event, count):
        whole = isinstance(part, dp_accounting.SampledWithoutReplacementDpEvent) and part.sample_size == part.source_dataset_size
        if whole and relation is NeighboringRelation.REPLACE_ONE:
            yield from _parts(part.event, times, relation)
        else:
            yield part, times


def _added(spent: Iterable[tuple[dp_accounting.DpEvent, int]]) -> list[tuple[dp_accounting.DpEvent, int]]:
    """Each event once, with its counts added up."""
    total: dict[dp_accounting.DpEvent, int] = {}
    for event, count in spent:
        total[event] = total.get(event, 0) + count
    return list(total.items())


@functools.lru_cache(maxsize=4096)
def _cut(event: dp_accounting.DpEvent) -> float:
    """A bound on the probability that a step's sample is cut, whatever the coin of the one record in question; see `epsilon`."""
    if not isinstance(event, dp_accounting.TruncatedSubsampledGaussianDpEvent):
        return 0.0
    return float(stats.binom.sf(event.truncated_batch_size - 1, event.dataset_size, event.sampling_probability))


def _uncut(event: dp_accounting.DpEvent) -> dp_accounting.DpEvent:
    """A truncated event as if it had no capacity."""
    if not isinstance(event, dp_accounting.TruncatedSubsampledGaussianDpEvent):
        return event
    return dp_accounting.PoissonSampledDpEvent(event.sampling_probability, dp_accounting.GaussianDpEvent(event.noise_multiplier))


def _resized(event: dp_accounting.DpEvent, more: int) -> dp_accounting.DpEvent:
    """A truncated event of so many more records."""
    if not isinstance(event, dp_accounting.TruncatedSubsampledGaussianDpEvent):
        return event
    return dp_accounting.TruncatedSubsampledGaussianDpEvent(
        event.dataset_size + more, event.sampling_probability, event.truncated_batch_size, event.noise_multiplier)


def natural_relation(event: dp_accounting.DpEvent) -> NeighboringRelation:
    """The relation under which an event is commonly accounted: replace-one where something is drawn without replacement, whose size
    is public then; else add-or-remove-one."""
    inside = getattr(event, "events", None) or ([event.event] if hasattr(event, "event") else [])
    replaces = isinstance(event, dp_accounting.SampledWithoutReplacementDpEvent)
    if replaces or any(natural_relation(part) is NeighboringRelation.REPLACE_ONE for part in inside):
        return NeighboringRelation.REPLACE_ONE
    return NeighboringRelation.ADD_OR_REMOVE_ONE


def over_sensitivity(event: dp_accounting.DpEvent, relation: NeighboringRelation) -> dp_accounting.DpEvent:
    """The event with its noise in units of the relation's sensitivity: what dp_accounting's RDP accountant expects.

    UnsupportedDpEvent for an event of which it is not known how its sensitivity grows under replace-one.
    """
    if sensitivity(relation) == 1:
        return event
    match event:
        case dp_accounting.GaussianDpEvent():
            return dp_accounting.GaussianDpEvent(event.noise_multiplier / sensitivity(relation))
        case dp_accounting.SampledWithoutReplacementDpEvent():
            inner = over_sensitivity(event.event, relation)
            return dp_accounting.SampledWithoutReplacementDpEvent(event.source_dataset_size, event.sample_size, inner)
        case dp_accounting.SelfComposedDpEvent():
            return dp_accounting.SelfComposedDpEvent(over_sensitivity(event.event, relation), event.count)
        case dp_accounting.ComposedDpEvent():
            return dp_accounting.ComposedDpEvent(tuple(over_sensitivity(part, relation) for part in event.events))
        case dp_accounting.NoOpDpEvent() | dp_accounting.NonPrivateDpEvent():
            return event
    return dp_accounting.UnsupportedDpEvent()


@functools.lru_cache(maxsize=256)
def _rdp_of_one(event: dp_accounting.DpEvent, relation: NeighboringRelation) -> np.ndarray:
    """The Renyi divergences of one round at dp_accounting's default orders; infinity at an order of which nothing is known."""
    accountant = rdp.RdpAccountant(neighboring_relation=relation)
    logger = logging.getLogger("absl")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)  # an order that does not converge is left out, which is nobody's concern
        with np.errstate(all="ignore"):
            values = accountant.compose(over_sensitivity(event, relation)).rdp
    except _UNKNOWN:
        return np.full(len(accountant.orders), np.inf)
    finally:
        logger.setLevel(level)
    # a divergence that is negative by rounding, or NaN, would count as an epsilon of 0 after any number of rounds
    return np.where(values >= 0, values, np.inf)


def _epsilon_by_rdp(spent: Spent, relation: NeighboringRelation, delta: float) -> float:
    orders = _orders()
    total = sum((count * _rdp_of_one(event, relation) for event, count in spent), np.zeros(len(orders)))
    return float(rdp.compute_epsilon(orders, total, delta)[0])


@functools.cache
def _orders() -> np.ndarray:
    return rdp.RdpAccountant().orders


def _epsilon_by_pld(spent: Spent, relation: NeighboringRelation, delta: float, interval: float) -> float:
    precisions = [precision(event) for event, _ in spent]
    if None not in precisions:  # Gaussians without sampling compose to one Gaussian
        total = sum(count * (value or 0.0) for value, (_, count) in zip(precisions, spent, strict=True))
        deviation = 1 / math.sqrt(total) / sensitivity(relation) if total > 0 else math.inf
        return float(dp_accounting.get_epsilon_gaussian(deviation, delta)) if deviation > _TINY else math.inf
    rough = _epsilon_by_rdp([(_roughly(event, relation), count) for event, count in spent], NeighboringRelation.ADD_OR_REMOVE_ONE, delta)
    if not math.isfinite(rough):
        return math.inf
    # in steps of 2, so that a run whose epsilon grows seldom needs its distributions anew
    interval *= 2.0 ** max(0, math.ceil(math.log2(max(rough, 1.0) / _FINE_EPSILON)))
    try:
        plds = [_pld(event, count, relation, interval) for event, count in spent]
        if all(one is not None for one in plds):
            return float(functools.reduce(lambda one, other: one.compose(other), plds).get_epsilon_for_delta(delta))
        accountant = pld.PLDAccountant(relation, interval)
        for event, count in spent:
            accountant.compose(event, count)
        return float(accountant.get_epsilon(delta))
    except _UNKNOWN:
        return math.inf


def _pld(event: dp_accounting.DpEvent, count: int, relation: NeighboringRelation, interval: float) -> Any:
    """The privacy loss distribution of `count` times an event; None where dp_accounting's accountant has to make it."""
    match event:
        case dp_accounting.GaussianDpEvent():
            return privacy_loss_distribution.from_gaussian_mechanism(
                event.noise_multiplier / math.sqrt(count), value_discretization_interval=interval, neighboring_relation=relation)
        case dp_accounting.PoissonSampledDpEvent(event=dp_accounting.GaussianDpEvent()) if event.sampling_probability > 0:
            return _pld_of_poisson(event.event.noise_multiplier, event.sampling_probability, relation, interval).self_compose(count)
    return None


@functools.lru_cache(maxsize=16)
def _pld_of_poisson(noise: float, rate: float, relation: NeighboringRelation, interval: float) -> Any:
    """The privacy loss distribution of one step, which takes most of the time and which all numbers of steps share."""
    return privacy_loss_distribution.from_gaussian_mechanism(
        noise, value_discretization_interval=interval, sampling_prob=rate, neighboring_relation=relation)


def _roughly(event: dp_accounting.DpEvent, relation: NeighboringRelation) -> dp_accounting.DpEvent:
    """An event of about the same cost that RDP can account for under add-or-remove-one: how wide a grid the privacy loss needs."""
    match event:
        case dp_accounting.PoissonSampledDpEvent(event=dp_accounting.GaussianDpEvent(noise_multiplier=noise)):
            rate = event.sampling_probability
        case dp_accounting.TruncatedSubsampledGaussianDpEvent(noise_multiplier=noise):
            # where many are cut, one record replaces another: twice the sensitivity
            rate, noise = event.sampling_probability, noise / 2
        case _:
            return event
    return dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise / sensitivity(relation)))
