"""Model-contrastive training (MOON): a site's representation is drawn to the broadcast model's and away from that of its own last model."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fl_jax import trees
from fl_jax.clients import Kept
from fl_jax.models.bridge import zero_padding
from fl_jax.models.features import entering
from fl_jax.models.losses import masked_mean
from fl_jax.types import Array, Batch, Client, Gradient, Key, Metrics, Model, PyTree, Site, Variables


class Anchors(NamedTuple):
    """What representations are compared with, the state of the oracle in a round. broadcast: the model as the round began at the site.
    previous: that which the site made in its last round."""

    broadcast: Variables
    previous: Variables


class Previous(NamedTuple):
    """What a site keeps. model: of its last round. made: int32, 1 if there was one and 0 if not."""

    model: Variables
    made: Array


def contrastive(model: Model, head: str, mu: float | Array, tau: float | Array) -> Gradient:
    """The gradient of a batch's mean of loss + mu l, l = -log(e^(s / tau) / (e^(s / tau) + e^(s' / tau))): s and s' are the cosines between
    the record's representation z and what the broadcast model and the previous one make of the record (Li et al. 2021, eq. 3 and 5).

    z: what enters the module `head` (models.features). It and the loss are of one pass in training mode: BatchNorm with the batch's
    statistics, dropout. The two models that are compared with are in evaluation mode, with their own running statistics. Its state is
    `Anchors`, which `remembering` makes. Metrics: "loss", without l, and "contrast", the mean of l.
    """

    def compute(key: Key, state: Anchors, params: PyTree, stats: PyTree, batch: Batch) -> tuple[PyTree, Anchors, PyTree, Metrics]:
        x = zero_padding(batch.x, batch.mask)

        def of(variables: Variables) -> Array:
            return _unit(entering(head, lambda: model.predict(variables, x))[1])

        other = of(state.previous) - of(state.broadcast)

        def loss(params: PyTree) -> tuple[Array, tuple[PyTree, Metrics]]:
            (value, after), z = entering(head, lambda: model.loss(key, params, stats, batch))
            contrast = masked_mean(jax.nn.softplus(jnp.sum(_unit(z) * other, axis=1) / tau), batch.mask)
            return value + mu * contrast, (after, {"loss": value, "contrast": contrast})

        (_, (after, metrics)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return gradients, state, after, metrics

    return Gradient(lambda params: (), compute, ("loss", "contrast"))


def remembering(client: Client) -> Client:
    """`client`, of clients.local_training with a `contrastive` oracle, whose site keeps the model of its last round. In its first round the
    broadcast model stands for it, so that l is log 2 and has no slope."""

    def init(variables: Variables) -> tuple[PyTree, Kept]:
        shared, kept = client.init(variables)
        return shared, kept._replace(gradient=Previous(variables, jnp.int32(0)))

    def begin(key: Key, shared: PyTree, kept: Kept, site: Site) -> PyTree:
        carry = client.begin(key, shared, kept, site)
        before: Previous = kept.gradient
        return carry._replace(gradient=Anchors(carry.variables, trees.select(before.made > 0, before.model, carry.variables)))

    def end(carry: PyTree, shared: PyTree, kept: Kept) -> tuple[PyTree, Kept, Metrics]:
        message, after, metrics = client.end(carry, shared, kept)
        return message, after._replace(gradient=Previous(carry.variables, jnp.int32(1))), metrics

    def newcomer(key: Key, states: Kept) -> Kept:
        kept = client.newcomer(key, states)
        return kept._replace(gradient=kept.gradient._replace(made=jnp.int32(0)))

    return client._replace(init=init, begin=begin, end=end, newcomer=newcomer)


def _unit(z: Array) -> Array:
    """Rows of length 1; those shorter than 1e-8, as in torch's cosine, shorter. The gradient is finite at 0."""
    return z / jnp.sqrt(jnp.maximum(jnp.sum(z**2, axis=1, keepdims=True), 1e-16))
