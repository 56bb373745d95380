"""A study as compiled programs: what is trained and on what, and the functions that the host loop calls.

An arm is one thing that is trained. All its runs (seeds, points of a grid) are rows of one compiled program, a block of rounds with the
predictions after them; what is measured of these is one more program, which all arms share. What a run draws in round r depends on
its key and r alone.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from fl_jax import evaluation
from fl_jax.metrics import CLASSIFICATION, Metric
from fl_jax.runtime import usable_cores
from fl_jax.sweep import each_run
from fl_jax.types import Array, FederatedAlgorithm, Key, Model, PyTree, RoundMetrics, Sampling, Sites, Splits, State, Variables

MAX_DONORS = 16


class Runs(NamedTuple):
    """The rows of an arm's program. key: [S]. data: int32[S], which row of the study's splits. hyper: pytree of [S, ...], or ()."""

    key: Key
    data: Array
    hyper: PyTree = ()


class Arm(NamedTuple):
    """One thing that a study trains.

    name: as it is called in tables. build: (hyper) -> algorithm; hyper is one row of the runs' hyper-parameters, which may be
    tracers. sampling: (train sites of the federation) -> who takes part. view: which records the arm trains on, e.g.
    data.pooled_train for centralized training, whose one model is then evaluated at every site. rounds: how many of the study's it
    is trained for, such as those within a privacy budget; None: all.
    """

    name: str
    build: Callable[[PyTree], FederatedAlgorithm]
    sampling: Callable[[Sites], Sampling]
    view: Callable[[Splits], Splits] = lambda splits: splits
    rounds: int | None = None


class Study(NamedTuple):
    """What the arms of a study have in common.

    splits: the data, every leaf with a leading axis (data.stack): of one data set, or of one a seed. rounds, evaluate_every: the
    metrics of all sites are measured after every so many rounds and after the last. chunk: records predicted at once. mesh: of
    sweep.run_mesh, to share the runs out over devices; an arm's own engine must then have no mesh.
    """

    model: Model
    splits: Splits
    site_names: Sequence[str]
    unseen_names: Sequence[str]
    rounds: int
    evaluate_every: int
    chunk: int = 256
    metrics: Mapping[str, Metric] = CLASSIFICATION
    mesh: Mesh | None = None


class Block(NamedTuple):
    """What a block of T rounds hands on: cohort ids [S, T, c], the rounds' metrics, and the outputs of what sites deploy after them."""

    ids: Array
    rounds: RoundMetrics
    outputs: "Outputs"


class Outputs(NamedTuple):
    """Predictions [R, K] of the validation and test records, and [d, R, K] of unseen sites' records, with the models of d donors or, where
    they have support, with what they deploy themselves (d = 1)."""

    validation: Array
    test: Array
    unseen: Array


class Measured(NamedTuple):
    """What the outputs are worth, of all runs."""

    validation: evaluation.SiteMetrics
    test: evaluation.SiteMetrics
    unseen: evaluation.UnseenMetrics


def seeds_of(seeds: Sequence[int], *, stacked: bool) -> Runs:
    """One run a seed. stacked: whether run i has data set i of the study's splits, or all have the one that there is."""
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    return Runs(keys, jnp.arange(len(seeds), dtype=jnp.int32) if stacked else jnp.zeros(len(seeds), jnp.int32))


Measure = Callable[[Splits, Outputs], Measured]


class Program(NamedTuple):
    """An arm, ready to run. initial: its state before training. rounds: how many it has. blocks: length -> compiled (runs, splits, state) ->
    (state, Block), for the lengths that a run from the start needs. compile: (length) -> such a block of another length."""

    name: str
    num_clients: int
    payload: tuple[int, int]
    initial: State
    blocks: dict[int, Callable[..., tuple[State, Block]]]
    compile_seconds: float
    rounds: int
    compile: Callable[[int], Callable[..., tuple[State, Block]]]


def block_length(study: Study, rounds: int, done: int) -> int:
    """How many of an arm's rounds the block has that begins after `done` of them: up to the next round at which all arms are measured."""
    return min(study.evaluate_every - done % study.evaluate_every, rounds - done)


