"""What a site does in a round: local training, the one full gradient of FedSGD, and what is done to a message before it leaves. Each is
written for one site."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp
import optax

from fl_jax import trees
from fl_jax.errors import FlJaxError
from fl_jax.types import (
    Array,
    Batch,
    Batches,
    Client,
    Gradient,
    IsLocal,
    Key,
    Metrics,
    Model,
    PyTree,
    Site,
    Uplink,
    Variables,
    mean_state,
)


def nothing_local(path: tuple[str, ...], module: type) -> bool:
    """Every leaf is shared: the predicate of the global algorithms."""
    del path, module
    return False


def everything_local(path: tuple[str, ...], module: type) -> bool:
    """Every leaf stays at its site: nothing is sent, which is local-only training."""
    del path, module
    return True


def anothers(key: Key, clients: PyTree) -> PyTree:
    """The state of one of the sites, drawn by chance. clients: their states [N, ...]."""
    count = jax.tree.leaves(clients)[0].shape[0]
    return trees.row(clients, jax.random.randint(key, (), 0, count))


class Kept(NamedTuple):
    """What a site keeps between rounds. leaves: of its variables, those that stay. gradient: the state of its oracle."""

    leaves: Variables
    gradient: PyTree


class Training(NamedTuple):
    """What a site carries from step to step. gradient: the oracle's state. sums: of its metrics over records. records: how many were
    seen, padding not counted. steps, planned: int32, made so far and in this round. term: like the parameters, for
    transforms.add_term (fl_jax.corrections); None without."""

    variables: Variables
    optimizer: PyTree
    gradient: PyTree
    sums: Metrics
    records: Array
    steps: Array
    planned: Array
    term: PyTree = None


def local_training(
    model: Model, gradient: Gradient, optimizer: optax.GradientTransformation, batches: Batches, *, is_local: IsLocal = nothing_local
) -> Client:
    """Trains from the broadcast variables with a fresh optimizer and sends (start - end) of what is shared.

    gradient: the oracle (fl_jax.gradients); its state stays at the site. optimizer: optax; its state lives for one round; a schedule
    counts the steps of the round. It is given as extra arguments the round's shared parameters, `anchor` (None at local leaves), the share of
    the round's steps that are done, `progress`, and the carry's `term`.
    is_local: which leaves stay at the site between rounds, e.g. those of BatchNorm (fl_jax.norms); they train like the others. Where
    nothing is shared, a newcomer begins with the model of a site drawn by chance: a mean of models that never met is none.
    Metrics: the oracle's, as means over the records seen while training, and "records".
    """
    stays = by_path(model, is_local)
    optimizer = optax.with_extra_args_support(optimizer)

    def init(variables: Variables) -> tuple[Variables, Kept]:
        kept, shared = trees.split(variables, stays)
        return shared, Kept(kept, gradient.init(variables.params))

    def begin(key: Key, shared: Variables, kept: Kept, site: Site) -> Training:
        del key
        variables = trees.merge(shared, kept.leaves)
        return Training(variables, optimizer.init(variables.params), kept.gradient, _no_metrics(gradient), jnp.float32(0), jnp.int32(0),
                        site.num_steps)

    def step(key: Key, carry: Training, shared: Variables, batch: Batch) -> Training:
        params, stats = carry.variables
        gradients, state, stats, metrics = gradient.compute(key, carry.gradient, params, stats, batch)
        progress = carry.steps / jnp.maximum(carry.planned, 1)
        updates, optimizer_state = optimizer.update(
            gradients, carry.optimizer, params, anchor=shared.params, progress=progress, term=carry.term)
        sums, records = _add_metrics(carry.sums, metrics, batch)
        variables = Variables(optax.apply_updates(params, updates), stats)
        return carry._replace(variables=variables, optimizer=optimizer_state, gradient=state, sums=sums, records=carry.records + records,
                              steps=carry.steps + 1)

    def end(carry: Training, shared: Variables, kept: Kept) -> tuple[Variables, Kept, Metrics]:
        del kept
        leaves, trained = trees.split(carry.variables, stays)
        return optax.tree.sub(shared, trained), Kept(leaves, carry.gradient), _training_metrics(carry.sums, carry.records)

    def model_of_site(shared: Variables, kept: Kept) -> Variables:
        return trees.merge(shared, kept.leaves)

    return Client(init, begin, step, end, model_of_site, batches, partial(batches.account, gradient.event),
                  newcomer=anothers if is_local is everything_local else mean_state)


class Accumulation(NamedTuple):
    """The sum over records of gradients and metrics, and how many records; the statistics of the last batch."""

    gradient: PyTree
    stats: PyTree
    sums: Metrics
    records: Array


def full_gradient(gradient: Gradient, batches: Batches) -> Client:
    """Sends the gradient of the site's mean loss at the broadcast parameters, summed up over its batches (FedSGD).

    gradient: an oracle without state. The batch size bounds memory and, but for BatchNorm, does not change the message. Metrics as in
    `local_training`. Raises FlJaxError for a private oracle: its noise would be added once a batch, and its denominator lost.
    """
    if gradient.event != dp_accounting.NonPrivateDpEvent():
        raise FlJaxError("A full gradient, a sum over batches, is not a private mechanism: give the private gradient to fedavg, with one step a round.")

    def begin(key: Key, shared: Variables, kept: PyTree, site: Site) -> Accumulation:
        del key, kept, site
        return Accumulation(optax.tree.zeros_like(shared.params), shared.stats, _no_metrics(gradient), jnp.float32(0))

    def step(key: Key, carry: Accumulation, shared: Variables, batch: Batch) -> Accumulation:
        gradients, _, stats, metrics = gradient.compute(key, gradient.init(shared.params), shared.params, carry.stats, batch)
        sums, records = _add_metrics(carry.sums, metrics, batch)
        total = jax.tree.map(lambda sum, leaf: sum + leaf * records, carry.gradient, gradients)
        return Accumulation(total, stats, sums, carry.records + records)

    def end(carry: Accumulation, shared: Variables, kept: PyTree) -> tuple[Variables, PyTree, Metrics]:
        mean = jax.tree.map(lambda leaf: leaf / jnp.maximum(carry.records, 1), carry.gradient)
        message = Variables(mean, optax.tree.sub(shared.stats, carry.stats))
        return message, kept, _training_metrics(carry.sums, carry.records)

    return Client(lambda variables: (variables, ()), begin, step, end, lambda shared, kept: shared, batches)


class Sending(NamedTuple):
    """What a client with an uplink keeps between rounds, or carries within one. client: its own. uplink: the state, or this round's key."""

    client: PyTree
    uplink: PyTree


