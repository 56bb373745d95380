"""Ranks of the records of every site at once, positives against negatives: what AUROC and average precision sum.

Everything is an integer and all shapes are static; sums are exact, so nothing depends on the order in which records are stored.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fl_jax.types import Array


class Ranks(NamedTuple):
    """The records sorted by (site, score), int32[R] each, and each one's place among the records of its own site.

    positive: 0 or 1. negatives_below, negatives_tied: negatives with a lower score, with the same score.
    positives_from, records_from: positives, and records of either kind, whose score is not below this one's.
    begin, end: int32[N], a site's span in that order. positives, negatives: int32[N], how many a site has.
    """

    positive: Array
    negatives_below: Array
    negatives_tied: Array
    positives_from: Array
    records_from: Array
    begin: Array
    end: Array
    positives: Array
    negatives: Array

    def sum_of_positives(self, values: Array) -> Array:
        """The sums of values in [0, 2**32), whole numbers of shape [R], over the positive records of each site: float32[N]."""
        return sums_of_spans(jnp.where(self.positive > 0, values, 0), self.begin, self.end)


def rank(score: Array, positive: Array, site: Array, num_records: Array) -> Ranks:
    """Ranks R > 0 records: score float32[R], positive bool[R], site int32[R] (N = a padding row), num_records int32[N].

    A NaN among a site's scores makes that site's ranks meaningless, and no other's.
    """
    num_rows = site.shape[0]
    index = jnp.arange(num_rows, dtype=jnp.int32)
    # The less significant key first: that part does not depend on the sites, so other groupings of the same records share it.
    score = ordered_bits(score)
    order = sorted_stably(index, score, 32)
    order = sorted_stably(order, site.astype(jnp.uint32), num_records.shape[0].bit_length())
    site, score, positive = site[order], score[order], positive[order].astype(jnp.int32)
    edge = jnp.ones(1, bool)
    changes = (site[1:] != site[:-1]) | (score[1:] != score[:-1])
    # A group of equal scores spans start : stop.
    start = jax.lax.cummax(jnp.where(jnp.concatenate([edge, changes]), index, 0))
    stop = jax.lax.cummin(jnp.where(jnp.concatenate([changes, edge]), index + 1, num_rows), reverse=True)
    before = _running_total(positive)
    bounds = _running_total(num_records)
    begin, end = bounds[:-1], bounds[1:]
    first, last = bounds[site], jnp.append(end, num_rows)[site]  # of the record's own site; padding is the last "site"
    positives = before[end] - before[begin]
    return Ranks(
        positive=positive,
        negatives_below=(start - before[start]) - (first - before[first]),
        negatives_tied=(stop - before[stop]) - (start - before[start]),
        positives_from=before[last] - before[start],
        records_from=last - start,
        begin=begin,
        end=end,
        positives=positives,
        negatives=num_records - positives,
    )


def ordered_bits(score: Array) -> Array:
    """uint32 [R] in the order of the scores float32[R], equal where they are; NaN anywhere."""
    bits = jax.lax.bitcast_convert_type(jnp.where(score == 0, 0.0, score), jnp.uint32)  # -0 and 0 are equal
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits < sign, bits | sign, ~bits)


def sorted_stably(order: Array, key: Array, key_bits: int) -> Array:
    """The rows `order` (int32[R]) sorted by key (uint32[R], below 2**key_bits), rows with equal keys staying in their order.

    A radix sort, as many bits at a time as fit into 32 beside a row's position: XLA on a CPU sorts single integers several times
    faster than by a comparison of several operands.
    """
    num_rows = order.shape[0]
    position_bits = max(1, (num_rows - 1).bit_length())
    position = jnp.arange(num_rows, dtype=jnp.uint32)
    for shift in range(0, key_bits, 32 - position_bits):
        packed = (key[order] >> shift) << position_bits | position  # what the shift to the left pushes out is the next digit
        order = order[jax.lax.sort(packed, is_stable=False) & jnp.uint32(2**position_bits - 1)]
    return order


def sums_of_spans(values: Array, begin: Array, end: Array) -> Array:
    """The sums of whole numbers in [0, 2**32), of shape [R], over the rows begin : end (int32[N]) of each span: float32[N]."""
    values = values.astype(jnp.uint32)
    # 32 bits cannot hold the sum, so each value is cut into digits small enough that R of them fit; a span's sum of a digit is
    # the difference of two running totals.
    bits = 32 - values.shape[0].bit_length()
    total = jnp.zeros(begin.shape, jnp.float32)
    for shift in range(0, 32, bits):
        running = _running_total((values >> shift) & jnp.uint32(2**bits - 1))
        total += (running[end] - running[begin]).astype(jnp.float32) * 2.0**shift
    return total


def _running_total(values: Array) -> Array:
    """0, v0, v0 + v1, ...: [n + 1] of the values' own integer type, from [n]."""
    return jnp.concatenate([jnp.zeros(1, values.dtype), jnp.cumsum(values, dtype=values.dtype)])
