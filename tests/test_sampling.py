"""Who takes part: uniform cohorts, exact numbers of stragglers, and the amplification that each sampler may claim."""

from itertools import combinations

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SIZES, sites_of
from scipy import stats

from fl_jax import batches, mechanism, sampling
from fl_jax.errors import FlJaxError

KEY = jax.random.key(3)
N = len(SIZES)
EVENT = dp_accounting.GaussianDpEvent(1.5)
BATCHES = batches.epochs(5, 4)


def many(sampler, sites, count=2_000):
    """`count` cohorts, stacked."""
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(lambda key: sampler.draw(key, 0, sites)))(jax.random.split(KEY, count)))


def test_everyone_takes_part_with_the_weights_asked_for(sites):
    cohort = sampling.everyone().draw(KEY, 0, sites)
    np.testing.assert_array_equal(cohort.ids, np.arange(N))
    np.testing.assert_array_equal(cohort.weight, SIZES)
    assert (np.asarray(cohort.steps) == sampling.ALL_STEPS).all()
    assert (cohort.ids.dtype, cohort.weight.dtype, cohort.steps.dtype) == (jnp.int32, jnp.float32, jnp.int32)
    np.testing.assert_array_equal(sampling.everyone(sampling.equal).draw(KEY, 0, sites).weight, np.ones(N))
    assert sampling.everyone().amplify(EVENT) is EVENT


@pytest.mark.parametrize("size", [1, 3, N])
def test_cohorts_of_a_fixed_size_are_distinct_and_every_set_is_equally_likely(sites, size):
    cohorts = many(sampling.fixed_size(size, N), sites, 8_000)
    assert cohorts.ids.shape == (8_000, size)
    np.testing.assert_array_equal(cohorts.weight, SIZES[cohorts.ids])
    sets = [tuple(sorted(set(ids))) for ids in cohorts.ids.tolist()]
    possible = list(combinations(range(N), size))
    assert set(sets) == set(possible)  # as long as the cohort: distinct
    if len(possible) > 1:
        assert stats.chisquare([sets.count(one) for one in possible]).pvalue > 1e-3
    included = np.bincount(cohorts.ids.ravel(), minlength=N) / 8_000
    assert np.abs(included - size / N).max() < 5 * np.sqrt(0.25 / 8_000)


def test_a_cohort_is_a_function_of_its_key(sites):
    draw = jax.jit(sampling.fixed_size(3, N).draw)
    np.testing.assert_array_equal(draw(KEY, 0, sites).ids, draw(KEY, 0, sites).ids)
    assert len({tuple(np.asarray(draw(jax.random.key(k), 0, sites).ids)) for k in range(20)}) > 10


def test_fixed_size_claims_sampling_without_replacement():
    assert sampling.fixed_size(3, 50).amplify(EVENT) == dp_accounting.SampledWithoutReplacementDpEvent(50, 3, EVENT)


@pytest.mark.parametrize("size", [0, -1, N + 1])
def test_a_cohort_that_cannot_be_drawn_is_refused(size):
    with pytest.raises(FlJaxError, match=f"choose 1 to {N}"):
        sampling.fixed_size(size, N)


def test_a_sampler_for_another_number_of_sites_is_refused(sites):
    with pytest.raises(FlJaxError, match=f"made for 50 clients, and the data has {N}"):
        sampling.fixed_size(3, 50).draw(KEY, 0, sites)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_each_client_drops_out_with_the_rate_by_itself(sites, rate):
    sampler = sampling.with_dropouts(sampling.fixed_size(4, N), rate)
    cohorts = many(sampler, sites)
    gone = cohorts.weight == 0
    np.testing.assert_array_equal(cohorts.weight[~gone], SIZES[cohorts.ids][~gone])
    if rate in (0, 1):
        assert (gone == (rate == 1)).all()
    else:
        expected = stats.binom.pmf(range(5), 4, rate) * len(gone)
        assert stats.chisquare(np.bincount(gone.sum(1), minlength=5), expected).pvalue > 1e-3
        assert stats.chisquare(gone.sum(0)).pvalue > 1e-3
    assert sampler.amplify(EVENT) == sampling.fixed_size(4, N).amplify(EVENT)


