"""The measurement of experiments.speed: rounds of FedAvg as one program, timed alone and in turn with the floor."""

import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmark.floor import Floor
from experiments.benchmark.workloads import Work, generate, load
from fl_jax import algorithms, batches, core, evaluation, sampling, sweep, trees, tuning
from fl_jax.core import Engine
from fl_jax.results.environment import peak_memory
from fl_jax.types import Array, Batches, Cohort, FederatedAlgorithm, Gradient, Key, PyTree, Sites, State, Variables

SLICE_SECONDS = 2.0  # a measurement of a pair lasts about so long, in whole rounds
CHUNK = 100  # records predicted at once
MIB = 2**20


class Rounds:
    """FedAvg on a work: any number of rounds is one call of one compiled program. gradient: the sites' oracle; the plain one by default."""

    def __init__(self, work: Work, engine: Engine, gradient: Gradient | None = None):
        self.work = work._replace(sites=core.on_every_device(work.sites, engine.mesh))
        self.algorithm = fedavg(work, engine, gradient)
        self._mesh = engine.mesh
        self._cohorts = core.on_every_device(jnp.asarray(work.cohorts), engine.mesh)
        self._run = jax.jit(self._loop)
        self._run_seeds = jax.jit(lambda rows, *common: sweep.each_run(lambda row, *common: self._loop(*row, *common))(rows, *common))

    def start(self) -> State:
        """The state before the first round."""
        return core.on_every_device(self.algorithm.init(self.work.variables, len(self.work.sites.size)), self._mesh)

    def run(self, state: State, first: int, last: int) -> tuple[State, dict[str, float], float]:
        """Rounds first : last from a state: the state after them, sums over them of what a round reports, and seconds."""
        key, bounds = jax.random.key(0), (jnp.int32(first), jnp.int32(last))
        start = time.perf_counter()
        state, totals = jax.block_until_ready(self._run(key, state, self._cohorts, self.work.sites, *bounds))
        return state, {name: float(total) for name, total in totals.items()}, time.perf_counter() - start

    def run_seeds(self, seeds: int, first: int, last: int) -> float:
        """Seconds of the same rounds for several seeds in one program; each has its own initial parameters and batches."""
        rows = self._seeds(seeds)
        start = time.perf_counter()
        jax.block_until_ready(self._run_seeds(rows, self._cohorts, self.work.sites, jnp.int32(first), jnp.int32(last)))
        return time.perf_counter() - start

    def loss(self, state: State) -> float:
        """The mean cross-entropy over the records eval_idx, of the model after training, in evaluation mode."""
        return float(self._evaluate(self.algorithm.model(state, jnp.int32(0)), self.work.sites, jnp.asarray(self.work.eval_idx)))

    def _seeds(self, seeds: int) -> tuple[Key, State]:
        keys = jax.random.split(jax.random.key(1), seeds)
        states = jax.vmap(lambda key: self.algorithm.init(self.work.model.init(key), len(self.work.sites.size)))(keys)
        return jax.block_until_ready(core.on_every_device((keys, states), self._mesh))

    def _loop(self, key: Key, state: State, cohorts: Array, sites: Sites, first: Array, last: Array) -> tuple[State, dict[str, Array]]:
        weights = self.work.workload.weights(sites)

        def one_round(r: Array, carry: PyTree) -> PyTree:
            state, totals = carry
            ids = cohorts[r]
            cohort = Cohort(ids, weights[ids], jnp.full(ids.shape, sampling.ALL_STEPS, jnp.int32))
            state, metrics = self.algorithm.round(jax.random.fold_in(key, r), state, cohort, sites)
            # the clients' own loss is part of what a round computes for its user
            now = {"steps": metrics.server["steps"], "lane_steps": metrics.server["lane_steps"], "loss": jnp.mean(metrics.clients["loss"])}
            return state, jax.tree.map(jnp.add, totals, now)

        nothing = {name: jnp.float32(0) for name in ("steps", "lane_steps", "loss")}
        return jax.lax.fori_loop(first, last, one_round, (state, nothing))

    @cached_property
    def _evaluate(self) -> Callable[[Variables, Sites, Array], Array]:
        model = self.work.model

        def evaluate(variables: Variables, sites: Sites, rows: Array) -> Array:
            x, y = trees.rows((sites.x, sites.y), rows)
            chosen = Sites(x, y, jnp.zeros(1, jnp.int32), jnp.full(1, len(rows), jnp.int32))
            outputs = evaluation.predict_all(variables, model.predict, chosen, CHUNK)
            assert model.evaluate is not None
            return jnp.mean(model.evaluate(outputs, y))

        return jax.jit(evaluate)