def compile_arms(study: Study, arms: Sequence[Arm], runs: Runs, bar: tqdm) -> tuple[list[Program], Measure]:
    """Compiles the arms side by side: XLA compiles a program on one core, and lets go of Python meanwhile."""
    measure = jax.jit(lambda splits, outputs: each_run(partial(_measure_run, study), mesh=study.mesh)((runs.data, outputs), splits))
    # the initial variables of a run are those of its seed, whatever the arm
    variables = jax.jit(each_run(lambda run: study.model.init(jax.random.split(run.key)[0]), mesh=study.mesh))(runs)

    def compiled(arm: Arm) -> tuple[Program, Outputs]:
        began = time.perf_counter()
        count = study.rounds if arm.rounds is None else arm.rounds
        start, rounds, num_clients, payload = _functions(study, arm, runs, variables)
        initial = jax.jit(each_run(start, mesh=study.mesh))((runs, variables))

        def compile(length: int) -> Any:
            block = each_run(partial(rounds, length), mesh=study.mesh)
            lowered = jax.jit(lambda runs, splits, state: block((runs, state), splits)).lower(runs, study.splits, initial)
            return lowered, lowered.compile()

        blocks: dict[int, Callable[..., tuple[State, Block]]] = {}
        for length in {block_length(study, count, done) for done in range(0, count, study.evaluate_every)}:
            lowered, call = compile(length)
            blocks[length] = call
        outputs = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            lowered.out_info[1].outputs, call.output_shardings[1].outputs)
        bar.update()
        seconds = time.perf_counter() - began
        return Program(arm.name, num_clients, payload, initial, blocks, seconds, count, lambda length: compile(length)[1]), outputs

    pool = ThreadPoolExecutor(max(1, min(usable_cores(), len(arms))))
    try:
        programs = [pool.submit(compiled, arm) for arm in arms]
        measuring = measure.lower(study.splits, programs[0].result()[1]).compile()
        return [program.result()[0] for program in programs], measuring
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C or an error nobody waits for arms that were not begun


def _functions(
    study: Study, arm: Arm, runs: Runs, variables: Variables
) -> tuple[Callable[[tuple[Runs, Variables]], State], Callable[..., tuple[State, Block]], int, tuple[int, int]]:
    """Of one run: start (run, variables) -> state, rounds (length, (run, state), splits) -> (state, Block); the clients, and the payload of one."""
    num_clients = jax.eval_shape(lambda splits: arm.view(row_of(splits, jnp.int32(0))), study.splits).train.size.shape[0]
    donors = jnp.asarray(np.unique(np.linspace(0, len(study.site_names) - 1, MAX_DONORS).round()), jnp.int32)
    payload: list[tuple[int, int]] = []

    def start(row: tuple[Runs, Variables]) -> State:
        run, variables = row
        algorithm = arm.build(run.hyper)
        state = algorithm.init(variables, num_clients)
        payload.append(algorithm.payload(state))  # of shapes alone, so known while tracing
        return state

    def rounds(length: int, row: tuple[Runs, State], splits: Splits) -> tuple[State, Block]:
        run, state = row
        own = row_of(splits, run.data)
        algorithm, sampling, seen = arm.build(run.hyper), arm.sampling(own.train), arm.view(own)
        run_key = jax.random.split(run.key)[1]

        def one(state: State, _: None) -> tuple[State, tuple[Array, RoundMetrics]]:
            cohort_key, round_key = jax.random.split(jax.random.fold_in(run_key, state.round))
            cohort = sampling.draw(cohort_key, state.round, seen.train)
            state, metrics = algorithm.round(round_key, state, cohort, seen.train)
            return state, (cohort.ids, metrics)

        state, (ids, metrics) = jax.lax.scan(one, state, length=length)

        # what sites deploy depends on the round and not on how often it is looked at
        deploying = jax.random.fold_in(run_key, jnp.iinfo(jnp.int32).max - state.round)

        def deployed(id: Array) -> Variables:
            return algorithm.deploy(jax.random.fold_in(deploying, id), state, id, own.train)

        def welcomed(support: Sites, id: Array) -> Variables:
            return algorithm.welcome(jax.random.fold_in(deploying, own.train.size.shape[0] + id), state, id, support)

        predict = study.model.predict
        if own.support is None:
            unseen = evaluation.predict_unseen(deployed, predict, own.unseen, donors, study.chunk)
        else:
            unseen = evaluation.predict_sites(partial(welcomed, own.support), predict, own.unseen, study.chunk)[None]
        validation, test = evaluation.predict_splits(deployed, predict, (own.validation, own.test), study.chunk)
        return state, Block(ids, metrics, Outputs(validation, test, unseen))

    jax.eval_shape(start, jax.tree.map(lambda leaf: leaf[0], (runs, variables)))
    return start, rounds, num_clients, payload[0]


def _measure_run(study: Study, row: tuple[Array, Outputs], splits: Splits) -> Measured:
    data, outputs = row
    own = row_of(splits, data)
    return Measured(
        evaluation.score(study.model, outputs.validation, own.validation, study.metrics),
        evaluation.score(study.model, outputs.test, own.test, study.metrics),
        evaluation.score_unseen(study.model, outputs.unseen, own.unseen, study.metrics),
    )


def row_of(splits: Splits, index: Array) -> Splits:
    """One of the stacked data sets; where there is one only, without a copy."""
    return jax.tree.map(lambda leaf: leaf[0] if leaf.shape[0] == 1 else leaf[index], splits)
