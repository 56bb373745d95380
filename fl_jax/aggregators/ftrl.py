"""DP-FTRL: noise that is correlated over rounds instead of amplification by sampling."""

import jax
import optax

from fl_jax import clipping, mechanism
from fl_jax.aggregators.private import Summand, cut_metrics, summand
from fl_jax.aggregators.strategies import Strategy
from fl_jax.norms import refuse_statistics
from fl_jax.types import Aggregator, Array, Key, Metrics, PyTree


def private_ftrl(clip: float | Array, noise_multiplier: float, expected_cohort: float, strategy: Strategy) -> Aggregator:
    """DP-FTRL: `private_mean` whose noise is correlated over rounds by a strategy, e.g. `tree(16)` or `banded(rounds, 16)`.

    Kairouz et al. 2021, "Practical and private (deep) learning without sampling or shuffling", Algorithm 1, with clients in
    the place of records: clipped messages are summed over a fixed denominator; a server optax.sgd(rate) then steps along a running sum
    with the strategy's noise, and any other server optimizer is post-processing. clip: fixed, since the strategy's noise is drawn for
    rounds together. noise_multiplier: z of the guarantee, whatever the strategy: its independent noise has a standard deviation of
    z clip strategy.sensitivity, so that a tree's node has the paper's multiplier z sqrt(L).

    Guarantee: a client whose participations are at least strategy.separation rounds apart pays exactly one Gaussian mechanism of
    multiplier z for each: in T rounds of a run at most ceil(T / separation) of them, and anew in another run. Add-or-remove-one is meant
    as there: without the client its messages are zero, and everybody else's turns are what they were. No other distance has a guarantee,
    and no amplification by sampling: `event` is infinite but under sampling.separated (see fl_jax.mechanism). Weights, metrics and
    statistics as for `private_mean`.
    """
    mechanism.check(clip, noise_multiplier, expected_cohort)
    rule = clipping.constant(clip)
    multiplier = noise_multiplier * strategy.sensitivity

    def init(shared: PyTree, num_clients: int) -> PyTree:
        del num_clients
        refuse_statistics(shared)
        return strategy.init(shared)

    def lift(key: Key, state: PyTree, weight: Array, message: PyTree) -> Summand:
        del key, state
        return summand(rule.bound(()), weight, message)

    def combine(key: Key, state: PyTree, total: Summand) -> tuple[PyTree, PyTree, Metrics]:
        bound = rule.bound(())
        deviation = multiplier * bound
        noise, state = strategy.noise(key, state, total.message)
        noisy = jax.tree.map(lambda leaf, z: (leaf + deviation * z) / expected_cohort, total.message, noise)
        metrics = cut_metrics(bound, total) | {
            "signal_norm": optax.tree.norm(total.message) / expected_cohort,
            "noise_norm": deviation * optax.tree.norm(noise) / expected_cohort}
        return noisy, state, metrics

    event = mechanism.once_in(strategy.separation, mechanism.gaussian(noise_multiplier))
    return Aggregator(init, lift, combine, event, acts_when_empty=True, period=strategy.separation)
