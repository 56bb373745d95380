"""Poisson samples are independent coins: exactly counted, and tested as drawn; what is accounted is what ran."""

import math
from itertools import combinations

import dp_accounting as dp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SIZES, sites_of
from scipy import stats

from fl_jax import algorithms, batches, mechanism, poisson, privacy, sampling
from fl_jax.core import Engine
from fl_jax.errors import FlJaxError
from fl_jax.privacy import Accountant, Cost, NeighboringRelation, Unit

KEY = jax.random.key(5)
ADD = NeighboringRelation.ADD_OR_REMOVE_ONE
EVENT = dp.GaussianDpEvent(1.1)
N = len(SIZES)


def counted(below, wanted, bits):
    """How many of 2**bits random numbers do not reach each wanted value, by bisection: the value grows with the number."""
    low, high = np.zeros(len(wanted), np.uint64), np.full(len(wanted), 2**bits, np.uint64)
    for _ in range(bits + 1):
        middle = np.minimum((low + high) // 2, np.uint64(2**bits - 1))
        reached, open_ = below(middle) >= wanted, low < high
        high, low = np.where(reached & open_, middle, high), np.where(~reached & open_, middle + 1, low)
    return low.astype(float) / 2**bits


@pytest.mark.parametrize("rate", [0.9, 0.3, 0.05, 150 / 60_000, 1e-4])
def test_a_coin_has_its_rate_given_all_earlier_ones(rate):
    """The distribution of gaps over all random numbers there are: of their low digit, and of both halves of their high digit."""
    base, rare = max(1, round(rate**-0.5)), -math.log1p(-rate)
    raw = jax.jit(lambda a, b, c: poisson._gaps(jnp.stack([a, b, c]), rate) - 1)

    def low(number):
        zero = np.zeros(number.shape, np.uint32)
        return np.asarray(raw(zero, number.astype(np.uint32), zero)).astype(float)

    def high(number, upper):
        word = (number >> np.uint64(32)).astype(np.uint32) + np.uint32(2**31 * upper)
        found = raw(word, np.zeros(number.shape, np.uint32), (number & np.uint64(2**32 - 1)).astype(np.uint32))
        return np.floor(np.asarray(found).astype(float) / base)  # infinity for the one number that is 0

    below = counted(low, np.arange(base + 1.0), 32)
    assert below[0] == 0 and below[-1] == 1  # the digit is below its base
    digits = np.arange(int(25 / (rare * base)) + 1.0)
    beyond = (1 - counted(lambda number: high(number, 0), digits, 63)) / 2
    beyond += counted(lambda number: -high(number, 1), 1e-9 - digits, 63) / 2
    gaps = (-np.diff(beyond)[:, None] * np.diff(below)).ravel()
    longer = gaps[::-1].cumsum()[::-1] + beyond[-1]
    exact = np.exp(-rare * np.arange(len(gaps)))
    likely = exact > 1e-6
    assert likely.sum() > 4
    assert np.abs(gaps / longer / rate - 1)[likely].max() < 1e-6 / math.sqrt(rate)
    assert np.abs(longer / exact - 1)[likely].max() < 2e-6


def samples(work, n, count, key=KEY):
    """bool[count, n]: which records are in each of so many steps."""

    def one(t):
        index, mask = work.draw(order, t)
        return jnp.zeros(n).at[index].add(mask), jnp.sum(mask)

    order = work.order(key, jnp.int32(n))
    present, sizes = jax.jit(lambda: jax.lax.map(one, jnp.arange(count), batch_size=2_000))()
    present = np.asarray(present)
    assert set(np.unique(present)) <= {0, 1}  # a record is in a step once
    np.testing.assert_array_equal(present.sum(1), sizes)
    return present > 0


def pairs(present):
    """The p-value of the chi-square test that each pair is in, half in and out as often as independent coins of one rate would be."""
    count, n = present.shape
    rates = [present[:, i].mean() for i in range(n)]
    worst = []
    for i, j in combinations(range(n), 2):
        table = np.array([[np.sum((present[:, i] == a) & (present[:, j] == b)) for b in (0, 1)] for a in (0, 1)])
        expected = count * np.outer([1 - rates[i], rates[i]], [1 - rates[j], rates[j]])
        worst.append(stats.chi2.sf(((table - expected) ** 2 / expected).sum(), 1))
    return min(worst) * len(worst)


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.8])
def test_samples_are_independent_coins_of_the_rate(rate):
    n, count = 12, 40_000
    present = samples(batches.poisson(rate, 1, n), n, count)
    sizes = np.bincount(present.sum(1), minlength=n + 1)
    expected = stats.binom.pmf(np.arange(n + 1), n, rate) * count
    common = expected > 10
    observed = np.append(sizes[common], sizes[~common].sum())
    assert stats.chisquare(observed, np.append(expected[common], count - expected[common].sum())).pvalue > 1e-3
    each = [stats.binomtest(int(column.sum()), count, rate).pvalue for column in present.T]
    assert min(each) * n > 1e-3
    assert pairs(present) > 1e-3
    assert pairs(np.concatenate([present[1:, :3], present[:-1, :3]], 1)) > 1e-3  # and steps are independent


