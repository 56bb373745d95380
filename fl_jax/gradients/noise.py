"""Gaussian noise for private gradients, from jax's own generator in a form that a CPU runs faster.

A private step draws a normal for each parameter, which costs more than the gradient of a small batch. jax.random.normal makes
several passes over memory for its generator, and so do XLA's logarithm and cosine; here generator and transformation are one
fused pass.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fl_jax.types import Array, Key, PyTree

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
# Cephes' single precision polynomials (Moshier 1989): logf on [sqrt(1/2), sqrt(2)), sinf and cosf on [-pi/4, pi/4].
_LOG = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1,
        -2.4999993993e-1, 3.3333331174e-1)
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)


def gaussian(key: Key, tree: PyTree, *, rounds: int = 20) -> PyTree:
    """Standard normals, float32, in the structure and shapes of a tree of arrays.

    Each is made of 64 random bits of its own, Threefry-2x32 in counter mode (Salmon et al. 2011, "Parallel random numbers: as
    easy as 1, 2, 3"): the generator, and the twenty rounds, of jax.random. Its counter is (element, leaf), its key 64 bits that
    are drawn from `key`, so that nothing repeats within a step. Box-Muller makes the normal; the largest is 6.8. Distribution and
    independence are tested. As with any floating-point noise, the guarantee is that of real numbers (Mironov 2012 on what low
    bits can tell).

    rounds: 13 are the fewest with which the authors' generator passes BigCrush (functools.partial(gaussian, rounds=13)); twenty,
    their margin of safety and the default here, is what is trusted to hide a record. optax.tree.random_like is the same with
    jax's own normals.
    """
    words = jax.random.bits(key, (2,), jnp.uint32)
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [_normals(words, i, leaf.shape, rounds) for i, leaf in enumerate(leaves)])


def _normals(words: Array, leaf: int, shape: tuple[int, ...], rounds: int) -> Array:
    element = lax.iota(jnp.uint32, math.prod(shape))
    return _box_muller(*threefry(words, element, jnp.full_like(element, leaf), rounds)).reshape(shape)


def threefry(words: Array, first: Array, second: Array, rounds: int = 20) -> tuple[Array, Array]:
    """Threefry-2x32: key uint32[2], counters uint32 of any one shape -> two random words for each."""
    keys = (words[0], words[1], words[0] ^ words[1] ^ jnp.uint32(_PARITY))
    first, second = first + keys[0], second + keys[1]
    for r in range(rounds):
        rotation = _ROTATIONS[r // 4 % 2][r % 4]
        first = first + second
        second = (second << jnp.uint32(rotation) | second >> jnp.uint32(32 - rotation)) ^ first
        if r % 4 == 3:
            group = r // 4 + 1
            first, second = first + keys[group % 3], second + keys[(group + 1) % 3] + jnp.uint32(group)
    return first, second


def _box_muller(radius: Array, angle: Array) -> Array:
    """uint32 words to sqrt(-2 log u) cos(2 pi v), with u in (0, 1] and v in [0, 1) (Box & Muller 1958)."""
    half = 2.0**-33  # the middle of the smallest interval: u is never 0
    log = _log(radius.astype(jnp.float32) * jnp.float32(2.0**-32) + jnp.float32(half))
    return jnp.sqrt(-2 * log) * _cosine(angle)


def _log(u: Array) -> Array:
    """The natural logarithm of u in (0, 1]: exponent times log 2, and a polynomial in the mantissa."""
    bits = lax.bitcast_convert_type(u, jnp.int32)
    exponent = bits - 0x3F3504F3 >> 23  # the float32 next to sqrt(1/2): mantissas lie around 1
    f = lax.bitcast_convert_type(bits - (exponent << 23), jnp.float32) - 1
    return f + (f * f * (f * _polynomial(_LOG, f) - 0.5) + exponent.astype(jnp.float32) * jnp.float32(np.log(2)))


def _cosine(angle: Array) -> Array:
    """The cosine of 2 pi angle / 2^32: two bits choose the quadrant, thirty the place in it, around its middle."""
    quadrant = angle >> jnp.uint32(30)
    x = lax.bitcast_convert_type(angle << jnp.uint32(2), jnp.int32).astype(jnp.float32) * jnp.float32(np.pi / 4 * 2.0**-31)
    square = x * x
    sine = x + x * square * _polynomial(_SIN, square)
    cosine = 1 - 0.5 * square + square * square * _polynomial(_COS, square)
    value = jnp.where(quadrant & jnp.uint32(1) == 1, sine, cosine)
    return jnp.where((quadrant + jnp.uint32(1)) & jnp.uint32(2) == 2, -value, value)


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    value = jnp.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        value = value * x + jnp.float32(c)
    return value
