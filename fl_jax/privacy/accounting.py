"""Epsilon of composed privacy events, by Renyi differential privacy and by privacy loss distributions; infinity where neither can tell.

Events state noise in clips (see fl_jax.privacy.events). Under add-or-remove-one a clipped sum moves by one clip, under replace-one by two:
one summand is replaced by another that may point the other way. dp_accounting's two accountants disagree on who converts: its
PLD accountant doubles by itself under replace-one, its RDP accountant takes the multiplier for one over the sensitivity. So events for
the latter are restated here, and only here.
"""

import enum
import functools
import math
from collections.abc import Sequence

import dp_accounting
import numpy as np
from dp_accounting import NeighboringRelation, pld, rdp

from fl_jax.errors import FlJaxError

Spent = Sequence[tuple[dp_accounting.DpEvent, int]]
"""Events of one round, each as events.checked returns it, and in how many rounds they occurred."""

_UNKNOWN = (dp_accounting.UnsupportedEventError, ArithmeticError, ValueError)
_TINY = 1e-6  # a Gaussian with less noise than this, in sensitivities, promises nothing
_PLD_INTERVAL = 1e-4  # dp_accounting's default, good to three digits for an epsilon up to this ...
_PLD_INTERVAL_EPSILON = 10.0  # ... and in proportion above it, or the memory of a useless guarantee has no bound


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


def epsilon(spent: Spent, relation: NeighboringRelation, delta: float, accountant: Accountant = Accountant.RDP) -> float:
    """Epsilon at delta of all events together, each as many times as it was spent.

    By RDP one round's vector of divergences is computed once per process and scaled: .1 ms from then on. By PLD .1 to 1 s. Infinity where
    an event is not private or this accountant cannot account for it under this relation. Raises FlJaxError for a delta outside (0, 1).
    """
    if not 0 < delta < 1:
        raise FlJaxError(f"delta must lie between 0 and 1, and is {delta}: choose it well below 1 / (number of units).")
    by = _epsilon_by_rdp if Accountant(accountant) is Accountant.RDP else _epsilon_by_pld
    return by([(event, count) for event, count in spent if count > 0], relation, delta)


def natural_relation(event: dp_accounting.DpEvent) -> NeighboringRelation:
    """The relation under which an event is commonly accounted: replace-one where something is drawn without replacement, whose size
    is public then; else add-or-remove-one."""
    parts = getattr(event, "events", None) or ([event.event] if hasattr(event, "event") else [])
    replaces = isinstance(event, dp_accounting.SampledWithoutReplacementDpEvent)
    if replaces or any(natural_relation(part) is NeighboringRelation.REPLACE_ONE for part in parts):
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
    try:
        with np.errstate(all="ignore"):
            values = accountant.compose(over_sensitivity(event, relation)).rdp
    except _UNKNOWN:
        return np.full(len(accountant.orders), np.inf)
    # a divergence that is negative by rounding, or NaN, would count as an epsilon of 0 after any number of rounds
    return np.where(values >= 0, values, np.inf)


def _epsilon_by_rdp(spent: Spent, relation: NeighboringRelation, delta: float) -> float:
    orders = _orders()
    total = sum((count * _rdp_of_one(event, relation) for event, count in spent), np.zeros(len(orders)))
    return float(rdp.compute_epsilon(orders, total, delta)[0])


@functools.cache
def _orders() -> np.ndarray:
    return rdp.RdpAccountant().orders


def _epsilon_by_pld(spent: Spent, relation: NeighboringRelation, delta: float) -> float:
    precisions = [_precision(event) for event, _ in spent]
    if None not in precisions:  # Gaussians without sampling compose to one Gaussian
        total = sum(count * (precision or 0.0) for precision, (_, count) in zip(precisions, spent, strict=True))
        deviation = 1 / math.sqrt(total) / sensitivity(relation) if total > 0 else math.inf
        return float(dp_accounting.get_epsilon_gaussian(deviation, delta)) if deviation > _TINY else math.inf
    rough = _epsilon_by_rdp([(_roughly(event, relation), count) for event, count in spent], NeighboringRelation.ADD_OR_REMOVE_ONE, delta)
    interval = _PLD_INTERVAL * max(1.0, rough / _PLD_INTERVAL_EPSILON)
    if not math.isfinite(rough):
        return math.inf
    accountant = pld.PLDAccountant(relation, interval)
    try:
        for event, count in spent:
            accountant.compose(event, count)
        return float(accountant.get_epsilon(delta))
    except _UNKNOWN:
        return math.inf


def _precision(event: dp_accounting.DpEvent) -> float | None:
    """1 / z^2 of the one Gaussian that an event without sampling amounts to; None for any other event."""
    match event:
        case dp_accounting.NoOpDpEvent():
            return 0.0
        case dp_accounting.GaussianDpEvent():
            return 1 / event.noise_multiplier / event.noise_multiplier
        case dp_accounting.SelfComposedDpEvent():
            inner = _precision(event.event)
            return None if inner is None else event.count * inner
        case dp_accounting.ComposedDpEvent():
            parts = [_precision(part) for part in event.events]
            return None if None in parts else sum(part or 0.0 for part in parts)
    return None


def _roughly(event: dp_accounting.DpEvent, relation: NeighboringRelation) -> dp_accounting.DpEvent:
    """An event of about the same cost that RDP can account for under add-or-remove-one: how wide a grid the privacy loss needs."""
    match event:
        case dp_accounting.PoissonSampledDpEvent(event=dp_accounting.GaussianDpEvent(noise_multiplier=noise)):
            rate = event.sampling_probability
        case dp_accounting.TruncatedSubsampledGaussianDpEvent(noise_multiplier=noise):
            rate = event.sampling_probability
        case _:
            return event
    return dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise / sensitivity(relation)))
