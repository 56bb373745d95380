"""The gradient of each record: its norms, and the sum over records after each was rescaled, with and without the gradients
themselves.

Every form sees one record at a time, as a batch of one, and is mapped over the batch: nothing that a network or a loss does can
let one record into another's gradient, so the bound on what a record adds holds for any model.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import tracers

from fl_jax import trees
from fl_jax.gradients.scaling import LARGEST
from fl_jax.types import Array, Batch, Key, Model, PyTree

Path = tuple[str, ...]


class Records(NamedTuple):
    """losses: float32[B]. norms: float32[B, G], of each record's gradient in each group of leaves; not finite where the gradient
    is not, or is above scaling.LARGEST.

    combine: (factors float32[B, G]) -> the sum of the gradients, each multiplied with its factors, like the parameters in
    float32. A record whose factors are 0 adds nothing, even where its gradient is not finite.
    """

    losses: Array
    norms: Array
    combine: Callable[[Array], PyTree]


Form = Callable[[Key, PyTree, PyTree, PyTree, PyTree, list[int]], Records]
"""(keys [B], params, stats, x [B, ...], y [B, ...], the group of each leaf of params) -> Records."""


def materialised(model: Model) -> Form:
    """Every record's whole gradient in memory, by vmap(grad): what every other form must equal."""

    def form(keys: Key, params: PyTree, stats: PyTree, x: PyTree, y: PyTree, groups: list[int]) -> Records:
        def gradient(key: Key, x: PyTree, y: PyTree) -> tuple[Array, PyTree]:
            return jax.value_and_grad(lambda params: _loss(model, key, params, stats, x, y))(params)

        losses, gradients = jax.vmap(gradient)(keys, x, y)
        leaves, structure = jax.tree.flatten(gradients)
        parts = [_Materialised(leaf.astype(jnp.float32)) for leaf in leaves]
        return _records(losses, parts, groups, structure)

    return form


def by_layers(model: Model) -> Form:
    """Dense layers without gradients of records, other leaves materialised, in one backward pass.

    A dense layer z = a W + b has the gradient a d^T for W and d for b, where d is the gradient of the loss with respect to z: the
    norms are |a| |d| and |d| (Goodfellow 2015, "Efficient per-example gradient computations"; "ghost clipping" of Li
    et al. 2022, "Large language models can be strong differentially private learners", section 4), and the rescaled sum is A^T (c
    D) from the same backward pass ("book-keeping", Bu et al. 2023, "Differentially private optimization on small model at large
    scale"). d is the gradient with respect to zeros added to z, which flax's interceptors do in the module as it is.

    So treated is a flax.linen.Dense that is called once with one row a record. A layer that sees several rows (a sequence, two
    calls) adds them up before the norm: there the product of Gram matrices would save memory, but its rounding grows where rows
    cancel, and records can be made so that their norm comes out too small. Such a layer is materialised, at the price of a plain
    gradient in arithmetic and of B gradients in memory, and so are convolutions (their kernels are small), all other layers, and
    every nnx module.
    """

    def form(keys: Key, params: PyTree, stats: PyTree, x: PyTree, y: PyTree, groups: list[int]) -> Records:
        flat, structure = jax.tree_util.tree_flatten_with_path(params)
        places = {trees.path_of(path): i for i, (path, _) in enumerate(flat)}
        leaves = [leaf for _, leaf in flat]
        layers = _dense_layers(model, params, stats, trees.row(x, jnp.int32(0)), trees.row(y, jnp.int32(0)), places)
        of_layers = {places[leaf] for layer in layers for leaf in _leaves_of(layer, places)}
        others = [i for i in range(len(leaves)) if i not in of_layers]

        def backward(key: Key, x: PyTree, y: PyTree):
            def loss(added: dict[Path, Array], trained: list[Array]) -> tuple[Array, dict[Path, Array]]:
                seen: dict[Path, Array] = {}
                merged = list(leaves)
                for i, leaf in zip(others, trained, strict=True):
                    merged[i] = leaf
                with nn.intercept_methods(partial(_add, added, seen)):
                    value = _loss(model, key, jax.tree.unflatten(structure, merged), stats, x, y)
                return value, {path: a.reshape(-1) for path, a in seen.items()}

            added = {path: jnp.zeros(like.shape, like.dtype) for path, like in layers.items()}
            return jax.value_and_grad(loss, (0, 1), has_aux=True)(added, [leaves[i] for i in others])

        (losses, inputs), (slopes, gradients) = jax.vmap(backward)(keys, x, y)
        parts: list[Any] = [None] * len(leaves)
        for i, gradient in zip(others, gradients, strict=True):
            parts[i] = _Materialised(gradient.astype(jnp.float32))
        for path, d in slopes.items():
            d = d.reshape(d.shape[0], -1)
            a_norm, d_norm = _norm(inputs[path]), _norm(d)
            for leaf in _leaves_of(path, places):
                kernel = leaf[-1] == "kernel"
                parts[places[leaf]] = _Product(inputs[path], d, a_norm * d_norm) if kernel else _Bias(d, d_norm)
        return _records(losses, parts, groups, structure)

    return form


def _loss(model: Model, key: Key, params: PyTree, stats: PyTree, x: PyTree, y: PyTree) -> Array:
    """The loss of one record."""
    x, y = jax.tree.map(lambda leaf: leaf[None], (x, y))
    return model.loss(key, params, stats, Batch(x, y, jnp.ones(1)))[0]


