"""What optax lacks for federated learning: the proximal term, the server optimizers of FedOpt, and care for statistics."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fl_jax import trees
from fl_jax.types import Array, PyTree


def proximal(mu: float | Array | None) -> optax.GradientTransformationExtraArgs:
    """Adds mu (w - w_round) to the gradient: the gradient of FedProx's term mu/2 |w - w_round|^2 (Li et al. 2020, eq. 2).

    `update` takes the round's broadcast parameters as the extra argument `anchor`, which every client of fl_jax passes; so no lane
    keeps a copy of them. A leaf whose anchor is None (it stays at the site) is left alone. mu may be a tracer; None: it is the round's
    `term` (corrections.broadcast_pull).
    """

    def update(updates: PyTree, state: optax.EmptyState, params: PyTree = None, *, anchor: PyTree, term: PyTree = None, **_: PyTree):
        strength = term if mu is None else mu
        pulled = jax.tree.map(lambda g, w, a: g if a is None else g + strength * (w - a), updates, params, anchor)
        return pulled, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def add_term() -> optax.GradientTransformationExtraArgs:
    """Adds the round's constant `term`, an extra argument that fl_jax.corrections gives to every client's optimizer: control variates.

    Where it stands in a chain says to what it is added: before optax.sgd with momentum to the gradient, after optax.trace to the step. A
    leaf whose term is None (it stays at the site) is left alone.
    """

    def update(updates: PyTree, state: optax.EmptyState, params: PyTree = None, *, term: PyTree, **_: PyTree):
        del params
        return jax.tree.map(lambda g, t: g if t is None else g + t, updates, term), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def frozen(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`optimizer` with a state that does not change in a round: the round's `term` (corrections.frozen_state)."""

    def update(updates: PyTree, state: optax.EmptyState, params: PyTree = None, *, term: PyTree, **extra: PyTree):
        return optax.with_extra_args_support(optimizer).update(updates, term, params, **extra)[0], state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def during(optimizer: optax.GradientTransformation, begin: float | Array, end: float | Array) -> optax.GradientTransformationExtraArgs:
    """`optimizer` while the share of a round's steps that are done is in [begin, end); no update and an unchanged state otherwise.

    The share is the extra argument `progress`, which every client of fl_jax passes.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def update(updates: PyTree, state: PyTree, params: PyTree = None, *, progress: Array, **extra: PyTree):
        moved, after = optimizer.update(updates, state, params, progress=progress, **extra)
        now = (progress >= begin) & (progress < end)
        return jax.tree.map(lambda leaf: jnp.where(now, leaf, 0), moved), jax.tree.map(partial(jnp.where, now), after, state)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def only(optimizer: optax.GradientTransformation, chosen: Callable[[tuple[str, ...]], bool]) -> optax.GradientTransformation:
    """`optimizer` for the chosen parameters; the others stay as they are. chosen: of a key path that starts with "params", as
    clients.by_path makes it."""
    return optax.partition({True: optimizer, False: optax.set_to_zero()}, partial(chosen_leaves, chosen=chosen))


def chosen_leaves(params: PyTree, chosen: Callable[[tuple[str, ...]], bool]) -> PyTree:
    """bool for each parameter: whether `chosen` holds of its key path, which starts with "params"."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: chosen(("params", *trees.path_of(path))), params)


class MomentsState(NamedTuple):
    """First and second moment of the pseudo-gradient, each like the parameters."""

    first: PyTree
    second: PyTree


def scale_by_server_moments(
    second_moment: Callable[[Array, Array], Array], b1: float | Array, tau: float | Array
) -> optax.GradientTransformation:
    """m / (sqrt(v) + tau) with m <- b1 m + (1 - b1) g and v <- second_moment(v, g): Algorithm 2 of Reddi et al. 2021.

    Unlike optax.scale_by_adam there is no bias correction, and v starts at tau^2, both as published. b1 and tau may be tracers.
    """

    def init(params: PyTree) -> MomentsState:
        return MomentsState(optax.tree.zeros_like(params), jax.tree.map(lambda leaf: jnp.full_like(leaf, tau) ** 2, params))

    def update(updates: PyTree, state: MomentsState, params: PyTree = None):
        del params
        first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.first, updates)
        second = jax.tree.map(second_moment, state.second, updates)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + tau), first, second), MomentsState(first, second)

    return optax.GradientTransformation(init, update)


def averaging_statistics(
    optimizer: optax.GradientTransformation, others: optax.GradientTransformation | None = None
) -> optax.GradientTransformation:
    """`optimizer` for the parameters of every Variables in a tree, plain averaging for its statistics.

    others: for leaves outside of any Variables; by default `optimizer`. A server that optimized BatchNorm's running variance (Adam's sign-like step) would drive it below zero with an innocent loss.
    """

    def labels(tree: PyTree) -> PyTree:
        return trees.by_role(tree, lambda _: "optimized", lambda _: "averaged", lambda _: "others")

    return optax.partition({"optimized": optimizer, "averaged": optax.sgd(1.0), "others": others or optimizer}, labels)
