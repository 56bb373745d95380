"""What a site measures of the model that it was given, on all of its records, before it takes a step of the round."""

from collections.abc import Callable

import jax.numpy as jnp

from fl_jax import batches, clients
from fl_jax.alone import alone
from fl_jax.site_loss import site_loss
from fl_jax.types import Array, Batches, Gradient, Key, Model, PyTree, Site, Variables

Measure = Callable[[Key, Variables, Site], PyTree]
"""(key, what the site begins the round with, the site and its records) -> what it measures."""


def in_order(batch_size: int) -> Batches:
    """One pass over a site's records as they lie, for sums over all of them; batch_size bounds memory, no more. Further steps begin anew."""

    def draw(num_records: Array, t: Array) -> tuple[Array, Array]:
        position = t % -(-num_records // batch_size) * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
        return jnp.minimum(position, num_records - 1), (position < num_records).astype(jnp.float32)

    return batches.epochs(1, batch_size)._replace(order=lambda key, num_records: num_records, draw=draw)


def mean_loss(model: Model, chunk: int) -> Measure:
    """The site's mean loss, float32, in evaluation mode: running statistics and no dropout. See site_loss.site_loss, also for what it
    refuses."""
    loss = site_loss(model, chunk)
    return lambda key, variables, site: loss(variables, site)


def full_gradient(gradient: Gradient, batch_size: int) -> Measure:
    """The gradient of the site's mean loss, like the parameters: clients.full_gradient, in training mode (batches' own statistics)."""
    client = clients.full_gradient(gradient, in_order(batch_size))

    def measure(key: Key, variables: Variables, site: Site) -> PyTree:
        message, _, _ = alone(client, key, variables, (), site)
        return message.params

    return measure
