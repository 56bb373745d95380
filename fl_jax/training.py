"""The host loop of a study: blocks of rounds on the device, an evaluation after each, rows, checkpoints, progress.

An arm is one thing that is trained. All its runs (seeds, points of a grid) are rows of one compiled program, a block of rounds with the
predictions after them; what is measured of these is one more program, which all arms share. What a run draws in round r depends on
its key and r alone; so a run that was killed and resumed equals one that was not, bit for bit.
"""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax.sharding import Mesh
from tqdm import tqdm

from fl_jax import evaluation
from fl_jax.checkpoint import Checkpoints
from fl_jax.core import on_every_device
from fl_jax.errors import FlJaxError
from fl_jax.metrics import CLASSIFICATION, Metric
from fl_jax.results.rows import OVER_SITES, evaluation_rows, round_rows
from fl_jax.results.run_folder import MetricRow, RunFolder, frame
from fl_jax.runtime import usable_cores
from fl_jax.sweep import each_run
from fl_jax.types import (
    Array,
    FederatedAlgorithm,
    Key,
    Metrics,
    Model,
    PyTree,
    RoundMetrics,
    Sampling,
    Sites,
    Splits,
    State,
    Variables,
)

MAX_DONORS = 16
MOST_NAMED = 10


class Runs(NamedTuple):
    """The rows of an arm's program. key: [S]. data: int32[S], which row of the study's splits. hyper: pytree of [S, ...], or ()."""

    key: Key
    data: Array
    hyper: PyTree = ()


class Arm(NamedTuple):
    """One thing that a study trains.

    name: as it is called in tables. build: (hyper) -> algorithm; hyper is one row of the runs' hyper-parameters, which may be
    tracers. sampling: (train sites of the federation) -> who takes part. view: which records the arm trains on, e.g.
    data.pooled_train for centralized training, whose one model is then evaluated at every site.
    """

    name: str
    build: Callable[[PyTree], FederatedAlgorithm]
    sampling: Callable[[Sites], Sampling]
    view: Callable[[Splits], Splits] = lambda splits: splits


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


class Fit(NamedTuple):
    """What came of an arm. rows: the metrics (results.COLUMNS). state: the last, every leaf [S, ...]. payload: bytes (down, up) of a
    client and round. seconds: spent computing and compile_seconds: compiling, by this process."""

    rows: pd.DataFrame
    state: State
    payload: tuple[int, int]
    seconds: float
    compile_seconds: float


class Block(NamedTuple):
    """What a block of T rounds hands on: cohort ids [S, T, c], the rounds' metrics, and the outputs of what sites deploy after them."""

    ids: Array
    rounds: RoundMetrics
    outputs: "Outputs"


class Outputs(NamedTuple):
    """Predictions [R, K] of the validation and test records, and [d, R, K] of unseen sites' records with the models of d donors."""

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


def fit(
    study: Study, arms: Sequence[Arm], seeds: Sequence[int], runs: Runs, *,
    folder: RunFolder | None = None, resume: bool = False, progress: bool = True,
) -> dict[str, Fit]:
    """Trains the arms one after another, each in all its runs, and measures them at every site.

    seeds: int label of each run in the rows. folder: where rows are appended and checkpoints kept (checkpoints/<arm>), one after
    each evaluation; None keeps everything in memory. resume: goes on from the newest intact checkpoint of each arm, bit for bit.
    progress: a bar with rounds/s and the time left, on a terminal only.

    Ctrl-C ends the block that runs, saves it and raises KeyboardInterrupt; a second one stops at once. Raises FlJaxError where every
    message of a round was not finite, naming the round and the sites: what was saved before stays.
    """
    _check(study, arms, seeds, runs)
    study = study._replace(splits=on_every_device(study.splits, study.mesh))
    with tqdm(total=len(arms), desc="compiling", unit="arm", leave=False, disable=None if progress else True) as bar:
        programs, measure = _compile_arms(study, arms, runs, bar)
    with _interruptible() as stop:
        return {
            program.name: _fit_arm(study, program, measure, seeds, runs, stop, folder, resume, progress) for program in programs
        }