@pytest.mark.parametrize(("rate", "slow"), [(0.0, 0), (0.5, 2), (0.9, 4), (0.6, 2), (1.0, 4)])
def test_stragglers_are_as_many_as_the_rate_says_and_do_some_but_not_all_epochs(sites, rate, slow):
    sampler = sampling.with_stragglers(sampling.fixed_size(4, N, sampling.equal), rate, BATCHES, 5)
    cohorts = many(sampler, sites)
    late = cohorts.steps != sampling.ALL_STEPS
    assert (late.sum(1) == slow).all() and (cohorts.weight == 1).all()
    if 0 < slow < 4:
        assert stats.chisquare(late.sum(0)).pvalue > 1e-3
    if slow:
        per_pass = -(-SIZES[cohorts.ids] // 4)
        assert (cohorts.steps[late] % per_pass[late] == 0).all()
        done = cohorts.steps[late] // per_pass[late]
        assert set(done) == {1, 2, 3, 4} and stats.chisquare(np.bincount(done)[1:]).pvalue > 1e-3
    assert sampler.amplify(EVENT) == sampling.fixed_size(4, N).amplify(EVENT)


def test_stragglers_make_at_least_one_step_of_less_than_an_epoch(sites):
    cohorts = many(sampling.with_stragglers(sampling.everyone(), 1.0, batches.epochs(0.5, 4), 10), sites)
    full = np.ceil(np.ceil(SIZES / 4) / 2)
    assert cohorts.steps.min() == 1 and (cohorts.steps <= full).all()


def test_dropped_stragglers_are_those_who_would_have_been_slow(sites):
    base = sampling.fixed_size(4, N)
    slow, dropped = (many(sampling.with_stragglers(base, 0.5, BATCHES, 5, dropped=d), sites) for d in (False, True))
    np.testing.assert_array_equal(slow.ids, dropped.ids)
    np.testing.assert_array_equal(slow.steps != sampling.ALL_STEPS, dropped.weight == 0)
    assert (dropped.steps == sampling.ALL_STEPS).all() and ((dropped.weight == 0).sum(1) == 2).all()


def test_a_straggler_needs_two_epochs():
    with pytest.raises(FlJaxError, match="2 or more"):
        sampling.with_stragglers(sampling.everyone(), 0.5, BATCHES, 1)


@pytest.mark.parametrize(("size", "separation", "more"), [(1, 1, 0), (1, 6, 0), (3, 4, 0), (2, 5, 3), (4, 2, 1), (1, 3, 5)])
def test_participations_are_as_far_apart_as_promised_whatever_the_keys(size, separation, more):
    n, rounds = size * separation + more, 5 * separation + 3
    sampler, sites = sampling.separated(size, n, separation), sites_of(np.ones(n, int))
    times = 7 + jnp.arange(rounds)
    draw = jax.jit(jax.vmap(jax.vmap(lambda key, t: sampler.draw(key, t, sites)), (0, None)))
    ids = np.asarray(draw(jax.random.split(KEY, (20, rounds)), times).ids)
    assert ids.shape == (20, rounds, size) and ids.dtype == np.int32 and ids.min() >= 0 and ids.max() < n
    for run in ids:
        seen = {}
        for t, row in enumerate(run):
            assert len(set(row)) == size
            for id in row:
                assert t - seen.get(id, -separation) >= separation
                seen[id] = t
        if more == 0:
            assert len(seen) == n  # then everybody has a turn in every so many rounds


def test_of_the_group_whose_turn_it_is_every_set_is_equally_likely(sites):
    """13 clients in groups of 5, 4 and 4."""
    keys = jax.random.split(KEY, 6_000)
    thirteen = sites_of(np.ones(13, int))
    for t, members in ((0, [0, 3, 6, 9, 12]), (4, [1, 4, 7, 10]), (8, [2, 5, 8, 11])):
        ids = np.asarray(jax.jit(jax.vmap(lambda key, t=t: sampling.separated(2, 13, 3).draw(key, t, thirteen)))(keys).ids)
        pairs = [tuple(sorted(row)) for row in ids.tolist()]
        possible = list(combinations(members, 2))
        assert set(pairs) == set(possible) and stats.chisquare([pairs.count(pair) for pair in possible]).pvalue > 1e-3


@pytest.mark.parametrize(("size", "separation"), [(3, 3), (7, 1), (0, 1), (1, 0)])
def test_a_distance_that_there_are_not_clients_enough_for_is_refused(size, separation):
    with pytest.raises(FlJaxError, match="of 6 clients"):
        sampling.separated(size, N, separation)


def test_an_event_for_observers_who_see_the_cohort_is_not_amplified():
    event = mechanism.replacing(EVENT)
    for sampler in (sampling.everyone(), sampling.fixed_size(3, 50), sampling.poisson(0.1, 50), sampling.separated(2, 50, 9)):
        assert sampler.amplify(event) == event


def test_sites_take_part_from_the_round_they_join_to_the_one_they_leave(sites):
    joins, leaves = np.array([0, 1, 2, 0, 0, 3]), np.array([9, 9, 2, 9, 1, 9])
    sampler = sampling.with_presence(sampling.everyone(), joins, leaves)
    there = np.array([sampler.draw(KEY, jnp.int32(t), sites).weight > 0 for t in range(4)])
    assert (there == [[t >= a and t < b for a, b in zip(joins, leaves)] for t in range(4)]).all() and not there[:, 2].any()
    assert sampling.with_presence(sampling.everyone(), joins).draw(KEY, jnp.int32(2), sites).weight[4] == sites.size[4]
    assert sampler.amplify(EVENT) == EVENT
    with pytest.raises(FlJaxError, match="a round for each site"):
        sampling.with_presence(sampling.everyone(), joins, leaves[:3])
