"""A study as compiled programs: the functions that the host loop calls.

All runs of an arm (seeds, points of a grid) are rows of one compiled program, a block of rounds with the predictions after them
(fl_jax.arms); what is measured of these is one more program, which all arms share.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from fl_jax import evaluation, host_clients
from fl_jax.arms import Arm, Block, Facts, Outputs, Runs, Study, rounds_of_run, row_of, starts
from fl_jax.runtime import usable_cores
from fl_jax.sweep import each_run
from fl_jax.types import Array, Splits, State, Variables


class Measured(NamedTuple):
    """What the outputs are worth, of all runs."""

    validation: evaluation.SiteMetrics
    test: evaluation.SiteMetrics
    unseen: evaluation.UnseenMetrics


Measure = Callable[[Splits, Outputs], Measured]


class Program(NamedTuple):
    """An arm, ready to run. facts: what is known of it. initial: its state before training. rounds: how many it has. blocks: length -> compiled (runs, splits, state) ->
    (state, Block), for the lengths that a run from the start needs. compile: (length) -> such a block of another length."""

    name: str
    facts: Facts
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
        program = (_on_host if arm.clients_on_host else _on_device)(study, arm, runs, variables)
        bar.update()
        return program

    pool = ThreadPoolExecutor(max(1, min(usable_cores(), len(arms))))
    try:
        programs = [pool.submit(compiled, arm) for arm in arms]
        # predictions that come from the host go wherever a program wants them
        first = next((i for i, arm in enumerate(arms) if not arm.clients_on_host), 0)
        measuring = measure.lower(study.splits, programs[first].result()[1]).compile()
        return [program.result()[0] for program in programs], measuring
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C or an error nobody waits for arms that were not begun


def _on_device(study: Study, arm: Arm, runs: Runs, variables: Variables) -> tuple[Program, Outputs]:
    """The program of an arm, and what its predictions look like."""
    began = time.perf_counter()
    count = _rounds(study, arm)
    start, facts = starts(study, arm, runs, variables)
    initial = jax.jit(each_run(start, mesh=study.mesh))((runs, variables))

    def compile(length: int) -> Any:
        block = each_run(partial(rounds_of_run, study, arm, length), mesh=study.mesh)
        lowered = jax.jit(lambda runs, splits, state: block((runs, state), splits)).lower(runs, study.splits, initial)
        return lowered, lowered.compile()

    blocks: dict[int, Callable[..., tuple[State, Block]]] = {}
    for length in {block_length(study, count, done) for done in range(0, count, study.evaluate_every)}:
        lowered, call = compile(length)
        blocks[length] = call
    outputs = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        lowered.out_info[1].outputs, call.output_shardings[1].outputs)
    seconds = time.perf_counter() - began
    return Program(arm.name, facts, initial, blocks, seconds, count, lambda length: compile(length)[1]), outputs


def _on_host(study: Study, arm: Arm, runs: Runs, variables: Variables) -> tuple[Program, Outputs]:
    """The same of an arm whose clients' state lies on the host."""
    began = time.perf_counter()
    host = host_clients.compile(study, arm, runs, variables)
    seconds = time.perf_counter() - began
    return Program(arm.name, host.facts, host.initial, {}, seconds, _rounds(study, arm), host.block), host.outputs


def _rounds(study: Study, arm: Arm) -> int:
    return study.rounds if arm.rounds is None else arm.rounds


def _measure_run(study: Study, row: tuple[Array, Outputs], splits: Splits) -> Measured:
    data, outputs = row
    own = row_of(splits, data)
    return Measured(
        evaluation.score(study.model, outputs.validation, own.validation, study.metrics),
        evaluation.score(study.model, outputs.test, own.test, study.metrics),
        evaluation.score_unseen(study.model, outputs.unseen, own.unseen, study.metrics),
    )