def _check(study: Study, arms: Sequence[Arm], seeds: Sequence[int], runs: Runs) -> None:
    if study.rounds < 1 or study.evaluate_every < 1:
        raise FlJaxError(f"rounds is {study.rounds} and evaluate_every {study.evaluate_every}: give 1 or more for both.")
    for name in (*study.site_names, *study.unseen_names):
        if name in OVER_SITES:
            raise FlJaxError(f"a site is called {name!r}, as rows over all sites are: give it another name.")
    folders = [f"{_folder_name(arm.name)}".casefold() for arm in arms]
    for arm, folder in zip(arms, folders, strict=True):
        if folders.count(folder) > 1:
            raise FlJaxError(f"two arms are called {arm.name!r} or differ from it in punctuation or case only: name them apart.")
    if not len(seeds) == runs.key.shape[0] == runs.data.shape[0]:
        raise FlJaxError(f"there are {len(seeds)} seeds for {runs.key.shape[0]} keys and {runs.data.shape[0]} data sets: give each run one.")


Measure = Callable[[Splits, Outputs], Measured]


class _Program(NamedTuple):
    """An arm, ready to run. initial: its state before training. blocks: length -> compiled (runs, splits, state) -> (state, Block)."""

    name: str
    num_clients: int
    payload: tuple[int, int]
    initial: State
    blocks: dict[int, Callable[..., tuple[State, Block]]]
    compile_seconds: float


def _fit_arm(
    study: Study, arm: _Program, measure: Measure, seeds: Sequence[int], runs: Runs, stop: threading.Event,
    folder: RunFolder | None, resume: bool, progress: bool,
) -> Fit:
    with contextlib.ExitStack() as stack:
        began = time.perf_counter()
        state, done, rows = arm.initial, 0, frame([])
        checkpoints = None
        if folder is not None:
            checkpoints = stack.enter_context(Checkpoints(folder.path / "checkpoints" / _folder_name(arm.name), folder.config))
            if resume:
                found = checkpoints.restore_latest(state)
                done, state = (found[0], found[1]) if found is not None else (0, state)
                folder.truncate_after(arm.name, done)
                rows = folder.metrics()
                rows = rows[rows["arm"] == arm.name]
        bar = stack.enter_context(tqdm(
            total=study.rounds, initial=done, desc=arm.name, unit="round", leave=False, disable=None if progress else True))
        while done < study.rounds:
            length = min(study.evaluate_every, study.rounds - done)
            state, block = arm.blocks[length](runs, study.splits, state)
            measured = measure(study.splits, block.outputs)
            block, measured = jax.device_get((block, measured))
            _refuse_all_nonfinite(study, arm, seeds, done, block)
            new = list(_block_rows(study, arm, seeds, done + length, block, measured))
            done += length
            if folder is not None and checkpoints is not None:
                folder.append_metrics(new)
                checkpoints.save(done, state, {"arm": arm.name, "rounds": study.rounds})
            rows = pd.concat([rows, frame(new)], ignore_index=True)
            bar.update(length)
            if stop.is_set():
                kept = f"; it is saved in {folder.path} and can be resumed" if folder is not None else ""
                raise KeyboardInterrupt(f"stopped after round {done} of {study.rounds} of {arm.name}{kept}.")
    return Fit(rows, state, arm.payload, time.perf_counter() - began, arm.compile_seconds)


