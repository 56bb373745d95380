"""The radix sort is numpy's lexsort, the integer keys keep the order of floats, and ranks are what counting by hand gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fl_jax.ranks import ordered_bits, rank, sorted_stably


def test_ordered_bits_keep_the_order_of_floats_and_their_ties():
    tiny = np.finfo(np.float32).tiny
    values = np.array(
        [-np.inf, -3e38, -2, -1, -tiny, -0.0, 0.0, tiny, 1, np.nextafter(np.float32(1), 2), 3e38, np.inf], np.float32
    )
    bits = np.asarray(ordered_bits(jnp.asarray(values))).astype(np.int64)
    assert np.array_equal(np.sign(np.diff(bits)), np.diff(values) > 0)


@pytest.mark.parametrize("num_rows", [1, 2, 33, 70_000])  # the last takes several passes over the key
def test_the_sort_is_stable_and_equals_lexsort(num_rows):
    rng = np.random.default_rng(num_rows)
    low = rng.integers(0, 2**32, num_rows, np.uint32) >> rng.integers(0, 30, num_rows).astype(np.uint32)
    high = rng.integers(0, 6, num_rows).astype(np.uint32)

    @jax.jit
    def both(low, high):
        order = sorted_stably(jnp.arange(num_rows, dtype=jnp.int32), low, 32)
        return sorted_stably(order, high, 3)

    np.testing.assert_array_equal(both(low, high), np.lexsort((low, high)))


def test_ranks_are_the_counts_within_the_site():
    rng = np.random.default_rng(0)
    num_rows, num_sites = 60, 4
    score, positive = rng.integers(-2, 3, num_rows).astype(np.float32), rng.random(num_rows) < 0.4
    site = rng.choice([0, 2, 3, num_sites], num_rows).astype(np.int32)  # site 1 is empty
    found = jax.jit(rank)(score, positive, site, np.bincount(site, minlength=num_sites + 1)[:num_sites].astype(np.int32))
    order = np.lexsort((score, site))
    # Tied records may come in any order, but what is counted is the same for all of them, except whether they are positive.
    for row, i in enumerate(order[site[order] < num_sites]):
        here = site == site[i]
        assert found.negatives_below[row] == np.sum(here & ~positive & (score < score[i]))
        assert found.negatives_tied[row] == np.sum(here & ~positive & (score == score[i]))
        assert found.positives_from[row] == np.sum(here & positive & (score >= score[i]))
        assert found.records_from[row] == np.sum(here & (score >= score[i]))
    sums = found.sum_of_positives(jnp.full(num_rows, 2**32 - 1, jnp.uint32))
    np.testing.assert_allclose(sums, np.asarray(found.positives) * (2.0**32 - 1), rtol=1e-6)
    for i in range(num_sites):
        assert (found.positives[i], found.negatives[i]) == (np.sum(positive & (site == i)), np.sum(~positive & (site == i)))