def test_a_large_site_is_sampled_all_over():
    n, rate = 1_000_003, 1e-4
    work = batches.poisson(rate, 1, n)
    order = work.order(KEY, jnp.int32(n))
    index, mask = jax.jit(lambda: jax.lax.map(lambda t: work.draw(order, t), jnp.arange(500)))()
    index, mask = np.asarray(index), np.asarray(mask) > 0
    assert stats.kstest(index[mask] / n, "uniform").pvalue > 1e-3 and index.max() < n
    sizes = mask.sum(1)
    assert abs(sizes.mean() - rate * n) < 5 * math.sqrt(rate * n / 500) and 0.8 < sizes.var() / (rate * n) < 1.2
    assert work.size == poisson.slots(rate, n, 1e-15) < 200


def test_lanes_of_different_sizes_draw_as_each_alone_and_a_site_without_heads_has_padding():
    work = batches.poisson(0.25, 3, 40)
    keys, sizes = jax.random.split(KEY, 4), jnp.array([1, 7, 40, 23])
    orders = jax.jit(jax.vmap(work.order))(keys, sizes)
    together = jax.jit(jax.vmap(work.draw))(orders, jnp.arange(4))
    alone = jax.jit(work.draw)
    for lane, n in enumerate(sizes.tolist()):
        index, mask = alone(work.order(keys[lane], jnp.int32(n)), jnp.int32(lane))
        np.testing.assert_array_equal(together[0][lane], index)
        np.testing.assert_array_equal(together[1][lane], mask)
        assert index.max() < n and index.dtype == jnp.int32 and mask.dtype == jnp.float32
    single = samples(work, 1, 4_000)
    assert stats.binomtest(int(single.sum()), 4_000, 0.25).pvalue > 1e-3
    np.testing.assert_allclose(jax.jit(jax.vmap(work.expected))(orders), 0.25 * sizes)
    np.testing.assert_array_equal(work.steps(sizes), [3, 3, 3, 3])


def test_at_rate_one_every_record_is_in_every_step_and_nothing_is_cut():
    work = batches.poisson(1.0, 2, 9)
    assert work.size == 10 and samples(work, 9, 50).all() and samples(work, 4, 50).all()
    assert privacy.PrivacyLedger(Unit.RECORD, ADD).spend(Cost(work.account(EVENT, 9), Unit.RECORD)).epsilon(1e-5, Accountant.PLD) == pytest.approx(
        privacy.PrivacyLedger(Unit.RECORD, ADD).spend(Cost(EVENT, Unit.RECORD), 2).epsilon(1e-5, Accountant.PLD), rel=1e-3)


def test_the_largest_site_does_not_overflow():
    n = 2**30
    work = batches.poisson(2e-8, 1, n)
    index, mask = map(np.asarray, jax.jit(lambda: jax.lax.map(lambda t: work.draw(poisson.Coins(KEY, jnp.int32(n)), t), jnp.arange(300)))())
    assert index.min() >= 0 and index.max() < n and stats.kstest(index[mask > 0] / n, "uniform").pvalue > 1e-3
    assert abs(mask.sum(1).mean() - 2e-8 * n) < 5 * math.sqrt(2e-8 * n / 300)


