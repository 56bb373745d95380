"""Aggregators of messages that carry more than a model (corrections.Corrected)."""

import jax
import jax.numpy as jnp
import optax

from fl_jax.aggregators.means import mean
from fl_jax.corrections import Corrected
from fl_jax.types import Aggregator, Array, Key, Metrics, PyTree, Variables


def with_control(aggregator: Aggregator, control: Aggregator | None = None) -> Aggregator:
    """`aggregator` for the variables, and another one, which does not stack, for the control half: by default `per_client`.

    What the variables' aggregator promises of privacy it does not promise of controls, so that the event is not private, and a round
    without participants changes nothing.
    """
    control = control or per_client()

    def init(shared: Corrected, num_clients: int) -> tuple[PyTree, PyTree]:
        return aggregator.init(shared.variables, num_clients), control.init(shared.control, num_clients)

    def lift(key: Key, state: tuple[PyTree, PyTree], weight: Array, message: Corrected) -> tuple[PyTree, PyTree]:
        return aggregator.lift(key, state[0], weight, message.variables), control.lift(key, state[1], weight, message.control)

    def combine(key: Key, state: tuple[PyTree, PyTree], total: tuple[PyTree, PyTree]) -> tuple[Corrected, PyTree, Metrics]:
        variables, inner, metrics = aggregator.combine(key, state[0], total[0])
        controls = jax.tree.map(lambda leaf: leaf.sum(0), total[1]) if aggregator.stacked else total[1]
        answer, other, more = control.combine(key, state[1], controls)
        return Corrected(variables, answer), (inner, other), metrics | more

    return Aggregator(init, lift, combine, stacked=aggregator.stacked)


def per_client() -> Aggregator:
    """The sum over those who took part, each counted once, over the number of all clients (SCAFFOLD, Algorithm 1, line 17): whatever the
    cohort's weights, the server's control stays the mean of the clients'."""

    def lift(key: Key, state: Array, weight: Array, message: PyTree) -> PyTree:
        del key, state
        return optax.tree.scale(jnp.float32(weight > 0), message)

    def combine(key: Key, state: Array, total: PyTree) -> tuple[PyTree, Array, Metrics]:
        del key
        return optax.tree.scale(1 / state, total), state, {}

    return Aggregator(lambda shared, num_clients: jnp.float32(num_clients), lift, combine)


def normalized_mean() -> Aggregator:
    """FedNova: the weighted mean of the messages' directions d_i / a_i, times the weighted mean of the lengths a_i, their controls (Wang et al.
    2020, "Tackling the objective inconsistency problem in heterogeneous federated optimization", eq. 9 and 11). Statistics are
    averaged as they are. Metric: "effective_steps", the mean length.
    """
    plain = mean()

    def lift(key: Key, state: PyTree, weight: Array, message: Corrected) -> tuple[PyTree, Array]:
        length = jnp.where(message.control > 0, message.control, 1)
        directions = message._replace(
            variables=Variables(optax.tree.scale(1 / length, message.variables.params), message.variables.stats))
        return plain.lift(key, state, weight, directions)

    def combine(key: Key, state: PyTree, total: tuple[PyTree, Array]) -> tuple[Corrected, PyTree, Metrics]:
        directions, state, metrics = plain.combine(key, state, total)
        length = directions.control
        params = optax.tree.scale(length, directions.variables.params)
        return Corrected(Variables(params, directions.variables.stats), jnp.float32(0)), state, metrics | {"effective_steps": length}

    return Aggregator(plain.init, lift, combine)
