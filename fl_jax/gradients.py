"""Gradient oracles: what a client calls for the gradient of a mini-batch. A private oracle is one more function of this type."""

import jax

from fl_jax.types import Batch, Gradient, Key, Metrics, Model, PyTree


def plain(model: Model) -> Gradient:
    """The gradient of the mean loss over the unmasked rows of a batch.

    Returns an oracle (key, params, stats, batch) -> (gradient like params, new stats, {"loss": scalar}). A batch without unmasked rows
    gives a zero gradient and leaves the statistics as they are.
    """

    def gradient(key: Key, params: PyTree, stats: PyTree, batch: Batch) -> tuple[PyTree, PyTree, Metrics]:
        def loss(params: PyTree) -> tuple[jax.Array, PyTree]:
            return model.loss(key, params, stats, batch)

        (value, stats_after), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return gradients, stats_after, {"loss": value}

    return gradient