def test_a_capacity_keeps_a_uniformly_random_subset():
    n, rate, rows, count = 8, 0.6, 5, 60_000
    present = samples(batches.poisson(rate, 1, n, capacity=rows), n, count)
    sizes = present.sum(1)
    full = stats.binom.sf(rows - 1, n, rate)
    expected = np.append(stats.binom.pmf(np.arange(rows), n, rate), full) * count
    assert stats.chisquare(np.bincount(sizes, minlength=rows + 1), expected).pvalue > 1e-3
    kinds = {subset: i for i, subset in enumerate(combinations(range(n), rows))}
    found = np.bincount([kinds[tuple(np.flatnonzero(row))] for row in present[sizes == rows]], minlength=len(kinds))
    assert stats.chisquare(found).pvalue > 1e-3


def test_a_capacity_that_is_exceeded_as_often_as_the_accounting_forgives_keeps_any_subset_and_a_smaller_one_a_random_one():
    """The order of a batch tells which: heads come in the order of the records, a random subset in none."""
    for capacity, ranked in ((poisson.slots(0.3, 400, 1e-9), False), (poisson.slots(0.3, 400, 1e-9) - 1, True)):
        work = batches.poisson(0.3, 1, 400, capacity=capacity)
        index, mask = jax.jit(lambda work=work: work.draw(work.order(KEY, jnp.int32(400)), jnp.int32(0)))()
        found = np.asarray(index)[np.asarray(mask) > 0]
        assert len(found) > 50 and (np.diff(found) > 0).all() == (not ranked)


@pytest.mark.parametrize("rate, n, failure", [(0.01, 60_000, 1e-12), (0.3, 5, 1e-12), (1e-4, 1_000, 1e-30), (0.5, 10**6, 1e-3), (1.0, 7, 0.5)])
def test_slots_are_the_fewest_that_suffice(rate, n, failure):
    c = poisson.slots(rate, n, failure)
    assert stats.binom.sf(c - 1, n, rate) <= failure < (stats.binom.sf(c - 2, n, rate) if c > 1 else 1)


def test_a_round_costs_its_steps_on_truncated_samples():
    work = batches.poisson(0.01, 7, 600, capacity=20)
    assert work.account(EVENT, 500) == dp.SelfComposedDpEvent(dp.TruncatedSubsampledGaussianDpEvent(500, 0.01, 20, 1.1), 7)
    assert work.account(dp.NonPrivateDpEvent(), 500) == dp.SelfComposedDpEvent(dp.NonPrivateDpEvent(), 7)
    two = dp.ComposedDpEvent([dp.GaussianDpEvent(3.0), dp.SelfComposedDpEvent(dp.GaussianDpEvent(3.0), 3)])
    assert work.account(two, 500).event.noise_multiplier == pytest.approx(1.5)
    for event in (dp.LaplaceDpEvent(1.0), dp.PoissonSampledDpEvent(0.5, EVENT)):
        cost = Cost(work.account(event, 500), Unit.RECORD)
        assert privacy.open_ledger(cost, ADD).spend(cost).epsilon(1e-5) == math.inf
    with pytest.raises(FlJaxError, match="A site has 601 records, .* for 600 at most: give it max_records=601"):
        work.account(EVENT, 601)
    by_epochs = batches.poisson_epochs(0.01, 2, 600)
    assert by_epochs.account(EVENT, 500).count == 200 == int(by_epochs.steps(jnp.int32(3)))
    assert batches.poisson_epochs(0.5, 0.1, 600).account(EVENT, 500).count == 1


