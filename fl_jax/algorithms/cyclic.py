"""Sites one after another instead of side by side: cyclic weight transfer."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from fl_jax import trees
from fl_jax.algorithms.averaging import Options, fedavg
from fl_jax.types import Array, Batches, Cohort, FederatedAlgorithm, Key, Model, PyTree, RoundMetrics, Sites, State, Variables

Round = Callable[[Key, State, Cohort, Sites], tuple[State, RoundMetrics]]


class Turns(NamedTuple):
    """Whose turn it is. order: int32[N], all sites in the order of this cycle. place: int32, where in it the next one is looked
    for. aggregator: the state of the algorithm's own aggregator."""

    order: Array
    place: Array
    aggregator: PyTree


def in_turn(algorithm: FederatedAlgorithm, *, shuffled: bool = True) -> FederatedAlgorithm:
    """`algorithm` with one site a round: of the sites in the cohort that have records, the next one in the cycle.

    A cycle visits every site once, in an order drawn anew for each (shuffled) or in that of their ids. The rest of the cohort
    neither trains nor sends; a site whose message was not finite has had its turn.
    """

    def init(variables: Variables, num_clients: int) -> State:
        state = algorithm.init(variables, num_clients)
        nobody_left = jnp.int32(num_clients)
        return state._replace(aggregator=Turns(jnp.arange(num_clients, dtype=jnp.int32), nobody_left, state.aggregator))

    def turn(inner: Round, key: Key, state: State, cohort: Cohort, sites: Sites) -> tuple[State, RoundMetrics]:
        round_key, order_key = jax.random.split(key)
        before: Turns = state.aggregator
        num_clients = sites.size.shape[0]
        places = jnp.arange(num_clients, dtype=jnp.int32)
        there = jnp.zeros(num_clients, bool).at[jnp.where(cohort.weight > 0, cohort.ids, num_clients)].set(True, mode="drop")
        there &= sites.size > 0
        again = ~jnp.any(there[before.order] & (places >= before.place))
        fresh = jax.random.permutation(order_key, places) if shuffled else places
        order = jnp.where(again, fresh, before.order)
        place = jnp.argmax(there[order] & (places >= jnp.where(again, 0, before.place))).astype(jnp.int32)
        alone = cohort._replace(weight=jnp.where(cohort.ids == order[place], cohort.weight, 0))
        after, metrics = inner(round_key, state._replace(aggregator=before.aggregator), alone, sites)
        order, place = trees.select(jnp.any(there), (order, place + 1), (before.order, before.place))
        return after._replace(aggregator=Turns(order, place, after.aggregator)), metrics

    return algorithm._replace(init=init, round=partial(turn, algorithm.round), visit=partial(turn, algorithm.visit))


def cyclic(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, *, shuffled: bool = True, **options: Unpack[Options]
) -> FederatedAlgorithm:
    """Cyclic weight transfer: one site trains what the one before it left (Chang et al. 2018, "Distributed deep learning networks
    among institutions for medical imaging"). A round is one site's turn: FedAvg of a single site is what that site makes of the
    model."""
    return in_turn(fedavg(model, optimizer, batches, **options), shuffled=shuffled)
