"""Clients that correct each other's drift: a term that is added to every gradient of a round, and what becomes of it after the round.

A correction has two halves, one that the server broadcasts and one that the site keeps. Messages answer the broadcast one.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fl_jax.clients import Training
from fl_jax.errors import FlJaxError
from fl_jax.measured import Measure
from fl_jax.types import Array, Batch, Client, Key, Metrics, PyTree, Site, Variables, not_private


class Way(NamedTuple):
    """A site's round, as a correction learns from it. moved: how far it went, start - end, like params. steps: float32, how many it made.
    measured: what Correction.measure found before the first; None without."""

    moved: PyTree
    steps: Array
    measured: PyTree


class Correction(NamedTuple):
    """What is added to a client's gradients, and how it is learned.

    init:   (params) -> (control, own): what is broadcast beside the variables, and what a site keeps; params as they are shared, None
            where a leaf stays at the site
    term:   (control, own) -> the `term` of the round, for the site's optimizer: like params where it has transforms.add_term; None if it has
            no use for one
    update: (control, own, way) -> (message like control, own)
    measure: what the site measures of the broadcast model on all its records (fl_jax.measured); None: nothing
    """

    init: Callable[[PyTree], tuple[PyTree, PyTree]]
    term: Callable[[PyTree, PyTree], PyTree]
    update: Callable[[PyTree, PyTree, Way], tuple[PyTree, PyTree]]
    measure: Measure | None = None


class Corrected(NamedTuple):
    """What is broadcast, and a message. control: the correction's half."""

    variables: Variables
    control: PyTree


class Own(NamedTuple):
    """What a site keeps. client: of its training. control: of the correction."""

    client: PyTree
    control: PyTree


class Correcting(NamedTuple):
    """What a corrected client carries from step to step. measured: before the first."""

    training: Training
    measured: PyTree


def corrected(client: Client, correction: Correction) -> Client:
    """`client`, of clients.local_training, with a correction; its messages and what is broadcast are `Corrected`.

    Record-level privacy is the client's own, since a correction is made of what was sent, and of what the private steps made of the site;
    with a correction that measures there is none.
    """

    def init(variables: Variables) -> tuple[Corrected, Own]:
        shared, kept = client.init(variables)
        control, own = correction.init(shared.params)
        return Corrected(shared, control), Own(kept, own)

    def begin(key: Key, shared: Corrected, kept: Own, site: Site) -> Correcting:
        training = client.begin(key, shared.variables, kept.client, site)
        training = training._replace(term=correction.term(shared.control, kept.control))
        return Correcting(training, None if correction.measure is None else correction.measure(key, training.variables, site))

    def step(key: Key, carry: Correcting, shared: Corrected, batch: Batch) -> Correcting:
        return carry._replace(training=client.step(key, carry.training, shared.variables, batch))

    def end(carry: Correcting, shared: Corrected, kept: Own) -> tuple[Corrected, Own, Metrics]:
        message, own, metrics = client.end(carry.training, shared.variables, kept.client)
        way = Way(message.params, carry.training.steps.astype(jnp.float32), carry.measured)
        control, mine = correction.update(shared.control, kept.control, way)
        return Corrected(message, control), Own(own, mine), metrics

    def model(shared: Corrected, kept: Own) -> Variables:
        return client.model(shared.variables, kept.client)

    return Client(init, begin, step, end, model, client.batches, client.event if correction.measure is None else not_private)


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

    def update(control: PyTree, own: PyTree, way: Way) -> tuple[PyTree, PyTree]:
        scale = 1 / (jnp.maximum(way.steps, 1) * learning_rate)
        new = jax.tree.map(lambda mine, c, d: jnp.where(way.steps > 0, mine - c + scale * d, mine), own, control, way.moved)
        return jax.tree.map(jnp.subtract, own, new), new

    return Correction(init, term, update)


def dynamic_regularizer(alpha: float | Array) -> Correction:
    """FedDyn's linear term: gradients get -h_i, and h_i becomes h_i - alpha (y_i - x) (Acar et al. 2021, "Federated learning based on dynamic
    regularization", Algorithm 1). Nothing is broadcast or sent for it."""

    def update(control: PyTree, own: PyTree, way: Way) -> tuple[PyTree, PyTree]:
        return control, jax.tree.map(lambda h, d: h + alpha * d, own, way.moved)

    return Correction(
        lambda params: ((), jax.tree.map(jnp.zeros_like, params)), lambda control, own: jax.tree.map(jnp.negative, own), update)


