"""Noise that the sites bring themselves, for sums that nobody but secure aggregation sees into."""

import jax
import jax.numpy as jnp
import optax

from fl_jax import clipping, mechanism
from fl_jax.aggregators.private import Summand, cut_metrics, num_coordinates, summand
from fl_jax.errors import FlJaxError
from fl_jax.norms import refuse_statistics
from fl_jax.types import Aggregator, Array, Key, Metrics, PyTree


def distributed_private_mean(clip: float | Array, noise_multiplier: float, expected_cohort: int, fewest: int) -> Aggregator:
    """DP-FedAvg without a trusted server: each site clips its message and adds its share of the noise before it sends.

    The shares have standard deviation noise_multiplier clip / sqrt(expected_cohort), so that those of an expected cohort amount to
    `private_mean`'s noise (Kairouz et al. 2021, "The distributed discrete Gaussian mechanism for federated learning with secure
    aggregation", with continuous noise here). The denominator is fixed. fewest: how many of the sites that take part
    in any round certainly send a message and keep their share to themselves; only these are counted on.

    Guarantee: in each round one Gaussian mechanism of multiplier noise_multiplier sqrt(fewest / expected_cohort) for replacing what one
    client sends, against those who see the sum and nothing else, as under secure aggregation, which fl_jax does not simulate. Whoever
    sees one message sees it with one share of noise only, and a site that knows others' shares subtracts them: `fewest` must count
    neither sites that drop out nor sites that collude. How many came is not hidden, since the noise grows with it; therefore the event
    is one of replace-one, and costs infinitely much under add-or-remove-one. Cohort weights, metrics and statistics as for `private_mean`.
    """
    mechanism.check(clip, noise_multiplier, expected_cohort)
    if not 0 <= fewest <= expected_cohort:
        raise FlJaxError(f"fewest is how many sites certainly take part, 0 to the expected cohort of {expected_cohort}, and is {fewest}.")
    rule = clipping.constant(clip)
    share = noise_multiplier / expected_cohort**0.5

    def init(shared: PyTree, num_clients: int) -> PyTree:
        del num_clients
        refuse_statistics(shared)
        return rule.init()

    def lift(key: Key, state: PyTree, weight: Array, message: PyTree) -> Summand:
        own = summand(rule.bound(state), weight, message)
        noise = optax.tree.random_like(key, own.message, sampler=jax.random.normal)
        deviation = share * rule.bound(state) * own.present
        return own._replace(message=jax.tree.map(lambda leaf, z: leaf + deviation * z, own.message, noise))

    def combine(key: Key, state: PyTree, total: Summand) -> tuple[PyTree, PyTree, Metrics]:
        del key
        bound = rule.bound(state)
        noise_norm = share * bound / expected_cohort * jnp.sqrt(total.present * num_coordinates(total.message))
        metrics = cut_metrics(bound, total) | {"noise_norm": noise_norm}
        return optax.tree.scale(1 / expected_cohort, total.message), state, metrics

    certain = mechanism.gaussian(noise_multiplier * (fewest / expected_cohort) ** 0.5)
    return Aggregator(init, lift, combine, mechanism.replacing(certain))