def _records(losses: Array, parts: list[Any], groups: list[int], structure: Any) -> Records:
    of_group: list[list[Array]] = [[] for _ in range(max(groups, default=0) + 1)]
    for part, group in zip(parts, groups, strict=True):
        of_group[group].append(part.norm)
    norms = jnp.stack([_norm(jnp.stack(norms, axis=1)) for norms in of_group], axis=1)

    def combine(factors: Array) -> PyTree:
        return jax.tree.unflatten(structure, [part.sum(factors[:, group]) for part, group in zip(parts, groups, strict=True)])

    return Records(losses, norms, combine)


class _Materialised:
    """A leaf's gradient for each record, [B, ...]."""

    def __init__(self, gradient: Array):
        self.gradient = gradient
        self.norm = jnp.sqrt(jnp.sum(gradient.reshape(gradient.shape[0], -1) ** 2, axis=1))

    def sum(self, factors: Array) -> Array:
        rows = self.gradient.reshape(self.gradient.shape[0], -1)  # a CPU is slow at products of more than two axes
        return _product(factors[:, None], _kept(factors, rows)).reshape(self.gradient.shape[1:])


class _Product:
    """The gradient a d^T of a kernel for each record: a [B, in], d [B, out]."""

    def __init__(self, a: Array, d: Array, norm: Array):
        self.a, self.d, self.norm = a, d, norm

    def sum(self, factors: Array) -> Array:
        return _product(_kept(factors, self.a), _kept(factors, self.d) * factors[:, None])


class _Bias:
    """The gradient d of a bias for each record, [B, out]."""

    def __init__(self, d: Array, norm: Array):
        self.d, self.norm = d, norm

    def sum(self, factors: Array) -> Array:
        return jnp.sum(_kept(factors, self.d) * factors[:, None], axis=0)


def _product(a: Array, b: Array) -> Array:
    """The sum over records of the products of their rows, in full precision: a GPU's shorter mantissas would let more than the
    bound through."""
    return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)


def _kept(factors: Array, rows: Array) -> Array:
    return jnp.where(factors.reshape(-1, *(1,) * (rows.ndim - 1)) > 0, rows, 0)


def _norm(rows: Array) -> Array:
    """The L2 norm of each row of [B, n], infinite above scaling.LARGEST and for NaN.

    Scaled, since a square that underflows, in a product with one that overflows, would hide a record of any length.
    """
    largest = jnp.max(jnp.abs(rows), axis=1)
    unit = jnp.where(largest > 0, largest, 1)
    norm = largest * jnp.sqrt(jnp.sum((rows / unit[:, None]) ** 2, axis=1))
    return jnp.where(largest < LARGEST, norm, jnp.inf)


def _leaves_of(layer: Path, places: dict[Path, int]) -> list[Path]:
    return [path for path in ((*layer, "kernel"), (*layer, "bias")) if path in places]


def _add(added: dict[Path, Array], seen: dict[Path, Array], next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """An interceptor that adds to the outputs of layers and keeps their inputs."""
    outputs = next_call(*args, **kwargs)
    path = context.module.path
    if context.method_name != "__call__" or path not in added:
        return outputs
    seen[path] = args[0]
    return outputs + added[path]


def _dense_layers(
    model: Model, params: PyTree, stats: PyTree, x: PyTree, y: PyTree, places: dict[Path, int]
) -> dict[Path, jax.ShapeDtypeStruct]:
    """The dense layers of which a d^T is the whole gradient, by path, with what they return for one record.

    Each must be called once, with one row, outside of any lifted transformation, with its parameters as they are in the tree; and
    the loss may depend on them through this call alone, for which the loss is traced without it.
    """
    leaves, structure = jax.tree.flatten(params)
    outputs: dict[Path, list[jax.ShapeDtypeStruct]] = {}
    unfit: set[Path] = set()

    def replace(here: Any, given: list[Array], next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, path = context.module, context.module.path
        if type(module) is not nn.Dense or path in unfit:
            return next_call(*args, **kwargs)
        plain = context.method_name == "__call__" and len(args) == 1 and not kwargs and here == tracers.current_trace()
        if not (plain and _is_plain_dense(module, args[0], given, places)):
            unfit.add(path)
            return next_call(*args, **kwargs)
        like = jax.ShapeDtypeStruct((*args[0].shape[:-1], module.features), jnp.float32)
        outputs.setdefault(path, []).append(like)
        return jnp.zeros(like.shape, like.dtype)

    def loss(given: list[Array], x: PyTree, y: PyTree) -> Array:
        with nn.intercept_methods(partial(replace, tracers.current_trace(), given)):
            return _loss(model, jax.random.key(0), jax.tree.unflatten(structure, given), stats, x, y)

    traced = jax.make_jaxpr(loss)(leaves, x, y).jaxpr
    used = {id(variable) for equation in traced.eqns for variable in equation.invars}

    def only_there(path: Path) -> bool:
        return not any(id(traced.invars[places[leaf]]) in used for leaf in _leaves_of(path, places))

    return {path: calls[0] for path, calls in outputs.items() if len(calls) == 1 and path not in unfit and only_there(path)}


def _is_plain_dense(module: nn.Dense, a: Any, given: list[Array], places: dict[Path, int]) -> bool:
    leaves = _leaves_of(module.path, places)
    if len(leaves) != 1 + module.use_bias or module.dot_general is not None or module.dot_general_cls is not None:
        return False
    own = all(module.get_variable("params", leaf[-1]) is given[places[leaf]] for leaf in leaves)
    kernel = given[places[leaves[0]]]
    float32 = all(array.dtype == jnp.float32 for array in (a, *(given[places[leaf]] for leaf in leaves)))
    one_row = a.size == a.shape[-1] and kernel.shape == (a.shape[-1], module.features)
    return own and float32 and one_row and module.dtype in (None, jnp.float32)