def counted(length: Callable[[Array], Array]) -> Correction:
    """No correction: the message says how long the site's way was, for aggregators.normalized_mean. length: (steps) -> float32."""

    def update(control: PyTree, own: PyTree, way: Way) -> tuple[PyTree, PyTree]:
        del control
        return length(way.steps), own

    return Correction(lambda params: (jnp.float32(0), ()), lambda control, own: None, update)


class Tilt(NamedTuple):
    """log: of a message's weight, for aggregators.tilted_mean, which makes 0 of it. broadcast: like what else the server broadcasts."""

    log: Array
    broadcast: PyTree


def told_loss(measure: Measure) -> Correction:
    """No correction: the log weight of the message is that of the site's loss (q-FedAvg). measure: of a mean loss, taken as 1e-10 or more."""

    def update(control: Tilt, own: PyTree, way: Way) -> tuple[Tilt, PyTree]:
        return Tilt(jnp.log(jnp.maximum(way.measured, 1e-10)), control.broadcast), own

    return Correction(lambda params: (Tilt(jnp.float32(0), ()), ()), lambda control, own: None, update, measure)


def ascent(rate: float | Array, measure: Measure) -> Correction:
    """No correction: the message has the site's own log weight, which then rises by rate (loss - the mean loss of the round before), all that
    is broadcast beside the variables (agnostic averaging). In a first round, whose mean of before is 0, no weight moves."""

    def update(control: Tilt, own: Array, way: Way) -> tuple[Tilt, Array]:
        above = jnp.where(control.broadcast == 0, 0, way.measured - control.broadcast)
        return Tilt(own, control.broadcast - way.measured), own + rate * above

    return Correction(
        lambda params: (Tilt(jnp.float32(0), jnp.float32(0)), jnp.float32(0)), lambda control, own: None, update, measure)


class Pull(NamedTuple):
    """mu: of the proximal term; 0 in a message. loss: of the site, in a message; 0 as it is broadcast."""

    mu: Array
    loss: Array


def broadcast_pull(mu: float | Array, measure: Measure) -> Correction:
    """FedProx's mu comes with the model, as the term of transforms.proximal(None), and the message says what the loss was."""

    def update(control: Pull, own: PyTree, way: Way) -> tuple[Pull, PyTree]:
        return Pull(jnp.zeros_like(control.mu), way.measured), own

    return Correction(lambda params: (Pull(jnp.float32(mu), jnp.float32(0)), ()), lambda control, own: control.mu, update, measure)


def frozen_state(optimizer: optax.GradientTransformation, measure: Measure) -> Correction:
    """The state of an optax optimizer comes with the model, as the term of transforms.frozen, and the message has the site's full gradient in
    the place of each copy of the parameters in it (Mime-lite; `sent_gradient` reads it). Raises FlJaxError where parameters stay at sites."""

    def init(params: PyTree) -> tuple[PyTree, PyTree]:
        if any(leaf is None for leaf in jax.tree.leaves(params, is_leaf=lambda leaf: leaf is None)):
            raise FlJaxError("A broadcast optimizer state is of parameters that all sites share: take a BatchNorm policy that keeps none "
                             "at the sites, such as norms.LOCAL_STATISTICS.")
        return optimizer.init(params), ()

    def update(control: PyTree, own: PyTree, way: Way) -> tuple[PyTree, PyTree]:
        put = optax.tree.map_params(optimizer, lambda _, leaf: leaf, control, way.measured, transform_non_params=jnp.zeros_like)
        return put, own

    return Correction(init, lambda control, own: control, update, measure)


def sent_gradient(optimizer: optax.GradientTransformation, control: PyTree, params: PyTree) -> PyTree:
    """The gradient, like params, that messages of `frozen_state` have in their control; 0 for an optimizer whose state has no copy of them."""
    found: list[Array] = []
    optax.tree.map_params(optimizer, found.append, control)
    leaves, structure = jax.tree.flatten(params)
    return jax.tree.unflatten(structure, found[:len(leaves)] or [jnp.zeros_like(leaf) for leaf in leaves])
