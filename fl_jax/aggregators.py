"""How messages become one pseudo-gradient: the weighted mean, the private mean, the coordinate-wise median."""

import math
from numbers import Real

import dp_accounting
import jax
import jax.numpy as jnp
import optax

from fl_jax.errors import FlJaxError
from fl_jax.types import Aggregator, Array, Key, Metrics, PyTree, Variables


def mean() -> Aggregator:
    """The mean of the messages, weighted by the cohort's weights (McMahan et al. 2017, Algorithm 1: by numbers of records)."""

    def lift(key: Key, state: PyTree, weight: Array, message: PyTree) -> tuple[PyTree, Array]:
        del key, state
        return optax.tree.scale(weight, message), weight

    def combine(key: Key, state: PyTree, total: tuple[PyTree, Array]) -> tuple[PyTree, PyTree, Metrics]:
        del key
        summed, weight = total
        return optax.tree.scale(jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1), 0), summed), state, {}

    return Aggregator(lambda shared, num_clients: (), lift, combine)


def median() -> Aggregator:
    """The median of each coordinate over those who took part, unweighted (Yin et al. 2018, Algorithm 1, option I).

    Needs every message at once: memory is the cohort times the message.
    """

    def lift(key: Key, state: PyTree, weight: Array, message: PyTree) -> tuple[PyTree, Array]:
        del key, state
        return message, weight

    def combine(key: Key, state: PyTree, total: tuple[PyTree, Array]) -> tuple[PyTree, PyTree, Metrics]:
        del key
        messages, weight = total
        present = weight > 0

        def middle(leaf: Array) -> Array:
            rows = jnp.where(present.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, jnp.nan)
            return jnp.where(jnp.any(present), jnp.nanmedian(rows, axis=0), 0)

        return jax.tree.map(middle, messages), state, {}

    return Aggregator(lambda shared, num_clients: (), lift, combine, stacked=True)


def private_mean(clip: float | Array, noise_multiplier: float, expected_cohort: float) -> Aggregator:
    """DP-FedAvg with a fixed clip: each message is clipped, the sum gets Gaussian noise, the denominator is fixed.

    McMahan et al. 2018, "Learning differentially private recurrent language models", Algorithm 1 with flat clipping and the estimator
    of a fixed denominator; uniform weights. clip: bound on the L2 norm of a whole message. noise_multiplier: standard deviation of the
    noise on the sum, in clips. expected_cohort: how many clients take part in expectation; the sum is divided by it whoever came.

    Guarantee: one round is a Gaussian mechanism of this multiplier for adding or removing one client (the sum moves by at most
    `clip`), and of half of it for replacing one (`2 clip`), before any amplification by sampling; `event` states noise over `clip`, and
    fl_jax.privacy converts for the relation in force. Assumes that whoever sees the sum trusts the server to add the noise, that the
    cohort's weights are used only as present or absent, and does not cover metrics: "clipped" (share of the messages that were cut)
    and all that clients report are exact. Statistics of BatchNorm are refused: noise turns a variance negative.
    """
    if isinstance(clip, Real) and not 0 < clip < math.inf:
        raise FlJaxError(f"clip must be above 0 and finite, and is {clip}.")
    if isinstance(noise_multiplier, Real) and not 0 <= noise_multiplier < math.inf:
        raise FlJaxError(f"noise_multiplier must be 0 or more and finite, and is {noise_multiplier}.")
    if not 0 < expected_cohort < math.inf:
        raise FlJaxError(f"expected_cohort must be above 0 and finite, and is {expected_cohort}.")

    def init(shared: PyTree, num_clients: int) -> tuple[()]:
        del num_clients
        for node in jax.tree.leaves(shared, is_leaf=lambda node: isinstance(node, Variables)):
            if isinstance(node, Variables) and jax.tree.leaves(node.stats):
                raise FlJaxError("BatchNorm statistics cannot be sent through a private mean, since noise would turn a variance negative: "
                                 "keep them at the sites (norms.LOCAL or norms.LOCAL_STATISTICS), or use GroupNorm.")
        return ()

    def lift(key: Key, state: PyTree, weight: Array, message: PyTree) -> tuple[PyTree, Array, Array]:
        del key, state
        present = (weight > 0).astype(jnp.float32)
        message = optax.tree.cast(message, jnp.float32)  # a norm of few bits would let more than the clip through
        norm = optax.tree.norm(message)
        scale = jnp.minimum(1.0, clip / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
        # a norm that overflows makes the scale 0 and 0 * inf a NaN: the engine zeroes non-finite messages, this the rest
        clipped = jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(norm), leaf * scale * present, 0), message)
        return clipped, present * (norm > clip), present

    def combine(key: Key, state: PyTree, total: tuple[PyTree, Array, Array]) -> tuple[PyTree, PyTree, Metrics]:
        summed, cut, present = total
        deviation = noise_multiplier * clip
        noise = optax.tree.random_like(key, summed, sampler=jax.random.normal)
        noisy = jax.tree.map(lambda leaf, z: (leaf + deviation * z) / expected_cohort, summed, noise)
        signal = optax.tree.norm(summed) / expected_cohort
        size = sum(leaf.size for leaf in jax.tree.leaves(summed))
        metrics = {"clipped": cut / jnp.maximum(present, 1), "signal_norm": signal,
                   "noise_norm": jnp.float32(deviation / expected_cohort) * size**0.5}
        return noisy, state, metrics

    private = not isinstance(noise_multiplier, Real) or noise_multiplier > 0
    event = dp_accounting.GaussianDpEvent(noise_multiplier) if private else dp_accounting.NonPrivateDpEvent()
    return Aggregator(init, lift, combine, event, acts_when_empty=True)
