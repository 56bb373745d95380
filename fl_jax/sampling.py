"""Who takes part in a round. Each sampler owns the amplification that it earns; wrappers make drop-outs and stragglers of its cohort."""

from collections.abc import Callable, Sequence
from functools import partial

import dp_accounting
import jax
import jax.numpy as jnp

from fl_jax import mechanism
from fl_jax.errors import FlJaxError
from fl_jax.poisson import check_rate, chosen, kept, truncated
from fl_jax.privacy.events import one_gaussian
from fl_jax.types import Array, Batches, Cohort, Key, Sampling, Sites, no_amplification

Weights = Callable[[Sites], Array]
ALL_STEPS = jnp.iinfo(jnp.int32).max


def by_records(sites: Sites) -> Array:
    """float32[N]: a site weighs as many as it has records (McMahan et al. 2017). Records of a site are not private information then."""
    return sites.size.astype(jnp.float32)


def equal(sites: Sites) -> Array:
    """float32[N]: every site weighs 1. What private aggregators need."""
    return jnp.ones(sites.size.shape, jnp.float32)


def everyone(weights: Weights = by_records) -> Sampling:
    """Every site takes part in every round: the cross-silo setting. There is no amplification by sampling."""

    def draw(key: Key, t: Array, sites: Sites) -> Cohort:
        del key, t
        return _cohort(jnp.arange(sites.size.shape[0], dtype=jnp.int32), sites, weights)

    return Sampling(draw, no_amplification)


def fixed_size(cohort_size: int, num_clients: int, weights: Weights = by_records) -> Sampling:
    """A uniformly random cohort of exactly `cohort_size` distinct clients (McMahan et al. 2017, Algorithm 1).

    Amplification: sampling without replacement, accounted under the replace-one relation, where the sensitivity of a clipped sum is
    twice the clip: fl_jax.privacy, which knows the relation, restates the noise.
    """
    if not 1 <= cohort_size <= num_clients:
        raise FlJaxError(f"a cohort of {cohort_size} cannot be drawn from {num_clients} clients: choose 1 to {num_clients}.")

    def draw(key: Key, t: Array, sites: Sites) -> Cohort:
        del t
        _check_clients(sites, num_clients)
        ids = jax.random.permutation(key, num_clients)[:cohort_size].astype(jnp.int32)
        return _cohort(ids, sites, weights)

    def amplify(event: dp_accounting.DpEvent) -> dp_accounting.DpEvent:
        if mechanism.shows_cohort(event):
            return event
        return dp_accounting.SampledWithoutReplacementDpEvent(num_clients, cohort_size, event)

    return Sampling(draw, amplify)


def poisson(rate: float, num_clients: int, weights: Weights = equal, *, capacity: int | None = None) -> Sampling:
    """Each client takes part by an independent coin of probability `rate`, anew in each round; a private mean divides by rate * num_clients.

    A round in which nobody takes part is a round: a private aggregator then releases noise alone. capacity: the length of the cohort; by
    default num_clients, so that nobody is ever left out (absent clients weigh 0 and cost no steps). Where more come up, a uniformly
    random subset of them takes part.

    Amplification: Poisson sampling, accounted under add-or-remove-one; with a capacity, of a truncated sample (fl_jax.privacy). The number
    of clients is taken to be public. Raises FlJaxError for a rate outside (0, 1] and a capacity outside [rate * num_clients, num_clients].
    """
    check_rate(rate)
    length = num_clients if capacity is None else capacity
    if not max(1, rate * num_clients) <= length <= num_clients:
        raise FlJaxError(f"A capacity of {length} does not suit a rate of {rate:g} of {num_clients} clients: choose {rate * num_clients:g} to "
                         f"{num_clients}, or leave it out.")

    def draw(key: Key, t: Array, sites: Sites) -> Cohort:
        del t
        _check_clients(sites, num_clients)
        first, second = jax.random.split(key)
        takes_part = chosen(first, rate, num_clients)
        ids = jnp.arange(num_clients, dtype=jnp.int32)
        if length == num_clients:
            cohort = _cohort(ids, sites, weights)
            return cohort._replace(weight=jnp.where(takes_part, cohort.weight, 0))
        ids, present = kept(second, jnp.where(takes_part, ids, num_clients).astype(jnp.uint32), jnp.int32(num_clients), length)
        return _cohort(jnp.where(present > 0, ids, num_clients), sites, weights)

    def amplify(event: dp_accounting.DpEvent) -> dp_accounting.DpEvent:
        if mechanism.shows_cohort(event):
            return event
        if length < num_clients:
            return truncated(event, num_clients, rate, length)
        private = event != dp_accounting.NonPrivateDpEvent()
        return dp_accounting.PoissonSampledDpEvent(rate, one_gaussian(event) or event) if private else event

    return Sampling(draw, amplify)


