"""The mean in which a message's weight depends on what it says: fairness among sites."""

import jax.numpy as jnp
import optax

from fl_jax.aggregators.means import mean
from fl_jax.corrections import Corrected, Tilt
from fl_jax.types import Aggregator, Array, Key, Metrics, PyTree, Variables

_LARGEST = 60.0  # e^60 and its inverse leave float32 room for sums


def tilted_mean(power: float | Array = 1.0, curvature: float | Array | None = None) -> Aggregator:
    """The mean of messages d_k with weights v_k = w_k e^(power t_k): the cohort's w_k, tilted by the messages' own log weights t_k
    (corrections.Tilt).

    curvature: L of q-FedAvg (Li et al. 2020, "Fair resource allocation in federated learning", Algorithm 2), by which the mean of the
    parameters becomes sum v_k d_k / sum v_k (1 + power L |d_k|^2 e^(-t_k)), a shorter one. Statistics, and what else is broadcast, have the
    weights v_k.

    What is common to all log weights changes nothing. So they are taken relative to the log of the mean of e^(power t_k) in the round
    before, which is the state, 0 at first, and no further than 60 from it: no weight overflows.
    """
    plain = mean()

    def lift(key: Key, state: Array, weight: Array, message: Corrected) -> PyTree:
        (params, stats), (log, broadcast) = message
        tilted = weight * jnp.exp(jnp.clip(power * log - state, -_LARGEST, _LARGEST))
        length = jnp.float32(1)
        if curvature is not None:
            length += power * curvature * optax.tree.norm(params, squared=True) * jnp.exp(jnp.clip(-log, -_LARGEST, _LARGEST))
        return plain.lift(key, (), tilted, (params, stats, broadcast, length)), weight

    def combine(key: Key, state: Array, total: PyTree) -> tuple[Corrected, Array, Metrics]:
        sums, weight = total
        (params, stats, broadcast, length), _, metrics = plain.combine(key, (), sums)
        params = optax.tree.scale(1 / jnp.where(length > 0, length, 1), params)
        level = state + jnp.log(jnp.where(weight > 0, sums[1] / jnp.where(weight > 0, weight, 1), 1))
        return Corrected(Variables(params, stats), Tilt(jnp.float32(0), broadcast)), level, metrics

    return Aggregator(lambda shared, num_clients: jnp.float32(0), lift, combine)
