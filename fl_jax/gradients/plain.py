"""The gradient of the mean loss of a mini-batch, without privacy: the reference of every other oracle."""

import jax

from fl_jax.types import Batch, Gradient, Key, Metrics, Model, PyTree


def plain(model: Model) -> Gradient:
    """The gradient of the mean loss over the unmasked rows of a batch; metric: "loss".

    A batch without unmasked rows gives a zero gradient and leaves the statistics as they are.
    """

    def compute(key: Key, state: PyTree, params: PyTree, stats: PyTree, batch: Batch) -> tuple[PyTree, PyTree, PyTree, Metrics]:
        def loss(params: PyTree) -> tuple[jax.Array, PyTree]:
            return model.loss(key, params, stats, batch)

        (value, stats_after), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return gradients, state, stats_after, {"loss": value}

    return Gradient(lambda params: (), compute)
