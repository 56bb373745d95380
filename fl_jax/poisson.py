"""Which records are in which step by an independent coin for each: Poisson sampling, drawn in O(batch) for sites of any size.

The positions of the heads among n coins are cumulative sums of geometric gaps, so that a step costs as many random numbers as a batch has
rows, whatever n, and lanes of sites with different n run side by side. The number of records of a site is taken to be public.
"""

import math
import operator
from typing import NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from fl_jax.errors import FlJaxError
from fl_jax.privacy.accounting import CUT_ANYHOW
from fl_jax.privacy.events import one_gaussian
from fl_jax.types import Array, Batches, Key

MOST_RECORDS = 2**30
_DRAWN = 1e-30  # the chance that a step has more heads than are drawn: below the rounding of any delta
_ABSENT = np.uint32(2**31)  # above every random number that ranks the heads


class Coins(NamedTuple):
    """The seed of a site's coins of one round. key: typed. num_records: int32."""

    key: Key
    num_records: Array


def poisson(rate: float, num_steps: int, max_records: int, *, capacity: int | None = None, failure: float = 1e-15) -> Batches:
    """Batches in which each record of a site is by an independent coin, anew in each of `num_steps` steps a round.

    rate: the coins' probability, the same at all sites, so that a site of n records expects rate * n in a step, by which a private mean
    divides. max_records: of the largest site. capacity: rows of a batch; by default as many as a site of max_records exceeds with
    probability at most `failure` a step. Where more come up, a uniformly random subset of the heads is kept, or, where that happens with
    at most accounting.CUT_ANYHOW a step, the first of them. A step in which nothing comes up has only padding, and a private gradient of
    noise alone.

    Accounting: `account` gives steps of a Gaussian mechanism as TruncatedSubsampledGaussianDpEvent, which privacy.accounting knows; with
    the default capacity that costs num_steps * failure of delta a round beyond plain Poisson sampling. Gaussians on one sample count as
    the one that they amount to; other mechanisms are unsupported there, and epsilon is infinite. The neighbours of a data set have one
    record more or less, although the number of records itself is taken to be public, e.g. in weights and step counts.

    Logarithms are float32: the probability of a head given all earlier coins is off by at most 1e-6 / sqrt(rate) of itself, in all
    histories likelier than one in a million (tests/test_poisson.py finds it exactly, by where in the random numbers gaps begin), and the
    probability that the next gap is longer than some length by 2e-6 of itself.

    Raises FlJaxError for a rate outside (0, 1], for less than one step or record, and for a capacity below the expected batch of the
    largest site; `account` raises it for a site with more than max_records, whose batches would be cut more often than promised.
    """
    steps_of_round, most = _whole("num_steps", num_steps), _whole("max_records", max_records)
    check_rate(rate)
    if most > MOST_RECORDS:
        raise FlJaxError(f"max_records is {most}, and a site has at most {MOST_RECORDS} records.")
    if not 0 < failure < 1:
        raise FlJaxError(f"failure is a probability between 0 and 1, such as 1e-15, and is {failure}.")
    rows = slots(rate, most, failure) if capacity is None else _whole("capacity", capacity)
    if rows < rate * most:
        raise FlJaxError(f"A capacity of {rows} would cut most batches of a site of {most} records, which expect {rate * most:g}: "
                         "give more, or leave it out.")
    anyhow = stats.binom.sf(rows - 1, most, rate) <= CUT_ANYHOW  # saves three quarters of the time, which goes into ranking
    drawn = rows if anyhow else max(rows, slots(rate, most, _DRAWN))

    def draw(coins: Coins, t: Array) -> tuple[Array, Array]:
        key = jax.random.fold_in(coins.key, t)
        positions = heads(key, rate, coins.num_records, drawn)
        if not anyhow:
            return kept(jax.random.fold_in(key, 1), positions, coins.num_records, rows)
        mask = positions < coins.num_records.astype(jnp.uint32)
        return jnp.where(mask, positions, 0).astype(jnp.int32), mask.astype(jnp.float32)

    def account(event: dp_accounting.DpEvent, num_records: int) -> dp_accounting.DpEvent:
        n = _whole("The number of records of a site", num_records)
        if n > most:
            raise FlJaxError(f"A site has {n} records, and batches.poisson was made for {most} at most: give it max_records={n} or more.")
        return dp_accounting.SelfComposedDpEvent(truncated(event, n, rate, rows), steps_of_round)

    return Batches(
        rows, lambda num_records: jnp.full_like(num_records, steps_of_round), Coins, draw, lambda coins: rate * coins.num_records.astype(jnp.float32),
        account)


def poisson_epochs(rate: float, num_epochs: float, max_records: int, *, capacity: int | None = None, failure: float = 1e-15) -> Batches:
    """`poisson` with as many steps a round as make `num_epochs` passes in expectation: round(num_epochs / rate), at least one."""
    check_rate(rate)
    if not 0 < num_epochs < math.inf:
        raise FlJaxError(f"num_epochs is {num_epochs}; give more than 0.")
    return poisson(rate, max(1, round(num_epochs / rate)), max_records, capacity=capacity, failure=failure)


