"""Orders are bijections and uniformly random; an epoch uses every record once; steps are what the budget says."""

from itertools import permutations

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fl_jax import batches, privacy
from fl_jax.errors import FlJaxError

KEY = jax.random.key(0)


@jax.jit
def up_to_1100(key, n, epoch):
    """The order of n <= 1,100 records, in a program that serves every n; what follows the n-th repeats it."""
    return batches.shuffled(batches.order(key, n), epoch, jnp.minimum(jnp.arange(1_100, dtype=jnp.int32), n - 1))


def order_of(n, key=KEY, epoch=0):
    return np.asarray(up_to_1100(key, jnp.int32(n), jnp.int32(epoch)))[:n]


SIZES = [*range(1, 27), 31, 32, 36, 37, 49, 50, 63, 64, 65, 97, 100, 101, 121, 122, 128, 169, 255, 256, 257, 289, 290, 961, 1_000,
         1_009, 1_024]  # primes, squares, powers of two, and their neighbours


def test_an_order_is_a_bijection_for_every_size():
    for n in SIZES:
        for epoch in range(3):
            np.testing.assert_array_equal(np.sort(order_of(n, jax.random.fold_in(KEY, n), epoch)), np.arange(n), err_msg=str(n))


def test_an_order_of_a_million_records_is_a_bijection():
    n = 2**20 + 7
    found = jax.jit(batches.shuffled)(batches.order(KEY, jnp.int32(n)), jnp.int32(1), jnp.arange(n, dtype=jnp.int32))
    assert (np.bincount(found, minlength=n) == 1).all()


@pytest.mark.parametrize("n", [2**24 + 1, 25_000_001, 2**30 - 1, 2**30])
def test_the_largest_sites_have_distinct_records_all_over_them(n):
    position = jnp.arange(n - 4_096, n, dtype=jnp.int32)
    found = np.asarray(jax.jit(batches.shuffled)(batches.order(KEY, jnp.int32(n)), jnp.int32(0), position))
    assert len(np.unique(found)) == len(found) and found.min() >= 0 and found.max() < n
    assert stats.kstest(found / n, "uniform").pvalue > 1e-3


def draws(n, positions, count, over):
    """int[count, len(positions)]: where these positions go, in one epoch of many seeds or in many epochs of one seed."""
    position, many = jnp.asarray(positions, jnp.int32), jnp.arange(count, dtype=jnp.int32)
    if over == "seeds":
        words = jax.random.bits(KEY, (count, 2), jnp.uint32)
        by_seed = jax.vmap(lambda w: batches.shuffled(batches.Order(w, jnp.int32(n)), jnp.int32(0), position))
        return np.asarray(jax.jit(by_seed)(words))
    seed = batches.order(KEY, jnp.int32(n))
    return np.asarray(jax.jit(jax.vmap(lambda epoch: batches.shuffled(seed, epoch, position)))(many))


def evenness(found, n):
    """The p-value of the chi-square test that all ordered selections of distinct records are equally likely."""
    cells = list(permutations(range(n), found.shape[1]))
    place = np.full(n ** found.shape[1], -1)
    radix = n ** np.arange(found.shape[1])
    place[np.array(cells) @ radix] = np.arange(len(cells))
    which = place[found @ radix]
    assert (which >= 0).all()
    return stats.chisquare(np.bincount(which, minlength=len(cells))).pvalue


@pytest.mark.parametrize("over", ["seeds", "epochs"])
@pytest.mark.parametrize("n", [5, 7])
def test_all_orders_are_equally_likely(n, over):
    assert evenness(draws(n, range(n), {5: 120_000, 7: 302_400}[n], over), n) > 1e-3


@pytest.mark.parametrize("over", ["seeds", "epochs"])
@pytest.mark.parametrize("positions", [(0, 1), (17, 39)])
def test_pairs_are_equally_likely(positions, over):
    assert evenness(draws(40, positions, 156_000, over), 40) > 1e-3


def test_the_measurement_tells_an_order_of_too_few_rounds(monkeypatch):
    monkeypatch.setattr(batches, "ROUNDS", 6)
    assert evenness(draws(5, range(5), 120_000, "seeds"), 5) < 1e-12


def test_orders_of_epochs_keys_and_lanes():
    np.testing.assert_array_equal(order_of(100), order_of(100))
    others = [order_of(100, epoch=epoch) for epoch in range(20)] + [order_of(100, jax.random.key(k)) for k in range(1, 20)]
    assert len({tuple(found) for found in others}) == len(others)
    keys, sizes = jax.random.split(KEY, 3), [5, 100, 1_000]
    together = jax.jit(jax.vmap(up_to_1100, (0, 0, None)))(keys, jnp.array(sizes), 2)
    for lane, (key, n) in enumerate(zip(keys, sizes, strict=True)):
        np.testing.assert_array_equal(np.asarray(together[lane])[:n], order_of(n, key, 2))


@jax.jit
def pass_of_fours(seed, start):
    draw = batches.epochs(1, 4).draw
    return jax.vmap(lambda t: draw(seed, t))(start + jnp.arange(16))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9, 23, 64])
