"""Pytree helpers that optax.tree and jax.tree lack: key paths as strings, split and merge, row access, finiteness, size."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fl_jax.types import Array, PyTree, Variables, uncompressed


def path_of(key_path: tuple[Any, ...]) -> tuple[str, ...]:
    """The key path of a leaf as plain strings: ("params", "Dense_0", "kernel")."""
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in key_path)


def split(tree: PyTree, predicate: Callable[[tuple[str, ...]], bool]) -> tuple[PyTree, PyTree]:
    """Splits a tree in two of the same structure, (chosen, rest); None stands where the other half lives.

    predicate: (key path as strings) -> whether the leaf is chosen. Static: decided at trace time.
    """
    chosen = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf if predicate(path_of(path)) else None, tree)
    rest = jax.tree_util.tree_map_with_path(lambda path, leaf: None if predicate(path_of(path)) else leaf, tree)
    return chosen, rest


def merge(first: PyTree, second: PyTree) -> PyTree:
    """The inverse of `split`: takes each leaf from the half that has it."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None)


def by_role(tree: PyTree, params: Callable[[Any], Any], stats: Callable[[Any], Any], others: Callable[[Any], Any]) -> PyTree:
    """The tree with each leaf mapped by what it is: of the params of a Variables, of its stats, or of no Variables at all."""

    def node(part: PyTree) -> PyTree:
        if isinstance(part, Variables):
            return Variables(jax.tree.map(params, part.params), jax.tree.map(stats, part.stats))
        return others(part)

    return jax.tree.map(node, tree, is_leaf=lambda part: isinstance(part, Variables))


def row(tree: PyTree, index: Array) -> PyTree:
    """Row `index` (int32 scalar, clipped into range) of every leaf [n, ...]."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False), tree)


def set_row(tree: PyTree, index: Array, value: PyTree) -> PyTree:
    """Every leaf [n, ...] with row `index` (clipped into range) replaced by the leaf of `value`."""
    return jax.tree.map(lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, index, 0), tree, value)


def rows(tree: PyTree, indices: Array) -> PyTree:
    """Rows `indices` (int32[c]) of every leaf [n, ...]; an index out of range reads the nearest row."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, indices, axis=0, mode="clip"), tree)


def copy_rows(tree: PyTree, indices: Array) -> PyTree:
    """`rows`, in the form that is fastest for records: on the CPU a loop of row copies.

    XLA's cost model there takes a gather to touch its whole operand, and splits even ten rows of a large table over threads, which
    costs more than the rows.
    """

    def looped(tree: PyTree, indices: Array) -> PyTree:
        def copy(k: Array, out: PyTree) -> PyTree:
            return set_row(out, k, row(tree, indices[k]))

        out = jax.tree.map(lambda leaf: jnp.zeros((indices.shape[0], *leaf.shape[1:]), leaf.dtype), tree)
        return jax.lax.fori_loop(0, indices.shape[0], copy, out)

    return jax.lax.platform_dependent(tree, indices, cpu=looped, default=rows)


def set_rows(tree: PyTree, indices: Array, values: PyTree) -> PyTree:
    """Every leaf [n, ...] with rows `indices` replaced by `values` [c, ...]; an index out of range writes nothing."""
    return jax.tree.map(lambda leaf, new: leaf.at[indices].set(new, mode="drop"), tree, values)


def select(condition: Array, if_true: PyTree, if_false: PyTree) -> PyTree:
    """`if_true` where the scalar condition holds, else `if_false`, leaf by leaf; what is not chosen may hold NaN."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), if_true, if_false)


def all_finite(tree: PyTree) -> Array:
    """bool scalar: no leaf holds a NaN or an infinity."""
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack(finite)) if finite else jnp.bool_(True)


def num_bytes(tree: PyTree) -> int:
    """Bytes that the leaves of a tree of arrays or shapes take on the wire."""
    return uncompressed(tree) // 8