def slots(rate: float, num_records: int, failure: float) -> int:
    """The smallest c with P[Binomial(num_records, rate) >= c] <= failure: neither a site of so many records nor one with one more has
    more than c heads but for that probability, whatever the coin of the one record more."""
    low, high = 0, num_records + 1  # scipy's inverse is wrong for tiny probabilities
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if stats.binom.sf(middle - 1, num_records, rate) <= failure else (middle, high)
    return high


def heads(key: Key, rate: float, num_records: Array, count: int) -> Array:
    """The positions of the first `count` heads among infinitely many coins: uint32[count], increasing; what is not below num_records is cut
    short there. rate: a Python number. num_records: int32 scalar, at most 2**30."""
    limit = num_records.astype(jnp.uint32) + 1
    steps = jnp.minimum(_gaps(jax.random.bits(key, (3, count), jnp.uint32), rate), limit.astype(jnp.float32)).astype(jnp.uint32)
    return jax.lax.associative_scan(lambda one, other: jnp.minimum(one + other, limit), jnp.minimum(steps, limit)) - 1


def kept(key: Key, positions: Array, num_records: Array, rows: int) -> tuple[Array, Array]:
    """A uniformly random subset of at most `rows` of the positions below num_records: index int32[rows], and mask float32[rows]."""
    rank = jax.random.bits(key, positions.shape, jnp.uint32) >> 1
    rank = jnp.where(positions < num_records.astype(jnp.uint32), rank, _ABSENT)
    rank, positions = jax.lax.sort((rank, positions), num_keys=1)
    mask = rank[:rows] < _ABSENT
    return jnp.where(mask, positions[:rows], 0).astype(jnp.int32), mask.astype(jnp.float32)


def _gaps(bits: Array, rate: float) -> Array:
    """How far one head is from the one before: float32 whole numbers of the geometric distribution. bits: uint32[3, ...].

    In two digits of base m = 1 / sqrt(rate), which are independent since coins have no memory: each is small enough for float32 to tell
    neighbours apart, where the logarithm of one uniform number would be off by a share of 1e-7 / rate.
    """
    if rate == 1:
        return jnp.ones(bits.shape[1:], jnp.float32)
    rare = -math.log1p(-rate)
    base = max(1, round(rate**-0.5))
    # an exponential number that is precise where it is small and where it is large: one bit says which half of it, 63 bits are the rest
    half = ((bits[0] & (_ABSENT - 1)).astype(jnp.float32) + bits[2].astype(jnp.float32) * 2.0**-32) * 2.0**-32
    exponential = -jnp.where(bits[0] >> 31 == 0, jnp.log1p(-half), jnp.log(half))
    low = bits[1].astype(jnp.float32) * 2.0**-32
    low = jnp.minimum(jnp.floor(-jnp.log1p(low * math.expm1(-rare * base)) / rare), base - 1)
    return jnp.floor(exponential / (rare * base)) * base + low + 1


def chosen(key: Key, rate: float, num_units: int) -> Array:
    """bool[num_units]: an independent coin for each, of probability floor(rate * 2**32) / 2**32."""
    if rate == 1:
        return jnp.ones(num_units, bool)
    return jax.random.bits(key, (num_units,), jnp.uint32) < jnp.uint32(math.floor(rate * 2**32))


def truncated(event: dp_accounting.DpEvent, num_units: int, rate: float, capacity: int) -> dp_accounting.DpEvent:
    """The event on a Poisson sample of so many units cut to a capacity; unsupported unless it amounts to one Gaussian."""
    if event == dp_accounting.NonPrivateDpEvent():
        return event
    gaussian = one_gaussian(event)
    if gaussian is None:
        return dp_accounting.UnsupportedDpEvent()
    return dp_accounting.TruncatedSubsampledGaussianDpEvent(num_units, rate, capacity, gaussian.noise_multiplier)


def check_rate(rate: float) -> None:
    """Raises FlJaxError for a rate that is no Python number in (0, 1]."""
    try:
        sound = 0 < float(rate) <= 1
    except (TypeError, jax.errors.ConcretizationTypeError) as error:
        raise FlJaxError("The rate of Poisson sampling must be a number that is known outside of jit and vmap, since the size of a batch "
                         "depends on it.") from error
    if not sound:
        raise FlJaxError(f"The rate of Poisson sampling is the probability of a coin, above 0 and at most 1, and is {rate}.")


def _whole(name: str, value: int) -> int:
    try:
        whole = operator.index(value)
    except TypeError as error:
        raise FlJaxError(f"{name} must be a whole number, and is {value!r}.") from error
    if whole < 1:
        raise FlJaxError(f"{name} is {whole}; give 1 or more.")
    return whole