def test_every_epoch_uses_every_record_once(n):
    budget = batches.epochs(3, 4)
    per_pass = -(-n // 4)
    assert int(budget.steps(jnp.int32(n))) == 3 * per_pass
    seed = budget.order(KEY, jnp.int32(n))
    for epoch in range(3):
        index, mask = (np.asarray(a)[:per_pass] for a in pass_of_fours(seed, epoch * per_pass))
        assert index.dtype == np.int32 and mask.dtype == np.float32 and index.min() >= 0 and index.max() < n
        np.testing.assert_array_equal(np.sort(index[mask > 0]), np.arange(n))
        assert set(mask.ravel()) <= {0, 1} and (mask[:-1] == 1).all()  # only the last batch of a pass is padded
        np.testing.assert_array_equal(index[mask > 0], order_of(n, KEY, epoch))


def test_a_batch_above_a_sites_size_is_one_padded_batch_a_pass():
    budget = batches.epochs(2, 32)
    assert int(budget.steps(jnp.int32(5))) == 2
    draw = jax.jit(budget.draw)
    for t in range(2):
        index, mask = draw(budget.order(KEY, jnp.int32(5)), jnp.int32(t))
        assert mask.sum() == 5 and index.max() < 5
        assert set(np.asarray(index)[np.asarray(mask) > 0]) == set(range(5))


@pytest.mark.parametrize(("num_epochs", "batch_size", "n", "steps"), [
    (1, 10, 600, 60), (5, 10, 601, 305), (0.5, 4, 10, 2), (0.1, 4, 10, 1), (0.1, 1, 10, 1), (0.1, 1, 11, 2), (1.5, 4, 10, 5),
    (0.7, 1, 10, 7), (2.0, 4, 1, 2), (1 / 3, 1, 9, 3), (0.3333, 1, 1_000_000, 333_300), (20, 1, 2**26, 20 * 2**26),
])
def test_steps_of_epochs_and_their_fractions(num_epochs, batch_size, n, steps):
    found = batches.epochs(num_epochs, batch_size).steps(jnp.int32(n))
    assert int(found) == steps and found.dtype == jnp.int32
    if steps < 10_000:
        traced = jax.jit(lambda num_epochs: batches.epochs(num_epochs, batch_size).steps(jnp.int32(n)))(num_epochs)
        assert int(traced) == steps and traced.dtype == jnp.int32


def test_updates_are_the_same_for_every_site_and_go_through_its_records_in_passes():
    budget = batches.updates(7, 4)
    np.testing.assert_array_equal(budget.steps(jnp.array([1, 9, 1_000])), [7, 7, 7])
    seed = budget.order(KEY, jnp.int32(9))
    index, mask = jax.jit(jax.vmap(budget.draw, (None, 0)))(seed, jnp.arange(7))
    seen = np.asarray(index)[np.asarray(mask) > 0]
    assert np.asarray(mask).sum(1).tolist() == [4, 4, 1, 4, 4, 1, 4]
    np.testing.assert_array_equal(np.sort(seen[:9]), np.arange(9))
    np.testing.assert_array_equal(np.sort(seen[9:18]), np.arange(9))
    assert len(set(seen[18:])) == 4


@pytest.mark.parametrize("wrong", [
    lambda: batches.epochs(0, 4), lambda: batches.epochs(-0.5, 4), lambda: batches.epochs(1, 0),
    lambda: batches.epochs(float("nan"), 4),
    lambda: batches.updates(0, 4), lambda: batches.updates(5, -1), lambda: batches.epochs(1e-6, 4),
])
def test_budgets_without_a_step_are_refused(wrong):
    with pytest.raises(FlJaxError, match="give|must"):
        wrong()


def test_a_pass_costs_each_record_one_step_without_amplification_when_it_is_replaced():
    event = dp_accounting.GaussianDpEvent(1.5)
    once = dp_accounting.SampledWithoutReplacementDpEvent(1, 1, event)
    assert batches.epochs(3, 4).account(event, 10) == dp_accounting.SelfComposedDpEvent(once, 3)
    assert batches.epochs(0.5, 4).account(event, 10).count == 1
    for count in (1, 3, 4, 7):  # passes of 3 steps over 10 records
        round = batches.updates(count, 4).account(event, 10)
        order = batches.order(KEY, jnp.int32(10))
        index, mask = jax.jit(jax.vmap(batches.updates(count, 4).draw, (None, 0)))(order, jnp.arange(count))
        seen = np.bincount(np.asarray(index)[np.asarray(mask) > 0], minlength=10)
        assert round.count == max(seen)
    assert privacy.natural_relation(round) is privacy.NeighboringRelation.REPLACE_ONE
    assert batches.epochs(3, 4).account(dp_accounting.NonPrivateDpEvent(), 10) == dp_accounting.NonPrivateDpEvent()
    with pytest.raises(FlJaxError, match="number of passes must be known"):
        jax.vmap(lambda e: jnp.float32(batches.epochs(e, 4).account(event, 10).count))(jnp.array([1, 2]))


def test_a_private_mean_divides_by_the_size_of_a_batch():
    order = batches.order(KEY, jnp.int32(10))
    assert float(batches.epochs(1, 4).expected(order)) == float(batches.updates(1, 4).expected(order)) == 4
