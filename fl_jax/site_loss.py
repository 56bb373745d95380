"""The loss of a model over all records of one site, for clients that look at it before their first step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fl_jax.errors import FlJaxError
from fl_jax.types import Array, Model, Site, Variables


def site_loss(model: Model, chunk: int) -> Callable[[Variables, Site], Array]:
    """(variables, site) -> the mean loss over the site's records in evaluation mode, float32; 0 for a site without records.

    chunk: records predicted at once, static. Raises FlJaxError for a model whose loss is not a mean over records, such as Cox's.
    """
    evaluate = model.evaluate
    if evaluate is None:
        raise FlJaxError(f"{model.name} has a loss of whole batches, which has no mean over records: use a model with a loss of each record.")

    def mean(variables: Variables, site: Site) -> Array:
        def add(k: Array, total: Array) -> Array:
            position = k * chunk + jnp.arange(chunk, dtype=jnp.int32)
            x, y = site.take(jnp.minimum(position, jnp.maximum(site.num_records - 1, 0)))
            losses = evaluate(model.predict(variables, x), y)
            return total + jnp.sum(jnp.where(position < site.num_records, losses, 0.0))

        total = jax.lax.fori_loop(0, -(-site.num_records // chunk), add, jnp.float32(0))
        return total / jnp.maximum(site.num_records, 1)

    return mean