def fedavg(work: Work, engine: Engine, gradient: Gradient | None = None) -> FederatedAlgorithm:
    """FedAvg as a workload prescribes it."""
    return algorithms.fedavg(work.model, optax.sgd(work.workload.learning_rate), local_batches(work), gradient=gradient, engine=engine)


def local_batches(work: Work) -> Batches:
    """The batches of a client's round."""
    return batches.epochs(work.workload.epochs, work.workload.batch_size)


def measure(
    name: str, rounds: int, warmup: int, data: Path | None, lanes: int | str, pairs: int, seeds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Everything that experiments.speed reports, by name; see its head. data: a file that prescribes the work, None to generate it.
    lanes: on each device, or "auto". say: takes a sentence of progress."""
    work = generate(name, warmup + rounds) if data is None else load(name, data, warmup + rounds)
    workload, mesh = work.workload, core.client_mesh()
    engine, seconds_tuning = _engine(work, lanes, say)

    say("compiling and timing the rounds")
    start = time.perf_counter()
    federated = Rounds(work, engine)
    before, _, _ = federated.run(federated.start(), 0, warmup)
    seconds_first = time.perf_counter() - start
    after, totals, seconds_steady = federated.run(before, warmup, warmup + rounds)
    peak = peak_memory()
    examples = workload.epochs * int(np.asarray(work.sites.size)[work.cohorts[warmup : warmup + rounds]].sum())

    say("timing them in turn with the floor")
    floor = Floor(work)
    part = min(rounds, max(1, round(SLICE_SECONDS * rounds / seconds_steady)))
    ratios, floors = [], []
    for _ in range(pairs):
        _, slice_totals, ours = federated.run(before, warmup, warmup + part)
        floors.append(floor.seconds(round(slice_totals["steps"])) / slice_totals["steps"])
        ratios.append(floors[-1] * slice_totals["steps"] / ours)

    measured = {
        "name": "fl_jax",
        "workload": name,
        "rounds": rounds,
        "warmup": warmup,
        "seconds_first": seconds_first,
        "seconds_steady": seconds_steady,
        "examples": examples,
        "examples_per_s": examples / seconds_steady,
        "rounds_per_s": rounds / seconds_steady,
        "floor_examples_per_s": examples / totals["steps"] / float(np.median(floors)),
        "floor_ratio": float(np.median(ratios)),
        "wasted_steps": 1 - totals["steps"] / totals["lane_steps"],
        "peak_rss_mb": peak / MIB,
        "final_train_loss": federated.loss(after),
        "title": workload.title,
        "lanes": engine.lanes,
        "devices": 1 if mesh is None else mesh.size,
        "seconds_tuning": seconds_tuning,
        "floor_form": floor.form,
        "floor_ratios": ratios,
    }
    if seeds > 1:
        say(f"timing {seeds} seeds in one program")
        measured |= {"seeds": seeds, "seeds_ratio": _seeds_ratio(federated, before, seeds, warmup, part, pairs)}
    return measured


def _engine(work: Work, lanes: int | str, say: Callable[[str], None]) -> tuple[Engine, float]:
    mesh = core.client_mesh()
    if lanes != "auto":
        return Engine(int(lanes), mesh), 0.0
    say("choosing the number of lanes")
    cohort_size = work.cohorts.shape[1]
    tuned = tuning.tune_lanes(lambda engine: fedavg(work, engine), work.variables, work.sites, cohort_size, local_batches(work), mesh)
    for row in tuned.table:
        say(f"  {row.lanes} lanes: a step {1e6 * row.step_seconds:,.1f} us, a site {1e6 * row.site_seconds:,.0f} us, a round "
            f"{1e3 * row.round_seconds:,.1f} ms")
    return tuned.engine, tuned.seconds


def _seeds_ratio(federated: Rounds, before: State, seeds: int, first: int, part: int, pairs: int) -> float:
    """The time of so many seeds in one program in units of a single run, the median over pairs."""
    part = max(1, part // seeds)
    federated.run_seeds(seeds, first, first + part)  # compiles
    ratios = []
    for _ in range(pairs):
        _, _, single = federated.run(before, first, first + part)
        ratios.append(federated.run_seeds(seeds, first, first + part) / single)
    return float(np.median(ratios))
