"""The one bridge from a flax linen module to a Model: variables, training loss, prediction, and the table of its modules."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors as flax_errors
from flax.core import unfreeze

from fl_jax.errors import FlJaxError
from fl_jax.models.losses import Loss
from fl_jax.types import Array, Batch, Key, Model, PyTree, Variables

# Names that other code bases give to the same switch. A module that has one of these and no `train` would train in whatever
# mode its default says, silently.
_OTHER_SWITCHES = ("training", "is_training", "deterministic", "eval", "use_running_average")


def images_uint8(x: Array) -> Array:
    """uint8 pixels as float32 in [-1, 1): (x - 128) / 128."""
    return (x.astype(jnp.float32) - 128) / 128


def bridge(
    module: nn.Module,
    example_x: PyTree,
    loss: Loss,
    *,
    preprocess: Callable[[PyTree], PyTree] | None = None,
    name: str | None = None,
) -> Model:
    """Makes a Model of a flax linen module.

    module: called as module(x), with train=True or False if its `__call__` has an argument `train`, and in training with
        mask=float32[B] if it has an argument `mask`. BatchNorm layers get the mask in any case, so that padding rows are
        invisible.
    example_x: x of one batch [B, ...] (arrays or jax.ShapeDtypeStruct) as the data hold it; only shapes and dtypes are read.
    preprocess: applied to x first, e.g. `images_uint8`.

    In training the stream "dropout" and any other stream the module asks for come from the key of the call. Rows with mask 0 are
    replaced by zeros before the module sees them, so they may hold NaN. A batch of padding only has loss 0, gradient 0 and
    leaves the statistics as they are.

    Raises FlJaxError: the module has state beside "params" and "batch_stats"; its `__call__` needs other arguments, or names its
    training switch otherwise; it updates statistics or draws random numbers in evaluation mode; a BatchNorm sees inputs whose
    rows are not the batch's.
    """
    if not isinstance(module, nn.Module):
        raise FlJaxError("bridge takes an instance of a flax linen module, such as TwoNN(10); an nnx module goes to bridge_nnx.")
    flags = call_flags(type(module).__call__, 2)
    prepare = preprocess or (lambda x: x)
    evaluation: dict[str, Any] = {"train": False} if "train" in flags else {}
    example = one_row(example_x)

    def init_collections(key: Key) -> Mapping[str, Any]:
        params_key, other_key = jax.random.split(key)
        x = prepare(zeros(example))
        return module.init({"params": params_key, "dropout": other_key}, x, **evaluation)

    def init(key: Key) -> Variables:
        collections = unfreeze(nn.meta.unbox(init_collections(key)))
        return Variables(collections.get("params", {}), collections.get("batch_stats", {}))

    modules: dict[tuple[str, ...], type] = {}

    def record(next_call, args, kwargs, context):
        modules[context.module.path] = type(context.module)
        return next_call(*args, **kwargs)

    with nn.intercept_methods(record):
        collections = jax.eval_shape(init_collections, jax.random.key(0))
    unknown = sorted(set(collections) - {"params", "batch_stats"})
    if unknown:
        raise FlJaxError(
            f"{type(module).__name__} keeps state in the collections {unknown}, which no algorithm here would carry from step to "
            'step; keep state in "batch_stats" only, or use another module.'
        )

    def training_loss(key: Key, params: PyTree, stats: PyTree, batch: Batch) -> tuple[Array, PyTree]:
        default_key, dropout_key = jax.random.split(key)
        seen = visible_rows(batch.mask)
        arguments: dict[str, Any] = {"train": True} if "train" in flags else {}
        if "mask" in flags:
            arguments["mask"] = seen
        with nn.intercept_methods(_batch_norm_mask(seen)):
            outputs, updates = module.apply(
                {"params": params, "batch_stats": stats},
                zero_padding(prepare(batch.x), batch.mask),
                rngs={"params": default_key, "dropout": dropout_key},  # any other stream falls back on "params"
                mutable=["batch_stats"],
                **arguments,
            )
        value = loss.batch(outputs, batch.y, batch.mask)
        return value, keep_if_empty(batch.mask, unfreeze(updates).get("batch_stats", {}), stats)

    def predict(variables: Variables, x: PyTree) -> Any:
        collections = {"params": variables.params, "batch_stats": variables.stats}
        try:
            return module.apply(collections, prepare(x), **evaluation)
        except flax_errors.ModifyScopeVariableError as error:
            raise FlJaxError(
                f"{type(module).__name__} updates its statistics in evaluation mode; give its __call__ an argument `train` "
                "and its BatchNorm layers use_running_average=not train."
            ) from error
        except flax_errors.InvalidRngError as error:
            raise FlJaxError(
                f"{type(module).__name__} draws random numbers in evaluation mode; give its __call__ an argument `train` and let "
                "it draw only while that is True."
            ) from error

    jax.eval_shape(lambda key, x: predict(init(key), x), jax.random.key(0), example)
    return Model(init, training_loss, predict, loss.record, modules, name or type(module).__name__)


def owner(modules: Mapping[tuple[str, ...], type], leaf_path: tuple[str, ...]) -> type:
    """The class of the module that owns a leaf.

    modules: Model.modules. leaf_path: key path as strings, starting with "params" or "stats", e.g.
    ("params", "Dense_0", "kernel").
    Raises FlJaxError for a path without an owner.
    """
    path = tuple(leaf_path[1:])
    for length in range(len(path) - 1, -1, -1):
        if path[:length] in modules:
            return modules[path[:length]]
    raise FlJaxError(f'No module owns the leaf {leaf_path}: a path starts with "params" or "stats" and ends with a leaf.')


def call_flags(call: Callable[..., Any], positional: int) -> set[str]:
    """Which of "train" and "mask" a module's `__call__` takes; FlJaxError if it cannot be called as module(x) plus these.

    positional: how many leading arguments the bridge provides.
    """
    parameters = list(inspect.signature(call).parameters.values())
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    others = sorted(names & set(_OTHER_SWITCHES))
    if others and "train" not in names:
        raise FlJaxError(f"The module's __call__ names its training switch {others[0]!r}; name it `train` (True while training).")
    required = [
        p.name
        for p in parameters[positional:]
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != "train"
    ]
    if required:
        raise FlJaxError(
            f"The module's __call__ needs {required}; it may need only x, and `train` by name, and take `mask=None` (in "
            "evaluation there is no padding, and no mask)."
        )
    return names & {"train", "mask"}


def one_row(example_x: PyTree) -> PyTree:
    """Shapes and dtypes of a batch of one record, from an example batch [B, ...]; dtypes as jax holds them (float64: float32)."""
    for leaf in jax.tree.leaves(example_x):
        if not hasattr(leaf, "shape") or len(leaf.shape) == 0:
            raise FlJaxError("example_x must be a batch of records: arrays with a leading axis of records.")
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype)), example_x)


def zeros(shapes: PyTree) -> PyTree:
    """Arrays of zeros of the given shapes and dtypes."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def visible_rows(mask: Array) -> Array:
    """The mask as the module sees it: the batch's, or all ones where no row is active, since a mean over no rows is NaN."""
    return jnp.where(jnp.any(mask > 0), mask, jnp.ones_like(mask))


