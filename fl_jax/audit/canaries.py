"""Canaries: records and clients whose presence is decided by a coin of the auditor, and what of a federation is left of them.

A canary is worst-case where nothing else touches what it touches: a record whose gradient is longer than the clip and orthogonal to the
others', a client whose message is a direction of its own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fl_jax.errors import FlJaxError
from fl_jax.types import Array, Client, Key, Metrics, PyTree, Site, Sites


def with_records(sites: Sites, id: int, x: PyTree, y: PyTree) -> Sites:
    """The sites with k more records at the end of site `id`: x [k, ...], y [k, ...], of the dtypes that are there.

    Rows of padding stay at the end. Raises FlJaxError for a site that is not there.
    """
    if not 0 <= id < sites.size.shape[0]:
        raise FlJaxError(f"There is no site {id} to plant records at: choose 0 to {sites.size.shape[0] - 1}.")
    count = jax.tree.leaves(x)[0].shape[0]
    at = int(sites.offset[id] + sites.size[id])

    def planted(table: Array, new: Array) -> Array:
        return jnp.concatenate([table[:at], jnp.asarray(new, table.dtype), table[at:]])

    new_x, new_y = jax.tree.map(planted, (sites.x, sites.y), (x, y))
    offset = jnp.where(sites.offset >= at, sites.offset + count, sites.offset).at[id].set(sites.offset[id])
    return Sites(new_x, new_y, offset, sites.size.at[id].add(count))


def only(sites: Sites, included: Array) -> Sites:
    """The sites with only the records where included, bool[R], holds; a pure function, so that runs with other coins are one program.

    Each site's remaining records come first in its rows, in their order, and its size is their number.
    """
    num_rows, num_sites = included.shape[0], sites.size.shape[0]
    row = jnp.arange(num_rows)
    owned = (row[:, None] >= sites.offset) & (row[:, None] < sites.offset + sites.size)  # [R, N]
    owner = jnp.where(owned.any(1), jnp.argmax(owned, axis=1), num_sites)
    kept = included & (owner < num_sites)
    size = jnp.zeros(num_sites, jnp.int32).at[owner].add(kept.astype(jnp.int32), mode="drop")
    before = jnp.cumsum(kept) - kept
    first = jnp.take(before, sites.offset, mode="clip")
    place = jnp.where(kept, jnp.take(sites.offset, owner, mode="clip") + before - jnp.take(first, owner, mode="clip"), num_rows)
    order = jnp.zeros(num_rows, jnp.int32).at[place].set(row.astype(jnp.int32), mode="drop")
    x, y = jax.tree.map(lambda leaf: leaf[order], (sites.x, sites.y))
    return Sites(x, y, sites.offset, size)


def blank(sites: Sites, rows: Array, present: Array) -> Sites:
    """The sites with zeros for features and label of those rows, int32[k], for which present, bool[k], does not hold; a pure function.

    A record of zeros stands for none where its gradient is 0, as in a linear model without a bias (the zero-out relation of Kairouz et al.
    2021, "Practical and private (deep) learning without sampling or shuffling"). Unlike `only` it leaves the number of records as it
    is, by which a private mean divides and which counts as public: so the score tells the record and not the number.
    """

    def kept(table: Array) -> Array:
        return table.at[rows].multiply(present.reshape(-1, *(1,) * (table.ndim - 1)).astype(table.dtype))

    x, y = jax.tree.map(kept, (sites.x, sites.y))
    return sites._replace(x=x, y=y)


class _Carry(NamedTuple):
    id: Array
    inner: PyTree


def with_clients(client: Client, messages: PyTree, first: int) -> Client:
    """The client, but that site first + i sends messages[i] whatever it trained: canaries among the clients.

    messages: like what the client sends, every leaf [k, ...]. Such sites need a record, or the engine takes them for absent. The
    aggregator treats their messages like all others: it clips them, and adds its noise to the sum.
    """
    count = jax.tree.leaves(messages)[0].shape[0]

    def begin(key: Key, shared: PyTree, kept: PyTree, site: Site) -> _Carry:
        return _Carry(site.id, client.begin(key, shared, kept, site))

    def step(key: Key, carry: _Carry, shared: PyTree, batch: Any) -> _Carry:
        return carry._replace(inner=client.step(key, carry.inner, shared, batch))

    def end(carry: _Carry, shared: PyTree, kept: PyTree) -> tuple[PyTree, PyTree, Metrics]:
        message, kept, metrics = client.end(carry.inner, shared, kept)
        canary = (carry.id >= first) & (carry.id < first + count)
        own = jax.tree.map(lambda leaf: leaf[jnp.clip(carry.id - first, 0, count - 1)], messages)
        return jax.tree.map(lambda a, b: jnp.where(canary, a, b), own, message), kept, metrics

    return client._replace(begin=begin, step=step, end=end)


def directions(key: Key, like: PyTree, count: int) -> PyTree:
    """`count` random directions like a pytree, of norm 1, every leaf [count, ...]: nearly orthogonal where there are many parameters
    (Andrew et al. 2023, "One-shot empirical privacy estimation for federated learning", section 3)."""

    def one(key: Key) -> PyTree:
        drawn = optax.tree.random_like(key, like, sampler=jax.random.normal)
        return optax.tree.scale(1 / optax.tree.norm(drawn), drawn)

    return jax.vmap(one)(jax.random.split(key, count))


def alignment(update: PyTree, canaries: PyTree) -> Array:
    """float32[k]: how far an update went along each canary, every leaf [k, ...]: the score of a white-box attack."""
    products = jax.tree.map(lambda a, b: jnp.sum(a[None] * b, axis=range(1, b.ndim)), update, canaries)
    return jnp.sum(jnp.stack(jax.tree.leaves(products)), axis=0)
