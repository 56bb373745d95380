"""The choice of lanes by measurement: against a machine whose costs are known, and with a real algorithm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SIZES, sites_of
from jax.experimental import io_callback

from fl_jax import algorithms, batches, tuning
from fl_jax.core import Engine
from fl_jax.errors import FlJaxError
from fl_jax.schedule import makespan, mean_span
from fl_jax.types import RoundMetrics, Variables

BATCHES = batches.epochs(2, 4)
NOTHING = Variables({}, {})


class Machine:
    """A clock, and rounds that take known seconds on it: `fixed`, and as many steps and sites as the engine would make of the cohort."""

    def __init__(self, sizes, step, site=0.02, fixed=0.5):
        self.now, self.rounds = 0.0, 0
        self.sizes, self.step, self.site, self.fixed = sizes, step, site, fixed

    def build(self, plain_model, engine: Engine):
        real = algorithms.fedavg(plain_model, optax.sgd(0.1), BATCHES, engine=engine)

        def spend(ids, caps):
            present = ids < len(self.sizes)
            steps = np.minimum(np.asarray(BATCHES.steps(self.sizes[ids[present]])), caps[present])
            self.now += self.fixed + makespan(steps, 1, engine.lanes) * self.step(engine.lanes) + self.site * len(steps)
            self.rounds += 1
            return np.int32(0)

        def round(key, state, cohort, sites):
            return io_callback(spend, jax.ShapeDtypeStruct((), jnp.int32), cohort.ids, cohort.steps), RoundMetrics({}, {})

        return real._replace(round=round, init=lambda variables, num_clients: jnp.int32(0))


@pytest.mark.parametrize("step, best", [(lambda lanes: 0.003, 6), (lambda lanes: 0.003 * lanes**1.2, 1)])
def test_known_costs_are_recovered_and_the_best_number_is_chosen(plain_model, monkeypatch, step, best):
    sizes = np.array([40, 44, 48, 52, 56, 60, 64, 68])
    machine = Machine(sizes, step)
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: machine.now)
    tuned = tuning.tune_lanes(lambda engine: machine.build(plain_model, engine), NOTHING, sites_of(sizes), 6, BATCHES, candidates=[1, 2, 3, 6])
    assert tuned.engine == Engine(best, None)
    for row in tuned.table:
        assert row.step_seconds == pytest.approx(step(row.lanes)) and row.site_seconds == pytest.approx(0.02)
        span = mean_span(np.asarray(BATCHES.steps(sizes)), 6, 1, row.lanes)
        assert row.round_seconds == pytest.approx(span * step(row.lanes) + 6 * 0.02)
    assert tuned.seconds == pytest.approx(machine.now) and machine.rounds < 150 * len(tuned.table)


def test_a_busy_moment_does_not_decide(plain_model, monkeypatch):
    """While the better candidate is measured first, everything takes a fifth longer; side by side it wins."""
    sizes = np.array([40, 44, 48, 52])
    machine = Machine(sizes, lambda lanes: 0.01 if lanes == 1 else 0.018)
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: machine.now)
    quiet = machine.step

    def build(engine):
        busy_until = machine.now + 1e9 if engine.lanes == 2 else 0.0
        machine.step = lambda lanes: quiet(lanes) * (1.2 if machine.now < busy_until and machine.rounds < machine.limit else 1.0)
        machine.limit = machine.rounds + 20
        return machine.build(plain_model, engine)

    tuned = tuning.tune_lanes(build, NOTHING, sites_of(sizes), 4, BATCHES, candidates=[1, 2])
    assert tuned.engine.lanes == 2 and tuned.table[1].step_seconds == pytest.approx(0.018)


def test_a_real_algorithm_is_measured_and_results_stay(plain_model, sites):
    variables = plain_model.init(jax.random.key(0))
    tuned = tuning.tune_lanes(
        lambda engine: algorithms.fedavg(plain_model, optax.sgd(0.1), BATCHES, engine=engine), variables, sites, 4, BATCHES, candidates=[2])
    assert tuned.engine == Engine(2, None) and [row.lanes for row in tuned.table] == [2]
    assert tuned.table[0].round_seconds >= 0 and tuned.seconds > 0


@pytest.mark.parametrize("sizes, candidates, words", [(SIZES * 0, None, "No site has a record"), (SIZES, [0, 1], "1 or more")])
def test_what_cannot_be_measured_is_refused(plain_model, sizes, candidates, words):
    sites = sites_of(SIZES)._replace(size=jnp.asarray(sizes, jnp.int32))
    with pytest.raises(FlJaxError, match=words):
        tuning.tune_lanes(lambda engine: None, NOTHING, sites, 4, BATCHES, candidates=candidates)
