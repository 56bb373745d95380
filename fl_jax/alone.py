"""One site as a client sees it, its keys of a round, and its round by itself, without an engine."""

from functools import partial

import jax
import jax.numpy as jnp

from fl_jax import trees
from fl_jax.types import Array, Batch, Client, Key, Metrics, PyTree, Site, Sites


def site_keys(key: Key, id: Array) -> Key:
    """The four keys of a site in a round: for the order of its records, its beginning, its steps, and the aggregator. key: the round's."""
    return jax.random.split(jax.random.fold_in(key, id), 4)


def site_at(sites: Sites, id: Array) -> Site:
    """Site `id` of these sites as a client sees it outside of a round, of which it has no steps to make."""
    return Site(id, sites.size[id], jnp.int32(0), partial(take_rows, sites, sites.offset[id]))


def alone(client: Client, key: Key, shared: PyTree, kept: PyTree, site: Site) -> tuple[PyTree, PyTree, Metrics]:
    """One site's round without an engine: (message, client_state, metrics), for models that a site makes for itself (fl_jax.deployment). The
    steps are those that the client's batches prescribe; none where there are no records."""
    steps = jnp.where(site.num_records > 0, client.batches.steps(site.num_records), 0).astype(jnp.int32)
    ordering, beginning, stepping, _ = site_keys(key, site.id)
    order = client.batches.order(ordering, jnp.maximum(site.num_records, 1))

    def step(t: Array, carry: PyTree) -> PyTree:
        index, mask = client.batches.draw(order, t)
        batch = Batch(*site.take(index), mask, client.batches.expected(order))
        return client.step(jax.random.fold_in(stepping, t), carry, shared, batch)

    carry = jax.lax.fori_loop(0, steps, step, client.begin(beginning, shared, kept, site._replace(num_steps=steps)))
    return client.end(carry, shared, kept)


def take_rows(sites: Sites, offset: Array, index: Array) -> tuple[PyTree, PyTree]:
    """(x, y) of the records at `index`, int32[...], of the site that begins at `offset`."""
    rows = trees.copy_rows((sites.x, sites.y), (offset + index).reshape(-1))
    return jax.tree.map(lambda leaf: leaf.reshape(*index.shape, *leaf.shape[1:]), rows)
