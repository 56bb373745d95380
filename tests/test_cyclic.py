"""Sites in turn: every site once a cycle, whatever the cohort looks like, and each trains what the one before it left."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SIZES

from fl_jax import algorithms, batches, sampling
from fl_jax.sampling import ALL_STEPS
from fl_jax.types import Cohort

BATCHES = batches.epochs(1, 64)  # the whole site in one step: no order of records to speak of
SGD = optax.sgd(0.3)
KEY = jax.random.key(5)
N = len(SIZES)


def cohort_of(ids, weight=None):
    ids = jnp.asarray(ids, jnp.int32)
    weight = jnp.ones(len(ids)) if weight is None else jnp.asarray(weight, jnp.float32)
    return Cohort(ids, weight, jnp.full(ids.shape, ALL_STEPS, jnp.int32))


@pytest.fixture(scope="module")
def cyclic(plain_model):
    algorithm = algorithms.cyclic(plain_model, SGD, BATCHES)
    return algorithm.init(plain_model.init(KEY), N), jax.jit(algorithm.round)


@pytest.fixture(scope="module")
def averaging(plain_model):
    return jax.jit(algorithms.fedavg(plain_model, SGD, BATCHES).round)


def visits(state, round, cohorts, sites, seed=0):
    """Who took part in each round, and the state after each."""
    seen, states = [], []
    for r, cohort in enumerate(cohorts):
        state, metrics = round(jax.random.fold_in(jax.random.key(seed), r), state, cohort, sites)
        seen.append(np.asarray(cohort.ids)[np.asarray(metrics.clients["participated"]) > 0].tolist())
        states.append(state)
    return seen, states


def test_each_cycle_visits_every_site_once_in_an_order_of_its_own(cyclic, sites):
    state, round = cyclic
    orders = set()
    for seed in range(4):
        seen, _ = visits(state, round, [cohort_of(range(N))] * 3 * N, sites, seed)
        assert all(len(ids) == 1 for ids in seen)
        cycles = [tuple(ids[0] for ids in seen[k : k + N]) for k in (0, N, 2 * N)]
        assert all(sorted(cycle) == list(range(N)) for cycle in cycles)
        orders |= {*cycles}
    assert len(orders) == 12


def test_a_cycle_is_the_sites_steps_one_after_another(cyclic, averaging, plain_model, sites):
    state, round = cyclic
    seen, states = visits(state, round, [cohort_of(range(N))] * N, sites)
    plain = algorithms.fedavg(plain_model, SGD, BATCHES).init(plain_model.init(KEY), N)
    for (id,), after in zip(seen, states, strict=True):
        plain, _ = averaging(KEY, plain, cohort_of([id, N], [3, 0]), sites)  # a site alone: its weight says nothing
        for a, b in zip(jax.tree.leaves(after.shared), jax.tree.leaves(plain.shared), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_who_is_not_there_is_passed_over_and_the_cohorts_order_and_padding_do_not_count(cyclic, sites):
    state, round = cyclic
    empty = sites._replace(size=sites.size.at[4].set(0))
    seen, states = visits(state, round, [cohort_of([0, 1, 2, 3, 4, 5], [1, 0, 1, 1, 1, 1])] * 8, empty)
    assert sorted(id for (id,) in seen[:4]) == sorted(id for (id,) in seen[4:]) == [0, 2, 3, 5]  # 1 dropped out, 4 has no records
    same, others = visits(state, round, [cohort_of([5, 3, N, 2, 0, 4])] * 8, empty)
    assert same == seen
    for a, b in zip(jax.tree.leaves(states[-1].shared), jax.tree.leaves(others[-1].shared), strict=True):
        np.testing.assert_array_equal(a, b)
    nobody, (after,) = visits(state, round, [cohort_of(range(6), np.zeros(6))], sites)
    assert nobody == [[]] and int(after.round) == 1
    for a, b in zip(jax.tree.leaves(after._replace(round=0)), jax.tree.leaves(state._replace(round=0)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_fixed_order_is_that_of_the_ids_and_runs_scan_and_map(plain_model, sites):
    algorithm = algorithms.cyclic(plain_model, SGD, BATCHES, shuffled=False)
    sampler = sampling.everyone()

    def run(key):
        def one(state, key):
            state, metrics = algorithm.round(key, state, sampler.draw(key, state.round, sites), sites)
            return state, jnp.argmax(metrics.clients["participated"])

        return jax.lax.scan(one, algorithm.init(plain_model.init(KEY), N), jax.random.split(key, N + 2))[1]

    seen = jax.jit(jax.vmap(run))(jax.random.split(KEY, 2))
    np.testing.assert_array_equal(seen, [[*range(N), 0, 1]] * 2)


def test_models_that_stay_at_their_sites_train_in_turn(plain_model, sites):
    algorithm = algorithms.in_turn(algorithms.local_only(plain_model, SGD, BATCHES))
    state = algorithm.init(plain_model.init(KEY), N)
    seen, (first, second) = visits(state, jax.jit(algorithm.round), [cohort_of(range(N))] * 2, sites)
    changed = np.any([np.any(np.asarray(a) != np.asarray(b), axis=tuple(range(1, a.ndim)))
                      for a, b in zip(jax.tree.leaves(first.clients), jax.tree.leaves(state.clients), strict=True)], axis=0)
    assert np.flatnonzero(changed).tolist() == seen[0] and seen[1] != seen[0]
    after = algorithm.model(second, jnp.int32(seen[0][0]))
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(algorithm.model(first, jnp.int32(seen[0][0]))), strict=True):
        np.testing.assert_array_equal(a, b)
