"""Which records are in which step: epochs without replacement, drawn in O(batch) without a stored permutation; Poisson samples, which
are made in fl_jax.poisson, are at hand here too.

An epoch's order is a keyed bijection on [0, n): a Feistel network over Z_a x Z_b with a * b just above n, and cycle walking for what
falls outside (Black & Rogaway 2002, "Ciphers with arbitrary finite domains", method 3; Mitchell et al. 2021, "Bandwidth-optimal random
shuffling for GPUs", has the same idea over powers of two). So a batch is a pure function of (key, step, number of records): the same
whatever the lane, the device, the order of the cohort, or a resume.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from numbers import Real
from typing import NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp

from fl_jax import mechanism
from fl_jax.errors import FlJaxError
from fl_jax.poisson import poisson, poisson_epochs
from fl_jax.types import Array, Batches, Key

__all__ = ["ROUNDS", "Order", "epochs", "order", "poisson", "poisson_epochs", "shuffled", "updates"]

ROUNDS = 18  # twelve are measurably not uniform for n = 5; tests/test_batches.py measures all orders of 5 and of 7


class Order(NamedTuple):
    """The seed of a site's orders, one order for each epoch. words: uint32[2]. num_records: int32."""

    words: Array
    num_records: Array


def order(key: Key, num_records: Array) -> Order:
    """Draws the seed of a site's orders. num_records: int32 scalar, 1 <= n <= 2**30."""
    return Order(jax.random.bits(key, (2,), jnp.uint32), num_records)


def shuffled(seed: Order, epoch: Array, position: Array) -> Array:
    """Where the order of an epoch sends `position`.

    epoch: int32 scalar. position: int32[...] in [0, n). Returns int32[...] in [0, n): a bijection of [0, n) for each seed and epoch.
    Not cryptographic: it shuffles records; it does not hide them.
    """
    n = seed.num_records.astype(jnp.uint32)
    a = jnp.ceil(jnp.sqrt(n.astype(jnp.float32))).astype(jnp.uint32)
    b = (n + a - 1) // a  # a * b >= n, also where float32 rounds the root down
    salt = _hash(_hash(epoch.astype(jnp.uint32), seed.words[0]), seed.words[1])

    def permute(value: Array) -> Array:
        left, right = value // b, value % b
        for r in range(ROUNDS):
            # each half in turn is shifted by a hash of the other
            if r % 2 == 0:
                left = _wrapped(left + _below(_hash(right + jnp.uint32(r), salt), a), a)
            else:
                right = _wrapped(right + _below(_hash(left + jnp.uint32(r), salt), b), b)
        return left * b + right

    # a bijection of [0, a * b) followed until it comes back below n is a bijection of [0, n); a * b - n < a, so this is rare
    first = permute(position.astype(jnp.uint32))
    value = jax.lax.while_loop(lambda v: jnp.any(v >= n), lambda v: jnp.where(v >= n, permute(v), v), first)
    # for many a and b a Feistel round is an even permutation, which favours even orders: a fair coin swaps 0 and 1
    value = jnp.where((value < 2) & (n > 1), value ^ (_hash(salt, seed.words[0]) >> 31), value)
    return value.astype(jnp.int32)


def _wrapped(value: Array, size: Array) -> Array:
    return jnp.where(value >= size, value - size, value)


def _hash(value: Array, salt: Array) -> Array:
    """Scrambles uint32 by two multiplications; cheap, since many rounds of it follow one another."""
    value = (value ^ salt) * jnp.uint32(0x9E3779B1)
    return (value ^ (value >> 15) ^ salt) * jnp.uint32(0x85EBCA77)


def _below(bits: Array, size: Array) -> Array:
    """uint32 bits to [0, size) for size <= 2**16, by multiplication: a division would not vectorize."""
    return ((bits >> 16) * size) >> 16