def _compile_arms(study: Study, arms: Sequence[Arm], runs: Runs, bar: tqdm) -> tuple[list[_Program], Measure]:
    """Compiles the arms side by side: XLA compiles a program on one core, and lets go of Python meanwhile."""
    measure = jax.jit(lambda splits, outputs: each_run(partial(_measure_run, study), mesh=study.mesh)((runs.data, outputs), splits))
    # the initial variables of a run are those of its seed, whatever the arm
    variables = jax.jit(each_run(lambda run: study.model.init(jax.random.split(run.key)[0]), mesh=study.mesh))(runs)
    whole, rest = min(study.evaluate_every, study.rounds), study.rounds % study.evaluate_every
    lengths = {whole} | ({rest} if study.rounds > study.evaluate_every and rest else set())

    def compiled(arm: Arm) -> tuple[_Program, Outputs]:
        began = time.perf_counter()
        start, rounds, num_clients, payload = _functions(study, arm, runs, variables)
        initial = jax.jit(each_run(start, mesh=study.mesh))((runs, variables))
        blocks: dict[int, Callable[..., tuple[State, Block]]] = {}
        for length in lengths:
            block = each_run(partial(rounds, length), mesh=study.mesh)
            lowered = jax.jit(lambda runs, splits, state, block=block: block((runs, state), splits)).lower(runs, study.splits, initial)
            call = blocks[length] = lowered.compile()
        outputs = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            lowered.out_info[1].outputs, call.output_shardings[1].outputs)
        bar.update()
        return _Program(arm.name, num_clients, payload, initial, blocks, time.perf_counter() - began), outputs

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
    num_clients = jax.eval_shape(lambda splits: arm.view(_row(splits, jnp.int32(0))), study.splits).train.size.shape[0]
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
        own = _row(splits, run.data)
        algorithm, sampling, seen = arm.build(run.hyper), arm.sampling(own.train), arm.view(own)
        run_key = jax.random.split(run.key)[1]

        def one(state: State, _: None) -> tuple[State, tuple[Array, RoundMetrics]]:
            cohort_key, round_key = jax.random.split(jax.random.fold_in(run_key, state.round))
            cohort = sampling.draw(cohort_key, seen.train)
            state, metrics = algorithm.round(round_key, state, cohort, seen.train)
            return state, (cohort.ids, metrics)

        state, (ids, metrics) = jax.lax.scan(one, state, length=length)

        def deployed(id: Array) -> Variables:
            return algorithm.model(state, id)

        def predict(sites: Sites) -> Array:
            return evaluation.predict_sites(deployed, study.model.predict, sites, study.chunk)

        unseen = evaluation.predict_unseen(deployed, study.model.predict, own.unseen, donors, study.chunk)
        return state, Block(ids, metrics, Outputs(predict(own.validation), predict(own.test), unseen))

    jax.eval_shape(start, jax.tree.map(lambda leaf: leaf[0], (runs, variables)))
    return start, rounds, num_clients, payload[0]


def _measure_run(study: Study, row: tuple[Array, Outputs], splits: Splits) -> Measured:
    data, outputs = row
    own = _row(splits, data)
    return Measured(
        evaluation.score(study.model, outputs.validation, own.validation, study.metrics),
        evaluation.score(study.model, outputs.test, own.test, study.metrics),
        evaluation.score_unseen(study.model, outputs.unseen, own.unseen, study.metrics),
    )


def _row(splits: Splits, index: Array) -> Splits:
    """One of the stacked data sets; where there is one only, without a copy."""
    return jax.tree.map(lambda leaf: leaf[0] if leaf.shape[0] == 1 else leaf[index], splits)


def _block_rows(
    study: Study, arm: _Program, seeds: Sequence[int], done: int, block: Block, measured: Measured
) -> Iterator[MetricRow]:
    first = done - block.ids.shape[1] + 1
    yield from round_rows(arm.name, seeds, first, block.rounds, arm.payload)
    for split, names in (("validation", study.site_names), ("test", study.site_names), ("unseen", study.unseen_names)):
        yield from evaluation_rows(arm.name, seeds, done, split, names, getattr(measured, split))


def _refuse_all_nonfinite(study: Study, arm: _Program, seeds: Sequence[int], done: int, block: Block) -> None:
    """Raises where a round had messages and none of them was finite."""
    server: Metrics = block.rounds.server
    dead = np.argwhere((np.asarray(server["participants"]) == 0) & (np.asarray(server["nonfinite"]) > 0))
    if len(dead):
        s, t = dead[np.argmin(dead[:, 1])]
        bad = np.asarray(block.ids)[s, t][np.asarray(block.rounds.clients["nonfinite"])[s, t] > 0].tolist()
        own = arm.num_clients == len(study.site_names)  # else the arm has a view of its own, such as all records at one place
        names = [study.site_names[i] if own else f"client {i} of {arm.num_clients}" for i in bad]
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        raise FlJaxError(
            f"{arm.name}, seed {seeds[s]}: in round {done + int(t) + 1} no site sent a finite update "
            f"({', '.join(names[:MOST_NAMED])}{more}); lower the learning rate or look at these sites' records.")


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into an event, so that the block under way can be saved; the second one is a KeyboardInterrupt."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handler(number: int, _frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        tqdm.write("Stopping after this block of rounds; press Ctrl-C again to stop at once.", file=sys.stderr)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _folder_name(arm: str) -> Path:
    return Path("".join(c if c.isalnum() or c in "-_.()=" else "_" for c in arm))