def uplink(client: Client, transform: Uplink) -> Client:
    """`client`, whose messages go through `transform` before they leave the site (fl_jax.uplink); its metrics beside the client's own.

    Record-level event: the client's own where it is private, since what is done to its message afterwards costs nothing more; else the
    transform's, which holds for all records of the site together, and so for one. The transform's is also the client-level event of the
    algorithm, unless the aggregator has one of its own.
    """

    def init(variables: Variables) -> tuple[PyTree, Sending]:
        shared, kept = client.init(variables)
        return shared, Sending(kept, transform.init(shared))

    def begin(key: Key, shared: PyTree, kept: Sending, site: Site) -> Sending:
        own, later = jax.random.split(key)
        return Sending(client.begin(own, shared, kept.client, site), later)

    def step(key: Key, carry: Sending, shared: PyTree, batch: Batch) -> Sending:
        return carry._replace(client=client.step(key, carry.client, shared, batch))

    def end(carry: Sending, shared: PyTree, kept: Sending) -> tuple[PyTree, Sending, Metrics]:
        message, own, metrics = client.end(carry.client, shared, kept.client)
        message, state, more = transform.apply(carry.uplink, kept.uplink, message)
        return message, Sending(own, state), metrics | more

    def event(num_records: int) -> dp_accounting.DpEvent:
        own = client.event(num_records)
        return transform.event if own == dp_accounting.NonPrivateDpEvent() else own

    def adapt(key: Key, shared: PyTree, kept: Sending, site: Site) -> Variables:
        return client.model(shared, kept.client) if client.adapt is None else client.adapt(key, shared, kept.client, site)

    def newcomer(key: Key, states: Sending) -> Sending:
        return Sending(client.newcomer(key, states.client), jax.tree.map(jnp.zeros_like, trees.row(states.uplink, jnp.int32(0))))

    return Client(init, begin, step, end, lambda shared, kept: client.model(shared, kept.client), client.batches, event, transform.event,
                  transform.bits, None if client.adapt is None else adapt, newcomer)


def _no_metrics(gradient: Gradient) -> Metrics:
    return {name: jnp.float32(0) for name in gradient.metrics}


def _add_metrics(sums: Metrics, metrics: Metrics, batch: Batch) -> tuple[Metrics, Array]:
    """The sums over records with those of one more batch, and how many records it has."""
    records = jnp.sum(batch.mask)
    return {name: sums[name] + metrics[name] * records for name in sums}, records


def _training_metrics(sums: Metrics, records: Array) -> Metrics:
    return {name: value / jnp.maximum(records, 1) for name, value in sums.items()} | {"records": records}


def by_path(model: Model, is_local: IsLocal) -> Callable[[tuple[str, ...]], bool]:
    """is_local as a predicate of a key path alone: the class of the owning module is looked up in the model's table."""

    def stays(path: tuple[str, ...]) -> bool:
        for length in range(len(path) - 1, 0, -1):
            module = model.modules.get(path[1:length])
            if module is not None:
                return is_local(path, module)
        return is_local(path, object)

    return stays
