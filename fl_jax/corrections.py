"""Clients that correct each other's drift: a term that is added to every gradient of a round, and what becomes of it after the round.

A correction has two halves, one that the server broadcasts and one that the site keeps. Messages answer the broadcast one.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fl_jax.clients import Training
from fl_jax.types import Array, Batch, Client, Key, Metrics, PyTree, Site, Variables


class Correction(NamedTuple):
    """What is added to a client's gradients, and how it is learned.

    init:   (params) -> (control, own): what is broadcast beside the variables, and what a site keeps; params as they are shared, None
            where a leaf stays at the site
    term:   (control, own) -> like params, added where the optimizer has transforms.add_term; None if nothing is
    update: (control, own, moved, steps) -> (message like control, own). moved: how far the site went, start - end, like params. steps:
            float32, how many it made
    """

    init: Callable[[PyTree], tuple[PyTree, PyTree]]
    term: Callable[[PyTree, PyTree], PyTree]
    update: Callable[[PyTree, PyTree, PyTree, Array], tuple[PyTree, PyTree]]


class Corrected(NamedTuple):
    """What is broadcast, and a message. control: the correction's half."""

    variables: Variables
    control: PyTree


class Own(NamedTuple):
    """What a site keeps. client: of its training. control: of the correction."""

    client: PyTree
    control: PyTree


def corrected(client: Client, correction: Correction) -> Client:
    """`client`, of clients.local_training, with a correction; its messages and what is broadcast are `Corrected`.

    Record-level privacy is the client's own: a correction is made of what was sent, and of what the private steps made of the site.
    """

    def init(variables: Variables) -> tuple[Corrected, Own]:
        shared, kept = client.init(variables)
        control, own = correction.init(shared.params)
        return Corrected(shared, control), Own(kept, own)

    def begin(key: Key, shared: Corrected, kept: Own, site: Site) -> Training:
        training = client.begin(key, shared.variables, kept.client, site)
        return training._replace(term=correction.term(shared.control, kept.control))

    def step(key: Key, carry: Training, shared: Corrected, batch: Batch) -> Training:
        return client.step(key, carry, shared.variables, batch)

    def end(carry: Training, shared: Corrected, kept: Own) -> tuple[Corrected, Own, Metrics]:
        message, own, metrics = client.end(carry, shared.variables, kept.client)
        control, mine = correction.update(shared.control, kept.control, message.params, carry.steps.astype(jnp.float32))
        return Corrected(message, control), Own(own, mine), metrics

    def model(shared: Corrected, kept: Own) -> Variables:
        return client.model(shared.variables, kept.client)

    return Client(init, begin, step, end, model, client.batches, client.event)


def control_variates(learning_rate: float | Array) -> Correction:
    """SCAFFOLD's, option II: gradients get c - c_i, and c_i becomes c_i - c + (x - y_i) / (K learning_rate) (Karimireddy et al. 2020,
    "SCAFFOLD: Stochastic controlled averaging for federated learning", Algorithm 1, lines 10 and 12).

    learning_rate: the one by which K steps of plain SGD move. The message is c_i - c_i+, of which the server subtracts the sum over N.
    """

    def init(params: PyTree) -> tuple[PyTree, PyTree]:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return zeros, zeros

    def term(control: PyTree, own: PyTree) -> PyTree:
        return jax.tree.map(jnp.subtract, control, own)

    def update(control: PyTree, own: PyTree, moved: PyTree, steps: Array) -> tuple[PyTree, PyTree]:
        scale = 1 / (jnp.maximum(steps, 1) * learning_rate)
        new = jax.tree.map(lambda mine, c, d: jnp.where(steps > 0, mine - c + scale * d, mine), own, control, moved)
        return jax.tree.map(jnp.subtract, own, new), new

    return Correction(init, term, update)


def dynamic_regularizer(alpha: float | Array) -> Correction:
    """FedDyn's linear term: gradients get -h_i, and h_i becomes h_i - alpha (y_i - x) (Acar et al. 2021, "Federated learning based on dynamic
    regularization", Algorithm 1). Nothing is broadcast or sent for it."""

    def update(control: PyTree, own: PyTree, moved: PyTree, steps: Array) -> tuple[PyTree, PyTree]:
        del steps
        return control, jax.tree.map(lambda h, d: h + alpha * d, own, moved)

    return Correction(
        lambda params: ((), jax.tree.map(jnp.zeros_like, params)), lambda control, own: jax.tree.map(jnp.negative, own), update)


def counted(length: Callable[[Array], Array]) -> Correction:
    """No correction: the message says how long the site's way was, for aggregators.normalized_mean. length: (steps) -> float32."""

    def update(control: PyTree, own: PyTree, moved: PyTree, steps: Array) -> tuple[PyTree, PyTree]:
        del control, moved
        return length(steps), own

    return Correction(lambda params: (jnp.float32(0), ()), lambda control, own: None, update)
