"""Dealing, the simulation of lanes, and the choice of their number."""

import heapq
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import sites_of
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_jax import algorithms, batches, schedule
from fl_jax.core import Engine
from fl_jax.sampling import ALL_STEPS
from fl_jax.schedule import Cost
from fl_jax.types import Cohort

COHORT = 7  # one shape, so that `deal` compiles once a number of devices
deal = jax.jit(schedule.deal, static_argnums=2)
some_steps = st.lists(st.integers(0, 9), min_size=COHORT, max_size=COHORT)


def queues_of(ids, steps, devices) -> list[list[int]]:
    """The ids in each device's queue."""
    queues = deal(jnp.asarray(ids, jnp.int32), jnp.asarray(steps, jnp.int32), devices)
    return [[ids[slot] for slot in row[:length]] for row, length in zip(np.asarray(queues.slot), np.asarray(queues.length))]


@settings(max_examples=50, deadline=None)
@given(some_steps, st.permutations(range(20, 20 + COHORT)), st.sampled_from([1, 2, 3]))
def test_every_site_with_steps_is_dealt_once_longest_first_to_the_least_loaded(steps, ids, devices):
    queues = queues_of(ids, steps, devices)
    by_id = dict(zip(ids, steps))
    assert sorted(id for queue in queues for id in queue) == sorted(id for id in ids if by_id[id] > 0)
    heap = [(0, device) for device in range(devices)]
    expected = [[] for _ in range(devices)]
    for id in sorted((id for id in ids if by_id[id] > 0), key=lambda id: (-by_id[id], id)):
        load, device = heapq.heappop(heap)
        expected[device].append(id)
        heapq.heappush(heap, (load + by_id[id], device))
    assert queues == expected


@settings(max_examples=25, deadline=None)
@given(some_steps, st.permutations(range(COHORT)))
def test_the_deal_does_not_depend_on_the_cohorts_order(steps, order):
    ids = list(range(COHORT))
    assert queues_of(ids, steps, 2) == queues_of(list(order), [steps[id] for id in order], 2)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 4), st.integers(1, 6))
def test_the_makespan_lies_within_grahams_bounds(steps, devices, lanes):
    span, total, longest = schedule.makespan(steps, devices, lanes), sum(steps), max(steps, default=0)
    assert max(longest, -(-total // (devices * lanes))) <= span <= total
    assert schedule.makespan(steps, 1, 1) == total
    # list scheduling in any order: nobody idles before the last site begins
    assert schedule.makespan(steps, 1, lanes) <= total / lanes + longest * (1 - 1 / lanes) + 1e-9


@pytest.mark.parametrize("lanes", [1, 3])
def test_the_engine_makes_exactly_the_steps_of_the_simulation(plain_model, lanes):
    sizes = np.array([9, 1, 14, 3, 3, 30, 2, 11, 6])
    algorithm = algorithms.fedavg(plain_model, optax.sgd(0.1), batches.epochs(1, 2), engine=Engine(lanes))
    state, sites = algorithm.init(plain_model.init(jax.random.key(0)), len(sizes)), sites_of(sizes)
    round = jax.jit(algorithm.round)
    rng = np.random.default_rng(0)
    for _ in range(10):
        ids, caps = rng.permutation(len(sizes))[:6], np.where(rng.random(6) < 0.3, rng.integers(1, 4, 6), ALL_STEPS)
        weight = rng.random(6) < 0.8
        cohort = Cohort(jnp.asarray(ids, jnp.int32), jnp.asarray(weight, jnp.float32), jnp.asarray(caps, jnp.int32))
        _, metrics = round(jax.random.key(1), state, cohort, sites)
        steps = np.where(weight, np.minimum(-(-sizes[ids] // 2), caps), 0)
        assert float(metrics.server["steps"]) == steps.sum()
        assert float(metrics.server["lane_steps"]) / lanes == schedule.makespan(steps, 1, lanes)


@pytest.mark.parametrize("share, expected", [(1, [1]), (2, [1, 2]), (5, [1, 2, 3, 5]), (10, [1, 2, 3, 5, 10]), (50, None)])
def test_candidates_divide_a_share_into_full_turns(share, expected):
    found = schedule.candidate_lanes(share)
    assert found[0] == 1 and found[-1] == share and all(-(-share // -(-share // lanes)) == lanes for lanes in found)
    assert all(3 * a <= 2 * b for a, b in itertools.pairwise(found))
    assert expected in (None, found)


@pytest.mark.parametrize("fixed, per_lane, spill, best", [
    (1.0, 0.0, 0.0, 8),  # a step costs the same however many lanes: as many as there are sites
    (0.0, 1.0, 0.0, 1),  # a step costs as many times more: lanes gain nothing
    (1.0, 0.2, 5.0, 4),  # it pays to share the fixed cost until the carries leave the cache, here above four lanes
])
@pytest.mark.parametrize("devices", [1, 2])
def test_lanes_are_chosen_where_a_round_is_shortest(fixed, per_lane, spill, best, devices):
    asked = []

    def cost(lanes: int) -> Cost:
        asked.append(lanes)
        return Cost(fixed + per_lane * lanes + (spill if lanes > 4 else 0.0), 0.0)

    steps = np.full(30, 12)
    chosen, seconds = schedule.choose_lanes(steps, 8 * devices, cost, num_devices=devices, candidates=(1, 2, 4, 8))
    assert chosen == best and seconds[chosen] == min(seconds.values()) and asked == list(seconds)
    everything = {lanes: -(-8 // lanes) * 12 * cost(lanes).step for lanes in (1, 2, 4, 8)}
    assert seconds[chosen] == pytest.approx(min(everything.values()))


def test_candidates_after_a_bad_one_are_not_measured():
    _, seconds = schedule.choose_lanes(np.full(100, 10), 64, lambda lanes: Cost(float(lanes) ** 2, 0.0))
    assert list(seconds) == [1, 2]


def test_one_huge_site_wants_few_lanes():
    """No schedule beats the longest site's own steps, so wide steps only slow it down."""
    steps = np.array([1000, *[10] * 20])
    chosen, _ = schedule.choose_lanes(steps, 21, lambda lanes: Cost(1 + 0.5 * lanes, 0.0))
    assert chosen <= 2


def test_sites_cost_what_a_device_ends():
    _, with_sites = schedule.choose_lanes(np.full(10, 4), 10, lambda lanes: Cost(1.0, 2.0), num_devices=2, candidates=[1])
    assert with_sites == {1: pytest.approx(5 * 4 * 1.0 + 5 * 2.0)}
