"""Whether a model mixes the records of a batch, so that no gradient belongs to one record alone, and which layer does it."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import tracers

from fl_jax.errors import FlJaxError
from fl_jax.norms import BATCH_NORMS
from fl_jax.types import Array, Batch, Model, PyTree

_INSTEAD = ("so that no gradient belongs to one record alone: take layers that treat each record by itself, such as GroupNorm in "
            "place of BatchNorm.")
_ROWS = 4
_DRAWS = 8
_ROUNDING = 200  # units of the last place of the loss
_CHECKED: WeakKeyDictionary[Callable[..., Any], set[Any]] = WeakKeyDictionary()
"""The shapes for which a loss was found to be a mean over records: arms of a study share a model, and a check takes seconds."""


class _Seen(NamedTuple):
    """What a module that was called takes and returns of the first record."""

    inputs: list[Array]
    outputs: list[Array]


def refuse_batch_layers(model: Model) -> None:
    """Raises FlJaxError for a model with a BatchNorm, and for a loss of the whole batch."""
    for path, module in model.modules.items():
        if issubclass(module, BATCH_NORMS):
            raise FlJaxError(f"The {module.__name__} {'/'.join(path) or model.name} mixes the records of a batch, {_INSTEAD}")
    if model.evaluate is None:
        raise FlJaxError(
            f"The loss of {model.name} is of the whole batch (Loss.record is None), as a Cox partial likelihood is: each record "
            "is in the others' terms, and bounding its gradient bounds nothing; take a loss that is a mean over records.")


def refuse_mixing(model: Model) -> Callable[[PyTree, Batch], None]:
    """A check (stats, batch), which raises FlJaxError, naming the layer, where the model's loss is not a mean over its records.

    The loss is computed on random records of the batch's shapes: exchanging one record must change the loss by the same whatever
    another record is, and must leave the first record's rows in every linen module as they are, bit for bit. Done once for each
    loss and shape, with concrete arrays even where the caller is being traced. What it cannot decide (a loss that is not finite on
    random records) it lets pass: a private gradient is bounded in any case, since its records never meet.
    """
    checked = _CHECKED.setdefault(model.loss, set())

    def check(stats: PyTree, batch: Batch) -> None:
        if jax.tree.leaves(stats):
            raise FlJaxError(
                f"{model.name} measures statistics of its records, which no noise would cover: use layers without, such as "
                "GroupNorm in place of BatchNorm.")
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), (batch.x, batch.y))
        leaves, structure = jax.tree.flatten(shapes)
        signature = (structure, *((leaf.shape, str(leaf.dtype)) for leaf in leaves))
        if signature in checked:
            return
        with jax.ensure_compile_time_eval():
            culprit = _mixing_layer(model, stats, shapes)
        if culprit is not None:
            raise FlJaxError(f"{culprit} mixes the records of a batch, {_INSTEAD}")
        checked.add(signature)

    return check


def _mixing_layer(model: Model, stats: PyTree, shapes: tuple[PyTree, PyTree]) -> str | None:
    names: list[str] = []

    def run(params: PyTree, records: tuple[PyTree, PyTree]) -> tuple[Array, list[_Seen]]:
        seen: list[_Seen] = []
        names.clear()
        with nn.intercept_methods(partial(_watch, tracers.current_trace(), names, seen)):
            value, _ = model.loss(jax.random.key(0), params, stats, Batch(records[0], records[1], jnp.ones(_ROWS)))
        return value, seen

    rng = np.random.default_rng(0)  # NumPy's, since every shape of jax's costs a compilation
    like = jax.eval_shape(model.init, jax.random.key(0)).params
    params = jax.tree.map(lambda leaf: _weights(rng, leaf.shape, leaf.dtype), like)
    draws = [records for _ in range(_DRAWS) for records in _corners(rng, shapes)]
    corners = jax.tree.map(lambda *leaves: np.stack(leaves), *draws)
    value, seen = jax.device_get(jax.jit(jax.vmap(run, (None, 0)))(params, corners))
    for name, (inputs, outputs) in zip(names, seen, strict=True):
        if np.any(_unchanged(inputs) & ~_unchanged(outputs)):
            return name
    neither, second, first, both = value.astype(np.float64).reshape(_DRAWS, 4).T
    with np.errstate(invalid="ignore"):
        rounding = _ROUNDING * float(jnp.finfo(value.dtype).eps) * np.max(np.abs([neither, second, first, both]), axis=0)
        mixes = np.any(np.abs(neither - second - first + both) > rounding)
    return f"{model.name}, in a layer that could not be told or in its loss," if mixes else None


def _weights(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.asarray(rng.normal(size=shape) / max(1, math.prod(shape[:-1])) ** 0.5, dtype)


def _corners(rng: np.random.Generator, shapes: tuple[PyTree, PyTree]) -> list[tuple[PyTree, PyTree]]:
    """A batch with neither, the second, the first, and both of its first two records exchanged for others."""
    one, other = _records(rng, shapes), _records(rng, shapes)

    def exchanged(*which: int) -> tuple[PyTree, PyTree]:
        rows = np.isin(np.arange(_ROWS), which)
        return jax.tree.map(lambda a, b: np.where(rows.reshape(-1, *(1,) * (a.ndim - 1)), b, a), one, other)

    return [exchanged(), exchanged(1), exchanged(0), exchanged(0, 1)]


def _records(rng: np.random.Generator, shapes: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
    """Records that most models take: normals; 0 and 1 for whole numbers and for y, which may be classes; any pixel."""

    def draw(leaf: jax.ShapeDtypeStruct, labels: bool) -> np.ndarray:
        shape = (_ROWS, *leaf.shape)
        if leaf.dtype == jnp.uint8 and not labels:
            return rng.integers(0, 256, shape, np.uint8)
        whole = labels or not jnp.issubdtype(leaf.dtype, jnp.inexact)
        return np.asarray(rng.integers(0, 2, shape) if whole else rng.normal(size=shape), leaf.dtype)

    x, y = shapes
    return jax.tree.map(partial(draw, labels=False), x), jax.tree.map(partial(draw, labels=True), y)


def _watch(here: Any, names: list[str], seen: list[_Seen], next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """An interceptor that keeps what every module makes of the first record; modules end before those that call them."""
    outputs = next_call(*args, **kwargs)
    if here == tracers.current_trace():  # what is traced apart, as in nn.scan, cannot be taken out
        module = context.module
        names.append(f"The {type(module).__name__} {'/'.join(module.path)}".rstrip())
        seen.append(_Seen(_first_rows((args, kwargs)), _first_rows(outputs)))
    return outputs


def _first_rows(tree: PyTree) -> list[Array]:
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    rows = [leaf for leaf in arrays if leaf.ndim and leaf.shape[0] == _ROWS]
    return [leaf[0] for leaf in rows if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]


def _unchanged(rows: list[np.ndarray]) -> np.ndarray:
    """bool[draws]: the first record's rows, each [4 draws, ...], are bit for bit the same whatever the second record is."""
    same = np.ones(_DRAWS, bool)
    for array in rows:
        corners = np.asarray(array).reshape(_DRAWS, 4, -1)
        same &= np.all((corners[:, 0] == corners[:, 1]) | (corners[:, 0] != corners[:, 0]), axis=1)  # NaN is no evidence
    return same