@pytest.mark.parametrize("make, words", [
    (lambda: batches.poisson(1.1, 1, 10), "above 0 and at most 1, and is 1.1"),
    (lambda: batches.poisson(0.0, 1, 10), "above 0 and at most 1"),
    (lambda: batches.poisson(math.nan, 1, 10), "above 0 and at most 1"),
    (lambda: jax.vmap(lambda rate: batches.poisson(rate, 1, 10).order(KEY, jnp.int32(3)))(jnp.ones(2)), "known outside of jit"),
    (lambda: batches.poisson(0.5, 0, 10), "num_steps is 0"),
    (lambda: batches.poisson(0.5, 1.5, 10), "num_steps must be a whole number"),
    (lambda: batches.poisson(0.5, 1, 0), "max_records is 0"),
    (lambda: batches.poisson(0.5, 1, 2**31), "at most 1073741824 records"),
    (lambda: batches.poisson(0.5, 1, 10, capacity=4), "capacity of 4 would cut most batches of a site of 10 records, which expect 5"),
    (lambda: batches.poisson(0.5, 1, 10, failure=0), "failure is a probability"),
    (lambda: batches.poisson_epochs(0.5, 0, 10), "num_epochs is 0"),
    (lambda: sampling.poisson(0.0, 5), "above 0 and at most 1"),
    (lambda: sampling.poisson(0.5, 10, capacity=4), "choose 5 to 10"),
    (lambda: sampling.poisson(0.5, 10, capacity=11), "choose 5 to 10"),
])
def test_bad_input_is_one_sentence(make, words):
    with pytest.raises(FlJaxError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


def test_rounds_are_the_same_in_any_number_of_lanes(plain_model):
    sites = sites_of(SIZES)
    work = batches.poisson(0.4, 3, int(SIZES.max()))
    states = []
    for lanes in (1, 3):
        algorithm = algorithms.fedavg(plain_model, optax.sgd(0.1), work, engine=Engine(lanes))
        state = algorithm.init(jax.jit(plain_model.init)(KEY), N)
        state, metrics = jax.jit(algorithm.round)(KEY, state, sampling.everyone().draw(KEY, jnp.int32(0), sites), sites)
        states.append(state.shared)
        assert (np.asarray(metrics.clients["steps"]) == 3).all()
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def clients_of(sampler, count):
    """bool[count, N]: who takes part."""
    cohorts = jax.jit(jax.vmap(lambda key: sampler.draw(key, jnp.int32(0), sites_of(SIZES))))(jax.random.split(KEY, count))
    present = np.zeros((count, N + 1), bool)
    taking = np.where(np.asarray(cohorts.weight) > 0, np.asarray(cohorts.ids), N)
    np.put_along_axis(present, taking, True, 1)
    return present[:, :N], cohorts


def test_clients_are_independent_coins_and_are_accounted_as_such():
    rate, count = 0.3, 40_000
    sampler = sampling.poisson(rate, N)
    present, cohorts = clients_of(sampler, count)
    assert cohorts.ids.shape == (count, N) and set(np.unique(cohorts.weight)) == {0, 1}
    sizes = np.bincount(present.sum(1), minlength=N + 1)
    assert stats.chisquare(sizes, stats.binom.pmf(np.arange(N + 1), N, rate) * count).pvalue > 1e-3
    assert min(stats.binomtest(int(column.sum()), count, rate).pvalue for column in present.T) * N > 1e-3
    assert pairs(present) > 1e-3
    assert sampler.amplify(EVENT) == dp.PoissonSampledDpEvent(rate, EVENT)
    assert sampler.amplify(dp.NonPrivateDpEvent()) == dp.NonPrivateDpEvent()
    assert privacy.natural_relation(sampler.amplify(EVENT)) is ADD
    seen = mechanism.replacing(EVENT)  # who takes part is seen: no amplification
    assert sampler.amplify(seen) == sampling.poisson(rate, N, capacity=4).amplify(seen) == seen
    both = sampler.amplify(dp.ComposedDpEvent([dp.GaussianDpEvent(2.0), dp.GaussianDpEvent(2.0)]))
    assert both.event.noise_multiplier == pytest.approx(math.sqrt(2))
    assert clients_of(sampling.poisson(1.0, N), 10)[0].all()


def test_cohorts_of_a_capacity_are_a_uniformly_random_subset_and_accounted_as_truncated():
    rate, length, count = 0.5, 4, 20_000
    sampler = sampling.poisson(rate, N, capacity=length)
    present, cohorts = clients_of(sampler, count)
    assert cohorts.ids.shape == (count, length)
    expected = np.append(stats.binom.pmf(np.arange(length), N, rate), stats.binom.sf(length - 1, N, rate)) * count
    assert stats.chisquare(np.bincount(present.sum(1), minlength=length + 1), expected).pvalue > 1e-3
    kinds = {subset: i for i, subset in enumerate(combinations(range(N), length))}
    found = np.bincount([kinds[tuple(np.flatnonzero(row))] for row in present[present.sum(1) == length]], minlength=len(kinds))
    assert stats.chisquare(found).pvalue > 1e-3
    assert sampler.amplify(EVENT) == dp.TruncatedSubsampledGaussianDpEvent(N, rate, length, 1.1)
    with pytest.raises(FlJaxError, match=f"made for 50 clients, and the data has {N}"):
        sampling.poisson(0.5, 50).draw(KEY, jnp.int32(0), sites_of(SIZES))
