"""What a site does in a round: local training, and the one full gradient of FedSGD. Each is written for one site."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fl_jax import trees
from fl_jax.types import Array, Batch, Batches, Client, Gradient, IsLocal, Key, Metrics, Model, PyTree, Site, Variables


def nothing_local(path: tuple[str, ...], module: type) -> bool:
    """Every leaf is shared: the predicate of the global algorithms."""
    del path, module
    return False


def everything_local(path: tuple[str, ...], module: type) -> bool:
    """Every leaf stays at its site: nothing is sent, which is local-only training."""
    del path, module
    return True


class Training(NamedTuple):
    """What a site carries from step to step. loss: sum over records. records: how many were seen, padding not counted."""

    variables: Variables
    optimizer: PyTree
    loss: Array
    records: Array


def local_training(
    model: Model, gradient: Gradient, optimizer: optax.GradientTransformation, batches: Batches, *, is_local: IsLocal = nothing_local
) -> Client:
    """Trains from the broadcast variables with a fresh optimizer and sends (start - end) of what is shared.

    gradient: the oracle (fl_jax.gradients). optimizer: optax; its state lives for one round; a schedule counts the steps of the round.
    It is given the round's shared parameters as the extra argument `anchor` (None at local leaves). is_local: which leaves stay at the
    site between rounds, e.g. those of BatchNorm (fl_jax.norms); they train like the others. Metrics: "loss", the mean over the records
    seen while training, and "records".
    """
    stays = _stays(model, is_local)
    optimizer = optax.with_extra_args_support(optimizer)

    def init(variables: Variables) -> tuple[Variables, Variables]:
        kept, shared = trees.split(variables, stays)
        return shared, kept

    def begin(key: Key, shared: Variables, kept: Variables, site: Site) -> Training:
        del key, site
        variables = trees.merge(shared, kept)
        return Training(variables, optimizer.init(variables.params), jnp.float32(0), jnp.float32(0))

    def step(key: Key, carry: Training, shared: Variables, batch: Batch) -> Training:
        params, stats = carry.variables
        gradients, stats, metrics = gradient(key, params, stats, batch)
        updates, state = optimizer.update(gradients, carry.optimizer, params, anchor=shared.params)
        records = jnp.sum(batch.mask)
        variables = Variables(optax.apply_updates(params, updates), stats)
        return Training(variables, state, carry.loss + metrics["loss"] * records, carry.records + records)

    def end(carry: Training, shared: Variables, kept: Variables) -> tuple[Variables, Variables, Metrics]:
        del kept
        kept, trained = trees.split(carry.variables, stays)
        return optax.tree.sub(shared, trained), kept, _training_metrics(carry.loss, carry.records)

    return Client(init, begin, step, end, trees.merge, batches)


class Accumulation(NamedTuple):
    """The sum over records of gradients and losses, and how many records; the statistics of the last batch."""

    gradient: PyTree
    stats: PyTree
    loss: Array
    records: Array


def full_gradient(gradient: Gradient, batches: Batches) -> Client:
    """Sends the gradient of the site's mean loss at the broadcast parameters, summed up over its batches (FedSGD).

    The batch size bounds memory and, but for BatchNorm, does not change the message. Metrics as in `local_training`.
    """

    def begin(key: Key, shared: Variables, kept: PyTree, site: Site) -> Accumulation:
        del key, kept, site
        return Accumulation(optax.tree.zeros_like(shared.params), shared.stats, jnp.float32(0), jnp.float32(0))

    def step(key: Key, carry: Accumulation, shared: Variables, batch: Batch) -> Accumulation:
        gradients, stats, metrics = gradient(key, shared.params, carry.stats, batch)
        records = jnp.sum(batch.mask)
        total = jax.tree.map(lambda sum, leaf: sum + leaf * records, carry.gradient, gradients)
        return Accumulation(total, stats, carry.loss + metrics["loss"] * records, carry.records + records)

    def end(carry: Accumulation, shared: Variables, kept: PyTree) -> tuple[Variables, PyTree, Metrics]:
        mean = jax.tree.map(lambda leaf: leaf / jnp.maximum(carry.records, 1), carry.gradient)
        message = Variables(mean, optax.tree.sub(shared.stats, carry.stats))
        return message, kept, _training_metrics(carry.loss, carry.records)

    return Client(lambda variables: (variables, ()), begin, step, end, lambda shared, kept: shared, batches)


def _training_metrics(loss: Array, records: Array) -> Metrics:
    return {"loss": loss / jnp.maximum(records, 1), "records": records}


def _stays(model: Model, is_local: IsLocal):
    """is_local as a predicate of a key path alone: the class of the owning module is looked up in the model's table."""

    def stays(path: tuple[str, ...]) -> bool:
        for length in range(len(path) - 1, 0, -1):
            module = model.modules.get(path[1:length])
            if module is not None:
                return is_local(path, module)
        return is_local(path, object)

    return stays
