"""Bounds on the L2 norm of what one unit adds to a sum: fixed, on a schedule, or following a quantile of the norms, which costs privacy.

A unit is what the mechanism protects: one record's gradient at a site (fl_jax.gradients), one client's message at the server
(fl_jax.aggregators). Both use these values.
"""

import math
from collections.abc import Callable
from numbers import Real
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fl_jax.errors import FlJaxError
from fl_jax.types import Array, Key, PyTree

_SMALLEST = 1e-30


class Clipping(NamedTuple):
    """How a bound moves, and what moving it costs.

    init:       () -> state
    bound:      (state) -> float32 scalar above 0, the bound on the norm in this step
    update:     (key, state, centred, expected) -> state. centred: float32, the sum over the units of the step of 1/2 where its norm was
                at most the bound, -1/2 where it was above; expected: float32, how many units a step has in expectation
    multiplier: (z) -> the noise multiplier, in bounds, that the clipped sum needs for the sum and `update` together to cost exactly one
                Gaussian of multiplier z; raises FlJaxError where there is none
    """

    init: Callable[[], PyTree]
    bound: Callable[[PyTree], Array]
    update: Callable[[Key, PyTree, Array, Array], PyTree]
    multiplier: Callable[[float], float]


def constant(bound: float | Array) -> Clipping:
    """The same bound in every step. Raises FlJaxError unless it is a number above 0 and finite."""
    if isinstance(bound, Clipping):
        raise FlJaxError("The clip is fixed here: give a number instead of a bound that may move.")
    _positive("bound", bound)
    return Clipping(lambda: (), lambda state: jnp.float32(bound), lambda key, state, centred, expected: state, lambda z: z)


def scheduled(schedule: optax.Schedule) -> Clipping:
    """A bound that is a function of the steps made so far, e.g. optax.cosine_decay_schedule(4.0, 1_000, alpha=.1), which starts high and
    tightens as training refines.

    schedule: (step int32) -> bound above 0. It looks at no record, and noise is in bounds: at a fixed multiplier it costs no privacy.
    """

    def update(key: Key, step: Array, centred: Array, expected: Array) -> Array:
        del key, centred, expected
        return step + 1

    return Clipping(lambda: jnp.int32(0), lambda step: jnp.asarray(schedule(step), jnp.float32), update, lambda z: z)


def quantile(
    initial: float | Array, count_noise: float, *, target: float | Array = 0.5, learning_rate: float | Array = 0.2,
    lowest: float | Array = 0.0, highest: float | Array = math.inf,
) -> Clipping:
    """A bound that follows the `target` quantile of the norms: C <- C exp(-eta (b - gamma)), b the noisy share of norms at most C (Andrew
    et al. 2021, "Differentially private learning with adaptive clipping", Algorithm 1; eta = .2 and gamma = .5 are its defaults).

    initial: the first bound. count_noise: standard deviation of the noise on the number of norms at most C; the paper takes a
    twentieth of the expected number of units. lowest, highest: between which the bound stays; a lowest one keeps a site whose gradients
    vanish from adding noise in proportion to nothing.

    Guarantee: each unit moves the centred count by 1/2, so that the count is a Gaussian mechanism of multiplier 2 count_noise; with the
    sum at multiplier z_delta = (z^-2 - (2 count_noise)^-2)^(-1/2) both together are exactly one of multiplier z (Theorem 1), under
    add-or-remove-one and, both doubled, under replace-one. Raises FlJaxError where 2 count_noise <= z: no noise on the sum would do.
    """
    _positive("initial", initial)
    _positive("count_noise", count_noise)
    if isinstance(target, Real) and not 0 < target < 1:
        raise FlJaxError(f"target is the share of norms below the bound, between 0 and 1, and is {target}.")
    if isinstance(lowest, Real) and isinstance(highest, Real) and not 0 <= lowest < highest:
        raise FlJaxError(f"The bound must stay between lowest and highest, which are {lowest} and {highest}.")

    def within(bound: Array) -> Array:
        return jnp.clip(bound, jnp.maximum(lowest, _SMALLEST), highest)  # from 0 it would never rise again

    def update(key: Key, bound: Array, centred: Array, expected: Array) -> Array:
        share = (centred + count_noise * jax.random.normal(key)) / expected + 0.5
        return within(bound * jnp.exp(-learning_rate * (share - target)))

    def multiplier(z: float) -> float:
        if not isinstance(z, Real) or not isinstance(count_noise, Real):
            raise FlJaxError("A noise multiplier must be a number known outside of jit and vmap to be shared with the noise of the count.")
        if not 2 * count_noise > z:
            raise FlJaxError(
                f"Noise of {count_noise:g} on the number of norms below the bound costs more than the whole multiplier {z:g} allows: "
                f"give a count_noise above {z / 2:g}.")
        return (z**-2 - (2 * count_noise) ** -2) ** -0.5 if z > 0 else 0.0

    return Clipping(lambda: within(jnp.float32(initial)), lambda bound: bound, update, multiplier)


def clip(bound: Array, tree: PyTree) -> tuple[PyTree, Array]:
    """The tree in float32, scaled down where its L2 norm is above the bound, and that norm; zeros where the norm is not finite.

    So the result has a norm of at most the bound (by float32) whatever the tree holds: NaN, infinities, or numbers whose squares overflow.
    """
    tree = optax.tree.cast(tree, jnp.float32)  # a norm of few bits would let more than the bound through
    norm = optax.tree.norm(tree)
    scale = jnp.minimum(1.0, bound / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
    # a norm that overflows makes the scale 0, and 0 * inf would be NaN
    return jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(norm), leaf * scale, 0), tree), norm


def _positive(name: str, value: float | Array) -> None:
    if isinstance(value, Real) and not 0 < value < math.inf:
        raise FlJaxError(f"{name} must be above 0 and finite, and is {value}.")
