"""Messages of fewer bits, with error feedback: what a site could not send this time it adds to its next message.

Only floating-point leaves are compressed. Statistics of BatchNorm go as they are, since a variance that is rounded may end below zero, and
so do scalars and whatever is not a float. Bits are those of a message as it would be packed, known from shapes alone.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fl_jax import trees
from fl_jax.errors import FlJaxError
from fl_jax.types import Array, Key, Metrics, PyTree, Uplink, uncompressed

Rule = Callable[[Key, list[Array]], list[Array]]
"""(key, float32 leaves) -> what arrives of them, in the same shapes."""


def quantize(levels: int, *, error_feedback: bool = False) -> Uplink:
    """QSGD: every coordinate of a leaf becomes one of 2 levels + 1 multiples of the leaf's largest one over `levels` (Alistarh et al. 2017,
    "QSGD: Communication-efficient SGD via gradient quantization and encoding", section 3.1, with the scaling by the largest coordinate of
    its section 5).

    Rounding is random, so that what arrives is the message in expectation. With error_feedback it is to the nearest level: random
    rounding may err by more than the message is long, and an error that is fed back must be shorter than what it is of.
    Bits: ceil(log2(2 levels + 1)) a coordinate and a float32 a leaf; the paper's Elias code needs fewer on average, but depends on data.
    Raises FlJaxError for less than one level.
    """
    if levels < 1:
        raise FlJaxError(f"A message can be quantized to 1 level or more on each side of 0, and not to {levels}.")

    def one(key: Key, leaf: Array) -> Array:
        largest = jnp.max(jnp.abs(leaf), initial=0.0)
        scaled = jnp.where(largest > 0, leaf / largest, 0) * levels
        shift = 0.5 if error_feedback else jax.random.uniform(key, leaf.shape)
        return largest * (jnp.floor(scaled + shift) / levels)

    def rule(key: Key, leaves: list[Array]) -> list[Array]:
        return [one(key, leaf) for key, leaf in zip(jax.random.split(key, len(leaves)), leaves, strict=True)]

    each = math.ceil(math.log2(2 * levels + 1))
    return _compression(rule, lambda sizes: sum(32 + each * size for size in sizes), error_feedback)


def top_k(share: float, *, error_feedback: bool = True) -> Uplink:
    """The largest coordinates of a message by magnitude, ceil(share d) of all d, and zeros for the others (Stich et al. 2018, "Sparsified SGD
    with memory", Algorithm 1, whose memory is the error feedback).

    Bits: 32 for each value that is sent, and for where it stands ceil(log2(d)) or, where that is less in all, one bit for each of the d
    coordinates. Raises FlJaxError for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise FlJaxError(f"The share of coordinates that are sent must be above 0 and at most 1, and is {share}.")

    def count(size: int) -> int:
        return math.ceil(share * size)

    def rule(key: Key, leaves: list[Array]) -> list[Array]:
        del key
        flat, restore = ravel_pytree(leaves)
        if not flat.size:
            return leaves
        _, places = jax.lax.top_k(jnp.abs(flat), count(flat.size))
        return restore(jnp.zeros_like(flat).at[places].set(flat[places]))

    def bits(sizes: list[int]) -> int:
        size = sum(sizes)
        return 32 * count(size) + min(count(size) * math.ceil(math.log2(max(size, 1))), size)

    return _compression(rule, bits, error_feedback)


def float16(*, error_feedback: bool = True) -> Uplink:
    """Every coordinate as an IEEE half-precision float; what is beyond its range becomes the largest, 65,504. Bits: 16 a coordinate."""
    most = float(jnp.finfo(jnp.float16).max)

    def rule(key: Key, leaves: list[Array]) -> list[Array]:
        del key
        within = [jnp.where(jnp.isfinite(leaf), jnp.clip(leaf, -most, most), leaf) for leaf in leaves]  # an infinity is to be seen
        return [leaf.astype(jnp.float16).astype(jnp.float32) for leaf in within]

    return _compression(rule, lambda sizes: 16 * sum(sizes), error_feedback)


def _compression(rule: Rule, bits: Callable[[list[int]], int], error_feedback: bool) -> Uplink:
    """The transform of a rule. bits: (sizes of the leaves) -> those of a message. State: what was not sent, float32; () without feedback.

    Metric: "compression_error", |what arrives - what was to be sent| / |what was to be sent|.
    """

    def init(shared: PyTree) -> PyTree:
        return [jnp.zeros(leaf.shape, jnp.float32) for leaf in _compressed(shared)[0]] if error_feedback else ()

    def apply(key: Key, state: PyTree, message: PyTree) -> tuple[PyTree, PyTree, Metrics]:
        leaves, rebuild = _compressed(message)
        wanted = [leaf.astype(jnp.float32) for leaf in leaves]
        if error_feedback:
            wanted = [leaf + missing for leaf, missing in zip(wanted, state, strict=True)]
        sent = [new.astype(leaf.dtype) for new, leaf in zip(rule(key, wanted), leaves, strict=True)]
        errors = [leaf - new.astype(jnp.float32) for leaf, new in zip(wanted, sent, strict=True)]
        share = _length(errors) / jnp.maximum(_length(wanted), jnp.finfo(jnp.float32).tiny)
        return rebuild(sent), errors if error_feedback else (), {"compression_error": share}

    def message_bits(shared: PyTree) -> int:
        leaves, rebuild = _compressed(shared)
        return bits([math.prod(leaf.shape) for leaf in leaves]) + uncompressed(rebuild([None] * len(leaves)))

    return Uplink(init, apply, bits=message_bits)


def _length(leaves: list[Array]) -> Array:
    return jnp.sqrt(sum((jnp.sum(leaf**2) for leaf in leaves), jnp.float32(0)))


def _compressed(tree: PyTree) -> tuple[list[Any], Callable[[list[Any]], PyTree]]:
    """The leaves that are compressed, and what puts others in their place (None takes a leaf out)."""

    def fits(leaf: Any) -> bool:
        return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim > 0

    leaves, structure = jax.tree.flatten(tree)
    chosen = jax.tree.leaves(trees.by_role(tree, fits, lambda _: False, fits))
    places = [i for i, is_chosen in enumerate(chosen) if is_chosen]

    def rebuild(new: list[Any]) -> PyTree:
        replaced = list(leaves)
        for i, leaf in zip(places, new, strict=True):
            replaced[i] = leaf
        return jax.tree.unflatten(structure, replaced)

    return [leaves[i] for i in places], rebuild