def separated(cohort_size: int, num_clients: int, separation: int, weights: Weights = by_records) -> Sampling:
    """Any two participations of a client are at least `separation` rounds apart, whatever the keys: what DP-FTRL needs.

    Clients are dealt to `separation` groups by their ids, as cards are dealt, and in round t it is group t mod separation's turn: all of
    it, or `cohort_size` of it drawn uniformly at random (Choquette-Choo et al. 2023, "(Amplified) banded matrix factorization", Algorithm
    2, with cohorts of a fixed size and without the amplification that its coins would earn). Where the groups are not of one size, clients
    of the smaller ones take part a little more often. Drop-outs take part less often, and keep the promise.

    Amplification: none; it is here that DP-FTRL's event is known (fl_jax.mechanism). A mechanism that pays in every round pays in every
    round here as well: aggregators.private_ftrl with banded(rounds, separation, bands=1) is the private mean that pays once in
    `separation` rounds. Raises FlJaxError where separation * cohort_size > num_clients.
    """
    if cohort_size < 1 or separation < 1 or separation * cohort_size > num_clients:
        raise FlJaxError(
            f"of {num_clients} clients, cohorts of {cohort_size} cannot be kept {separation} rounds apart: cohort size and separation must "
            f"be 1 or more, and their product {num_clients} at most.")

    def draw(key: Key, t: Array, sites: Sites) -> Cohort:
        _check_clients(sites, num_clients)
        ids = t % separation + separation * jnp.arange(-(-num_clients // separation), dtype=jnp.int32)
        order = jnp.argsort(jnp.where(ids < num_clients, jax.random.uniform(key, ids.shape), 2.0))
        return _cohort(ids[order[:cohort_size]], sites, weights)

    return Sampling(draw, partial(mechanism.kept_apart, separation=separation))


def with_dropouts(sampling: Sampling, rate: float | Array) -> Sampling:
    """Each client of a cohort drops out with probability `rate`: it neither trains nor sends. May be everybody.

    Earns no further amplification: nobody can promise that drop-outs are random.
    """

    def draw(key: Key, t: Array, sites: Sites) -> Cohort:
        first, second = jax.random.split(key)
        cohort = sampling.draw(first, t, sites)
        stays = jax.random.uniform(second, cohort.ids.shape) >= rate
        return cohort._replace(weight=jnp.where(stays, cohort.weight, 0))

    return Sampling(draw, sampling.amplify)


def with_presence(sampling: Sampling, joins: Array | Sequence[int], leaves: Array | Sequence[int] | None = None) -> Sampling:
    """Sites that join late or leave: site i takes part in no round before joins[i], nor from round leaves[i] on, counted from 0.

    joins, leaves: int [N]; without `leaves` all stay. What a site sent before it left stays in the model. Earns no amplification.
    """
    first = jnp.asarray(joins, jnp.int32)
    last = jnp.full_like(first, ALL_STEPS) if leaves is None else jnp.asarray(leaves, jnp.int32)
    if first.ndim != 1 or first.shape != last.shape:
        raise FlJaxError(f"joins and leaves need a round for each site, and have the shapes {first.shape} and {last.shape}.")

    def draw(key: Key, t: Array, sites: Sites) -> Cohort:
        _check_clients(sites, first.shape[0])
        cohort = sampling.draw(key, t, sites)
        joined, left = (jnp.take(rounds, cohort.ids, mode="clip") for rounds in (first, last))
        return cohort._replace(weight=jnp.where((t >= joined) & (t < left), cohort.weight, 0))

    return Sampling(draw, sampling.amplify)


def with_stragglers(sampling: Sampling, rate: float, batches: Batches, num_epochs: int, *, dropped: bool = False) -> Sampling:
    """A share of each cohort does only a part of its work, as in FedProx's experiments (Li et al. 2020, section 5.2).

    rate: round(rate * cohort) clients straggle, drawn uniformly. Each does 1 to num_epochs - 1 of its num_epochs epochs, uniformly.
    batches: the client's, for the steps of an epoch. dropped: the stragglers are left out instead, which is FedAvg's way there.
    """
    if num_epochs < 2:
        raise FlJaxError("a straggler does at least one epoch and not all: num_epochs must be 2 or more.")

    def draw(key: Key, t: Array, sites: Sites) -> Cohort:
        first, second, third = jax.random.split(key, 3)
        cohort = sampling.draw(first, t, sites)
        count = cohort.ids.shape[0]
        slow = jax.random.permutation(second, count) < round(rate * count)
        if dropped:
            return cohort._replace(weight=jnp.where(slow, 0, cohort.weight))
        full = batches.steps(jnp.take(sites.size, cohort.ids, mode="clip"))
        done = jax.random.randint(third, (count,), 1, num_epochs)
        return cohort._replace(steps=jnp.where(slow, jnp.maximum(full * done // num_epochs, 1), cohort.steps))

    return Sampling(draw, sampling.amplify)


def _check_clients(sites: Sites, num_clients: int) -> None:
    if sites.size.shape[0] != num_clients:
        raise FlJaxError(f"the sampler was made for {num_clients} clients, and the data has {sites.size.shape[0]} sites.")


def _cohort(ids: Array, sites: Sites, weights: Weights) -> Cohort:
    return Cohort(ids, jnp.take(weights(sites), ids, mode="clip"), jnp.full(ids.shape, ALL_STEPS, jnp.int32))