def epochs(num_epochs: float | Array, batch_size: int) -> Batches:
    """`num_epochs` passes over a site's records in batches of `batch_size`, each pass in a new order, without replacement.

    The last batch of a pass is padded (mask 0), so a pass is ceil(n / batch_size) steps and uses every record once. A fraction of an
    epoch is rounded up to whole steps. A batch size above a site's size gives one padded batch a pass. num_epochs may be a tracer.
    Raises FlJaxError unless batch_size >= 1 and num_epochs >= 1e-4.
    """
    _check(batch_size, num_epochs, "num_epochs")
    whole = Fraction(float(num_epochs)).limit_denominator(10_000) if isinstance(num_epochs, Real) else num_epochs

    def steps(num_records: Array) -> Array:
        per_pass = -(-num_records // batch_size)
        if isinstance(whole, Fraction):  # parts and rest apart, so that int32 holds what comes between
            parts, rest = per_pass // whole.denominator, per_pass % whole.denominator
            return parts * whole.numerator + -(-rest * whole.numerator // whole.denominator)
        if jnp.issubdtype(jnp.result_type(whole), jnp.inexact):
            return jnp.ceil(per_pass * whole - 1e-3).astype(jnp.int32)  # ten times float32's .1 is one, not one and a bit
        return per_pass * whole

    def account(event: dp_accounting.DpEvent, num_records: int) -> dp_accounting.DpEvent:
        del num_records
        return _account_passes(event, lambda: math.ceil(whole))

    return Batches(batch_size, steps, order, _passes(batch_size), _fixed(batch_size), account)


def updates(num_steps: int | Array, batch_size: int) -> Batches:
    """A fixed number of steps for every site, whatever its size, through its records in passes as in `epochs`.

    This is the budget of cross-silo benchmarks (FLamby's "local updates"), where a small site repeats its records more often.
    Raises FlJaxError unless batch_size and num_steps are 1 or more.
    """
    _check(batch_size, num_steps, "num_steps")

    def account(event: dp_accounting.DpEvent, num_records: int) -> dp_accounting.DpEvent:
        return _account_passes(event, lambda: -(-int(num_steps) // -(-num_records // batch_size)))

    def steps(num_records: Array) -> Array:
        return jnp.full_like(num_records, num_steps)

    return Batches(batch_size, steps, order, _passes(batch_size), _fixed(batch_size), account)


def _check(batch_size: int, budget: float | Array, name: str) -> None:
    least = 1 if name == "num_steps" else 1e-4
    if batch_size < 1:
        raise FlJaxError(f"batch_size is {batch_size}; give 1 or more.")
    if isinstance(budget, Real) and not least <= budget < float("inf"):
        raise FlJaxError(f"{name} is {budget}; give {least} or more.")


def _fixed(batch_size: int) -> Callable[[Order], Array]:
    """The expected number of records of a step: the batch size, which the last batch of a pass falls short of."""
    return lambda seed: jnp.float32(batch_size)


def _account_passes(event: dp_accounting.DpEvent, passes: Callable[[], int]) -> dp_accounting.DpEvent:
    """A round of so many passes, in each of which a record is in one step: no amplification, and under replace-one alone, since a record
    that is added or removed moves others to other steps."""
    if event == dp_accounting.NonPrivateDpEvent():
        return event
    try:
        count = passes()
    except (TypeError, jax.errors.ConcretizationTypeError) as error:
        raise FlJaxError("The number of passes must be known outside of jit and vmap for what they cost to be accounted: give a number.") from error
    return dp_accounting.SelfComposedDpEvent(mechanism.replacing(event), count)


def _passes(batch_size: int):
    def draw(seed: Order, t: Array) -> tuple[Array, Array]:
        per_pass = -(-seed.num_records // batch_size)
        position = (t % per_pass) * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
        mask = position < seed.num_records
        index = shuffled(seed, t // per_pass, jnp.minimum(position, seed.num_records - 1))
        return index, mask.astype(jnp.float32)

    return draw
