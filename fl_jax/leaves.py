"""A pytree as plain arrays by position, with a description of each leaf, and back: what a file format can hold.

Typed PRNG keys become their data, numbers become arrays without axes, arrays without elements become their description alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fl_jax.errors import FlJaxError
from fl_jax.types import PyTree

_NUMBERS = bool | int | float | complex


class Description(NamedTuple):
    """What must agree between a stored leaf and the one that it is restored into: its path in the tree, its shape and dtype."""

    path: str
    shape: list[int]
    dtype: str


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(path: Any, leaf: Any) -> Description:
    name = jax.tree_util.keystr(path) or "the tree"
    array = np.asarray(leaf) if isinstance(leaf, _NUMBERS) else leaf
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise FlJaxError(f"{name} is a {type(leaf).__name__}, not an array or a number; keep text and the like in meta.")
    if not _is_key(array) and array.dtype.kind in "OSUMm":
        raise FlJaxError(f"{name} is an array of {array.dtype}, not of numbers; keep text and the like in meta.")
    return Description(name, list(array.shape), str(array.dtype))


def describe(tree: PyTree) -> list[Description]:
    """The description of every leaf, in the tree's order. Raises FlJaxError, naming it, for one that is no array or number."""
    return [_describe(path, leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def to_arrays(tree: PyTree) -> dict[str, jax.Array | np.ndarray]:
    """The leaves that have elements, by position: {"0": array, ...}; key data uint32, numbers as NumPy arrays of shape ()."""
    arrays = [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in jax.tree.leaves(tree)]
    arrays = [array if isinstance(array, jax.Array) else np.asarray(array) for array in arrays]
    return {str(i): array for i, array in enumerate(arrays) if array.size}


def templates(like_tree: PyTree) -> dict[str, np.ndarray]:
    """Stand-ins for what `to_arrays` stored of a tree like this: NumPy arrays of its shapes and dtypes that take no memory."""
    return {str(i): array for i, array in enumerate(map(_template, jax.tree.leaves(like_tree))) if array.size}


def from_arrays(arrays: dict[str, np.ndarray], like_tree: PyTree) -> PyTree:
    """The inverse of `to_arrays`: the tree of like_tree's structure.

    Each leaf is of the kind of its counterpart (jax or NumPy array, PRNG key, number; a jax.ShapeDtypeStruct stands for a jax
    array), and on its devices where that is committed to some.
    """
    leaves, treedef = jax.tree.flatten(like_tree)
    return jax.tree.unflatten(treedef, [_place(arrays.get(str(i)), leaf) for i, leaf in enumerate(leaves)])


def _template(leaf: Any) -> np.ndarray:
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    elif isinstance(leaf, _NUMBERS):
        leaf = np.asarray(leaf)
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _place(array: np.ndarray | None, like: Any) -> Any:
    if array is None:  # without elements, it was not stored
        array = np.array(_template(like))
    if isinstance(like, np.generic):
        return array[()]
    if isinstance(like, _NUMBERS):
        return type(like)(array[()])
    if isinstance(like, np.ndarray):
        return array
    value = jnp.array(array)
    if _is_key(like):
        impl: list[Any] = []  # through a trace, since key_impl takes no jax.ShapeDtypeStruct
        jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), like)
        value = jax.random.wrap_key_data(value, impl=impl[0])
    # An array that was free to move must stay so: pinned to one device, it could not enter a program sharded over several.
    committed = like.sharding is not None if isinstance(like, jax.ShapeDtypeStruct) else like.committed
    return jax.device_put(value, like.sharding) if committed else value
