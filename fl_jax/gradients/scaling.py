"""How a record's gradient is made to fit a bound: cut as a whole, cut layer by layer, or brought to the bound whatever it was."""

from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax.numpy as jnp

from fl_jax.types import Array

_TINY = float(jnp.finfo(jnp.float32).tiny)
LARGEST = 1e37
"""Norms above count as infinite: 1 / norm would be so small that a CPU takes it for 0, and a quotient for anything."""


class Scaling(NamedTuple):
    """group: (key path of a leaf) -> what the leaves of one norm have in common. G groups share a bound C evenly: each has C /
    sqrt(G), so that the whole gradient has at most C.

    factor: (norm float32[...], bound float32) -> factors; whatever they are, none lets more than the bound through.
    """

    group: Callable[[tuple[str, ...]], Hashable]
    factor: Callable[[Array, Array], Array]


def whole(path: tuple[str, ...]) -> Hashable:
    """All leaves are one group."""
    del path
    return ()


def by_layer(path: tuple[str, ...]) -> Hashable:
    """The leaves of one module are a group, such as kernel and bias."""
    return path[:-1]


def cut(norm: Array, bound: Array) -> Array:
    """min(1, bound / norm): what is within the bound is left as it is."""
    return jnp.minimum(1.0, bound / jnp.maximum(norm, _TINY))


FLAT = Scaling(whole, cut)
"""One norm for the whole gradient, min(1, C / |g|) (Abadi et al. 2016, "Deep learning with differential privacy", Alg. 1)."""

PER_LAYER = Scaling(by_layer, cut)
"""A norm for each of L layers, each with the bound C / sqrt(L) (McMahan et al. 2018, "Learning differentially private recurrent
language models", per-layer clipping): the sensitivity and the noise are those of FLAT."""


def normalised(gamma: float | Array = 0.01) -> Scaling:
    """C / (|g| + gamma) whether |g| is above C or below (Bu et al. 2023, "Automatic clipping: differentially private deep
    learning made easier and stronger", AUTO-S, with its gamma = .01).

    C then is part of the learning rate and needs no tuning; a large gamma lets small gradients stay small.
    """
    return Scaling(whole, lambda norm, bound: bound / (norm + gamma))


def groups(scaling: Scaling, paths: list[tuple[str, ...]]) -> list[int]:
    """The number of each leaf's group, from 0."""
    names = [scaling.group(path) for path in paths]
    return [list(dict.fromkeys(names)).index(name) for name in names]


class Factors(NamedTuple):
    """factors: float32[B, G], what the gradients of B records are multiplied with, 0 where `finite` does not hold. fits: bool[B],
    every norm of the record was within its bound. finite: bool[B], every norm is finite and below LARGEST."""

    factors: Array
    fits: Array
    finite: Array


def factors(scaling: Scaling, norms: Array, bound: Array) -> Factors:
    """How the records with these norms, float32[B, G], are made to fit a bound."""
    share = bound / norms.shape[1] ** 0.5
    finite = jnp.all(norms < LARGEST, axis=1)
    factor = jnp.minimum(scaling.factor(norms, share), share / jnp.maximum(norms, _TINY))
    return Factors(jnp.where(finite[:, None], factor, 0.0), jnp.all(norms <= share, axis=1), finite)
