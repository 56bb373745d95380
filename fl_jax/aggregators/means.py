"""Aggregators that promise no privacy: the weighted mean and the coordinate-wise median."""

import jax
import jax.numpy as jnp
import optax

from fl_jax.types import Aggregator, Array, Key, Metrics, PyTree


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