def zero_padding(x: PyTree, mask: Array) -> PyTree:
    """x with zeros in the rows whose mask is 0; NaN in a padding row would otherwise reach the gradient as 0 * NaN."""
    return jax.tree.map(lambda leaf: jnp.where(_rows_like(mask, leaf.ndim) > 0, leaf, jnp.zeros_like(leaf)), x)


def keep_if_empty(mask: Array, new: PyTree, old: PyTree) -> PyTree:
    """New statistics, or the old ones if no row of the batch is active."""
    active = jnp.any(mask > 0)
    return jax.tree.map(lambda a, b: jnp.where(active, a, b), new, old)


def batch_norm_rows(mask: Array, x: Array, axis: Any) -> Array:
    """The mask of a batch, shaped for a BatchNorm over x whose features lie on `axis`; FlJaxError where rows cannot be told."""
    feature_axes = {a % x.ndim for a in (axis if isinstance(axis, tuple | list) else (axis,))}
    if x.shape[0] != mask.shape[0] or 0 in feature_axes:
        raise FlJaxError(
            f"A BatchNorm sees an input of shape {x.shape} in a batch of {mask.shape[0]} records, so padding rows cannot be told "
            "from real ones; keep the records on axis 0, or give __call__ an argument `mask` and pass a mask to the BatchNorm."
        )
    return _rows_like(mask, x.ndim)


def _rows_like(mask: Array, ndim: int) -> Array:
    return mask.reshape(mask.shape + (1,) * (ndim - 1))


def _batch_norm_mask(mask: Array):
    """An interceptor that gives the batch's mask to every linen BatchNorm that measures statistics and was given no mask."""

    def interceptor(next_call, args, kwargs, context):
        layer = context.module
        if isinstance(layer, nn.BatchNorm) and context.method_name == "__call__" and kwargs.get("mask") is None:
            given = {**dict(zip(("x", "use_running_average"), args, strict=False)), **kwargs}
            frozen = given.get("use_running_average")
            if not (layer.use_running_average if frozen is None else frozen):
                kwargs = {**kwargs, "mask": batch_norm_rows(mask, given["x"], layer.axis)}
        return next_call(*args, **kwargs)

    return interceptor
