"""The bridge for flax nnx modules: objects with state become the same pure functions that the linen bridge gives.

Every part of the state (parameters, statistics, random state) is an argument of each call, and the object is built anew from them
inside it: nnx raises TraceContextError when a part is closed over within `vmap(grad(...))`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from fl_jax.errors import FlJaxError
from fl_jax.models.bridge import batch_norm_rows, call_flags, keep_if_empty, one_row, visible_rows, zero_padding, zeros
from fl_jax.models.losses import Loss
from fl_jax.types import Array, Batch, Key, Model, PyTree, Variables

FlatState = list[tuple[tuple[Any, ...], nnx.Variable]]


class _MaskedBatchNorm(nnx.BatchNorm):
    """A BatchNorm with the batch's mask as its default mask; `_rows` (x -> mask) is set on the object for one call."""

    _rows: Callable[[Array], Array]

    def __call__(self, x, use_running_average=None, *, mask=None):
        rows = self._rows(x) if mask is None else mask
        return super().__call__(x, use_running_average, mask=rows.astype(bool))  # nnx takes no float mask, unlike linen


def bridge_nnx(
    make: Callable[[nnx.Rngs], nnx.Module],
    example_x: PyTree,
    loss: Loss,
    *,
    preprocess: Callable[[PyTree], PyTree] | None = None,
    name: str | None = None,
) -> Model:
    """Makes a Model of a flax nnx module.

    make: (nnx.Rngs) -> module, called as module(x), with mask=float32[B] in training if its `__call__` has an argument `mask`.
        Training and evaluation are nnx's own modes, `module.train()` and `module.eval()`.
    example_x, preprocess and the handling of padding: as in `bridge`.

    params are the nnx.Param, stats the nnx.BatchStat, both as nested dicts with string keys. Random state is built from the key
    of each call, so dropout is keyed by client and step.

    Raises FlJaxError: the module has state of another kind; its `__call__` needs other arguments than x and mask, or has an
    argument `train`; a subclass of nnx.BatchNorm is used without a mask of its own; a BatchNorm's rows are not the batch's.
    """
    prepare = preprocess or (lambda x: x)
    example = one_row(example_x)

    def build(key: Key) -> nnx.Module:
        params_key, other_key = jax.random.split(key)
        return make(nnx.Rngs(other_key, params=params_key))

    abstract = nnx.eval_shape(lambda: build(jax.random.key(0)))
    flags = call_flags(type(abstract).__call__, 2)
    if "train" in flags:
        raise FlJaxError(f"{type(abstract).__name__}.__call__ has an argument `train`; nnx modules have .train() and .eval().")
    subclasses = sorted({type(m).__name__ for _, m in nnx.iter_modules(abstract) if _is_other_batch_norm(m)})
    if subclasses and "mask" not in flags:
        raise FlJaxError(
            f"{subclasses} extend nnx.BatchNorm, and padding would enter their statistics; give the module's __call__ an "
            "argument `mask` and pass it on to them, or use nnx.BatchNorm itself."
        )
    modules = {_strings(path): type(module) for path, module in nnx.iter_modules(abstract)}
    graph, *parts = nnx.split(abstract, nnx.Param, nnx.BatchStat, nnx.RngState, ...)
    params_like, stats_like, random_like, other = (list(nnx.to_flat_state(part)) for part in parts)
    if other:
        kinds = sorted({type(variable).__name__ for _, variable in other})
        raise FlJaxError(
            f"{type(abstract).__name__} keeps state of the kinds {kinds}, which no algorithm here would carry from step to step; "
            "keep trained state in nnx.Param and measured state in nnx.BatchStat only."
        )

    def variables_of(module: nnx.Module) -> Variables:
        return Variables(_nested(nnx.state(module, nnx.Param)), _nested(nnx.state(module, nnx.BatchStat)))

    def assemble(key: Key, params: PyTree, stats: PyTree) -> nnx.Module:
        state = _filled(params_like, params) + _filled(stats_like, stats) + _keyed(random_like, key)
        return nnx.merge(graph, nnx.from_flat_state(state))

    def init(key: Key) -> Variables:
        return variables_of(build(key))

    def training_loss(key: Key, params: PyTree, stats: PyTree, batch: Batch) -> tuple[Array, PyTree]:
        module = assemble(key, params, stats)
        module.train()
        seen = visible_rows(batch.mask)
        for _, layer in nnx.iter_modules(module):
            if type(layer) is nnx.BatchNorm:  # the object lives for this call only, so its class may change
                layer.__class__ = _MaskedBatchNorm
                cast(_MaskedBatchNorm, layer)._rows = partial(_rows_on, seen, layer.axis)
        outputs = module(zero_padding(prepare(batch.x), batch.mask), **({"mask": seen} if "mask" in flags else {}))
        new_stats = _nested(nnx.state(module, nnx.BatchStat))
        return loss.batch(outputs, batch.y, batch.mask), keep_if_empty(batch.mask, new_stats, stats)

    def predict(variables: Variables, x: PyTree) -> Array:
        module = assemble(jax.random.key(0), variables.params, variables.stats)  # nothing is random in evaluation mode
        module.eval()
        return module(prepare(x))

    jax.eval_shape(lambda key: predict(init(key), zeros(example)), jax.random.key(0))
    return Model(init, training_loss, predict, loss.record, modules, name or type(abstract).__name__)


def _rows_on(mask: Array, axis: Any, x: Array) -> Array:
    return batch_norm_rows(mask, x, axis)


def _is_other_batch_norm(module: Any) -> bool:
    return isinstance(module, nnx.BatchNorm) and type(module) is not nnx.BatchNorm


def _strings(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(part) for part in path)


def _nested(state: nnx.State) -> PyTree:
    """An nnx state as nested dicts of arrays; the integer keys of lists become strings, as in every key path here."""
    nested: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        *above, last = _strings(path)
        node = nested
        for part in above:
            node = node.setdefault(part, {})
        node[last] = variable[...]
    return nested


def _filled(like: FlatState, nested: PyTree) -> FlatState:
    """The flat nnx state `like` with the values of nested dicts."""
    filled = []
    for path, variable in like:
        value = nested
        for part in _strings(path):
            value = value[part]
        filled.append((path, variable.replace(value)))
    return filled


def _keyed(like: FlatState, key: Key) -> FlatState:
    """The random state `like` at the start of a call: every stream with a key of its own and a count of zero."""
    keyed = []
    for number, (path, variable) in enumerate(like):
        if isinstance(variable, nnx.RngKey):
            keyed.append((path, variable.replace(jax.random.fold_in(key, number))))
        else:
            keyed.append((path, variable.replace(jnp.zeros(variable.shape, variable.dtype))))
    return keyed
