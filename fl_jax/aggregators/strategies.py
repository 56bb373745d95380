"""Noise that is correlated over rounds, so that much of it cancels in the sum of all rounds: trees with restarts, and banded matrices.

Training is a running sum: after round t the server has A x, A the lower triangle of ones, x the rounds' sums. With A = B C it is enough to
make C x private, by independent noise Z on its rows (Denisov et al. 2022, "Improved differential privacy for SGD via optimal private
linear operators on adaptive streams"): the running sum then has the noise B Z, and round t sends the difference of its rows t and t - 1.
What one participation costs is the largest norm of a column of C, if columns that one client may touch have no row in common.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fl_jax.errors import FlJaxError
from fl_jax.types import Array, Key, PyTree


class Strategy(NamedTuple):
    """A factorisation of the running sum.

    init:        (shared) -> state
    noise:       (key, state, like) -> (noise, state): what this round's sum gets, shaped as `like`, where Z has a deviation of 1
    sensitivity: the largest norm of a column of C: how far C x moves where one participation moves one round's sum by 1
    separation:  how many rounds any two participations of a client must be apart at least, for their columns to have no row in common
    """

    init: Callable[[PyTree], PyTree]
    noise: Callable[[Key, PyTree, PyTree], tuple[PyTree, PyTree]]
    sensitivity: float
    separation: int


class Nodes(NamedTuple):
    """The sums of the tree that are in the last running sum. leaves: int32, rounds in this tree. words: uint32[L, 2], of the node of
    2^l rounds the seed of its noise, from which it is made once more when a larger node takes its place; so no model is kept."""

    leaves: Array
    words: Array


def tree(period: int, separation: int | None = None) -> Strategy:
    """Binary trees over `period` rounds each (Kairouz et al. 2021, "Practical and private (deep) learning without sampling or
    shuffling", Algorithm 1 with the restarts of appendix D; without Honaker's estimator, which combines more of the nodes).

    The sum of the first t rounds of a tree is that of the nodes whose sizes are the binary digits of t, each with noise of its own. A
    round is in one node of each of L = floor(log2(period)) + 1 sizes at most: the sensitivity is sqrt(L). A tree that ended leaves
    its noise in the running sum: as many nodes as `period` has binary digits that are 1, so a power of two is best. State: 2 L words.
    separation: at least the period (the default); larger where the sampler promises more, and clients then pay more seldom.
    """
    separation = _apart(separation, "period", period)
    num_sizes = period.bit_length()

    def init(shared: PyTree) -> Nodes:
        del shared
        return Nodes(jnp.int32(0), jnp.zeros((num_sizes, 2), jnp.uint32))

    def noise(key: Key, state: Nodes, like: PyTree) -> tuple[PyTree, Nodes]:
        leaves = state.leaves + 1
        # the node that ends with this leaf takes the place of all smaller ones, which are there, one of each size
        size = jax.lax.population_count((leaves & -leaves) - 1)
        words = state.words.at[size].set(jax.random.bits(key, (2,), jnp.uint32))

        def without(l: Array, total: PyTree) -> PyTree:
            return optax.tree.sub(total, _from_words(words[l], like))

        total = jax.lax.fori_loop(0, size, without, _from_words(words[size], like))
        return total, Nodes(jnp.where(leaves == period, 0, leaves), words)

    return Strategy(init, noise, num_sizes**0.5, separation)


def banded(rounds: int, separation: int, bands: int | None = None) -> Strategy:
    """A banded Toeplitz matrix C, optimal for the mean squared error of `rounds` running sums (Choquette-Choo et al. 2023, "(Amplified)
    banded matrix factorization: a unified approach to private training"; McKenna 2024, arXiv 2405.15913).

    separation: how many rounds a client's participations are apart at least. bands: of C, 1 to the separation (the default); 1 is
    independent noise. rounds: for how many C is optimal; the guarantee holds for any number, and there are no restarts. Sensitivity 1.
    State: bands - 1 copies of what is shared. The coefficients (seconds of L-BFGS, once per process) and the multiplication by C's
    inverse are jax_privacy's.
    """
    bands = separation if bands is None else bands
    _apart(separation, "number of bands", bands)
    if not isinstance(rounds, int) or rounds < 1:
        raise FlJaxError(f"rounds must be a whole number above 0, and is {rounds}.")
    coefficients = _coefficients(rounds, min(bands, rounds))
    matrices, toeplitz = _matrix_factorization()
    few = len(coefficients) == 1
    inverse = matrices.identity() if few else toeplitz.inverse_as_streaming_matrix(jnp.asarray(coefficients, jnp.float32))

    def init(shared: PyTree) -> PyTree:
        return inverse.init_multiply(optax.tree.cast(shared, jnp.float32))

    def noise(key: Key, state: PyTree, like: PyTree) -> tuple[PyTree, PyTree]:
        return inverse.multiply_next(optax.tree.random_like(key, like, sampler=jax.random.normal), state)

    return Strategy(init, noise, float(np.linalg.norm(np.asarray(coefficients, np.float32).astype(np.float64))), separation)


def _apart(separation: int | None, what: str, least: int) -> int:
    if not isinstance(least, int) or least < 1:
        raise FlJaxError(f"The {what} must be a whole number above 0, and is {least}.")
    if separation is None:
        return least
    if not isinstance(separation, int) or separation < least:
        raise FlJaxError(f"The {what} is {least}, so that a client's participations must be {least} rounds apart or more, and the "
                         f"separation is {separation}.")
    return separation


def _from_words(words: Array, like: PyTree) -> PyTree:
    """Standard normal noise from 64 bits: the same each time."""
    return optax.tree.random_like(jax.random.wrap_key_data(words, impl="threefry2x32"), like, sampler=jax.random.normal)


@functools.lru_cache(maxsize=64)
def _coefficients(rounds: int, bands: int) -> tuple[float, ...]:
    """The first column of C, of norm 1."""
    if bands == 1:
        return (1.0,)
    with jax.ensure_compile_time_eval():  # an algorithm is built anew while a program of it is traced
        found = _matrix_factorization()[1].optimize_banded_toeplitz(rounds, bands)
        return tuple(float(value) for value in np.asarray(found))


def _matrix_factorization() -> tuple[Any, Any]:
    """jax_privacy's streaming_matrix and toeplitz: a second to import, which only those pay who use it."""
    from jax_privacy.matrix_factorization import streaming_matrix, toeplitz

    return streaming_matrix, toeplitz
