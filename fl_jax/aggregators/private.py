"""DP-FedAvg: clipped messages, their sum with Gaussian noise, a fixed denominator; the bound fixed, scheduled or adaptive."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fl_jax import clipping, mechanism
from fl_jax.clipping import Clipping
from fl_jax.norms import refuse_statistics
from fl_jax.types import Aggregator, Array, Key, Metrics, PyTree


class Summand(NamedTuple):
    """What one client adds; the sum of these is all that a private aggregator sees.

    message: of norm at most the bound, zero if nobody came. centred: 1/2 where the norm was at most the bound, -1/2 where it was above.
    present: 1 or 0.
    """

    message: PyTree
    centred: Array
    present: Array


def private_mean(clip: float | Array | Clipping, noise_multiplier: float, expected_cohort: float) -> Aggregator:
    """DP-FedAvg: each message is clipped, the sum gets Gaussian noise, the denominator is fixed.

    McMahan et al. 2018, "Learning differentially private recurrent language models", Algorithm 1 with flat clipping and the estimator
    of a fixed denominator; uniform weights. clip: bound on the L2 norm of a whole message: a number, or a value of fl_jax.clipping;
    clipping.quantile(initial, expected_cohort / 20) is the adaptive bound of Andrew et al. 2021, Algorithm 1, as published.
    noise_multiplier: standard deviation of the noise on the sum, in clips, for a bound that costs nothing; a bound that adapts takes
    its part of it and raises FlJaxError where it cannot. expected_cohort: how many clients take part in expectation; the sum is divided
    by it whoever came.

    Guarantee: one round, with the bound's update, is exactly one Gaussian mechanism of this multiplier for adding or removing one client
    (the sum moves by at most `clip`), and of half of it for replacing one (`2 clip`), before any amplification by sampling; `event`
    states noise over `clip`, and fl_jax.privacy converts for the relation in force. Assumes that whoever sees the sum trusts the server
    to add the noise. A cohort's weights are used only as present (above 0) or absent, since numbers of records are private and unbounded.
    "clip", the bound of the round, is covered; the other metrics, "clipped" (share of the messages that were cut), "signal_norm" and all
    that clients report, are exact and not. Statistics of BatchNorm are refused: noise turns a variance negative.
    """
    mechanism.check(clip, noise_multiplier, expected_cohort)
    rule = clip if isinstance(clip, Clipping) else clipping.constant(clip)
    multiplier = rule.multiplier(noise_multiplier)

    def init(shared: PyTree, num_clients: int) -> PyTree:
        del num_clients
        refuse_statistics(shared)
        return rule.init()

    def lift(key: Key, state: PyTree, weight: Array, message: PyTree) -> Summand:
        del key
        return summand(rule.bound(state), weight, message)

    def combine(key: Key, state: PyTree, total: Summand) -> tuple[PyTree, PyTree, Metrics]:
        noise_key, bound_key = jax.random.split(key)
        bound = rule.bound(state)
        deviation = multiplier * bound
        noise = optax.tree.random_like(noise_key, total.message, sampler=jax.random.normal)
        noisy = jax.tree.map(lambda leaf, z: (leaf + deviation * z) / expected_cohort, total.message, noise)
        metrics = cut_metrics(bound, total) | {
            "signal_norm": optax.tree.norm(total.message) / expected_cohort,
            "noise_norm": jnp.float32(deviation / expected_cohort) * num_coordinates(total.message) ** 0.5}
        return noisy, rule.update(bound_key, state, total.centred, jnp.float32(expected_cohort)), metrics

    return Aggregator(init, lift, combine, mechanism.gaussian(noise_multiplier), acts_when_empty=True)


def summand(bound: Array, weight: Array, message: PyTree) -> Summand:
    """What a client of this weight adds: its clipped message if the weight is above 0, and nothing otherwise."""
    present = (weight > 0).astype(jnp.float32)
    clipped, norm = clipping.clip(bound, message)
    return Summand(optax.tree.scale(present, clipped), present * jnp.where(norm <= bound, 0.5, -0.5), present)


def cut_metrics(bound: Array, total: Summand) -> Metrics:
    """The bound, and the share of the messages whose norm was above it, of those who came."""
    return {"clip": bound, "clipped": (total.present / 2 - total.centred) / jnp.maximum(total.present, 1)}


def num_coordinates(tree: PyTree) -> int:
    """How many numbers the leaves of a tree hold."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
