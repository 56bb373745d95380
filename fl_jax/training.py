"""The host loop of a study: blocks of rounds on the device, an evaluation after each, rows, checkpoints, progress.

Its arms (fl_jax.arms, whose Arm, Runs, Study and seeds_of are at hand here too) are compiled by fl_jax.programs. A run that was killed and resumed
equals one that was not, bit for bit.
"""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
from tqdm import tqdm

from fl_jax.arms import Arm, Block, Runs, Study, seeds_of
from fl_jax.checkpoint import Checkpoints
from fl_jax.core import on_every_device
from fl_jax.errors import FlJaxError
from fl_jax.privacy import Guarantee, PrivacyLedger
from fl_jax.programs import Measure, Measured, Program, block_length, compile_arms
from fl_jax.results.rows import OVER_SITES, Label, evaluation_rows, round_rows
from fl_jax.results.run_folder import MetricRow, RunFolder, frame
from fl_jax.spending import NOTHING, Spending, check_meta, epsilon_rows, spending_of, to_meta, within_budget, worst_epsilon
from fl_jax.types import Metrics, State

__all__ = ["Arm", "Fit", "Runs", "Study", "fit", "seeds_of"]

MOST_NAMED = 10


class Fit(NamedTuple):
    """What came of an arm. rows: the metrics (results.COLUMNS). state: the last, every leaf [S, ...]. payload: bytes (down, up) of a
    client and round. seconds: spent computing and compile_seconds: compiling, by this process. ledgers: what was spent on privacy, of
    each run one for each guarantee. norms: the BatchNorm policy."""

    rows: pd.DataFrame
    state: State
    payload: tuple[int, int]
    seconds: float
    compile_seconds: float
    ledgers: tuple[tuple[PrivacyLedger, ...], ...] = ()
    norms: str = ""


def fit(
    study: Study, arms: Sequence[Arm], seeds: Sequence[int], runs: Runs, *,
    variants: Sequence[str] = (), folder: RunFolder | None = None, resume: bool = False, progress: bool = True,
    may_diverge: bool = False, privacy: Mapping[str, Sequence[Guarantee]] | None = None,
) -> dict[str, Fit]:
    """Trains the arms one after another, each in all its runs, and measures them at every site.

    seeds: int label of each run in the rows. variants: what the rows of each run add to the arm's name, such as ", mu 1", where runs
    differ in more than their seed. folder: where rows are appended and checkpoints kept (checkpoints/<arm>), one after
    each evaluation; None keeps everything in memory. resume: goes on from the newest intact checkpoint of each arm, bit for bit.
    progress: a bar with rounds/s and the time left, on a terminal only. may_diverge: a run in which every message of a round was not
    finite goes on with the model that it has, and its rows of that round say "participants" 0 and "nonfinite" more: for grids of
    learning rates.
    privacy: by an arm's name, what it promises (fl_jax.privacy.Guarantee). Its epsilon is in the rows (spending.epsilon_rows) and in the bar,
    its ledger in the checkpoints. An arm ends before the first round that would overspend a budget, and says so; a resumed one
    must have the ledger that it was saved with. Runs are alternatives: a ledger is of one run.

    Ctrl-C ends the block that runs, saves it and raises KeyboardInterrupt; a second one stops at once. Raises FlJaxError where every
    message of a round was not finite, unless that is allowed, naming the round and the sites: what was saved before stays.
    """
    variants = variants or [""] * len(seeds)
    _check(study, arms, seeds, runs, variants)
    study = study._replace(splits=on_every_device(study.splits, study.mesh))
    arms, spendings = _limited(study, arms, runs, privacy or {})
    with tqdm(total=len(arms), desc="compiling", unit="arm", leave=False, disable=None if progress else True) as bar:
        programs, measure = compile_arms(study, arms, runs, bar)
    if folder is not None:
        folder.compile_seconds += sum(program.compile_seconds for program in programs)
        folder.record_arms({program.name: {"BatchNorm": program.facts.norms, "clients": program.facts.num_clients, "rounds": program.rounds}
                            for program in programs})
    with _interruptible() as stop:
        return {
            program.name: _fit_arm(
                study, program, measure, [Label(f"{program.name}{variant}", seed) for variant, seed in zip(variants, seeds, strict=True)],
                runs, stop, folder, resume, progress, may_diverge, spendings[program.name])
            for program in programs
        }


def _limited(
    study: Study, arms: Sequence[Arm], runs: Runs, privacy: Mapping[str, Sequence[Guarantee]]
) -> tuple[list[Arm], dict[str, Spending]]:
    """The arms with the rounds that their budgets allow, and what each spends."""
    unknown = set(privacy) - {arm.name for arm in arms}
    if unknown:
        raise FlJaxError(f"a guarantee is given for {min(unknown)!r}, and the arms are {', '.join(arm.name for arm in arms)}.")
    spendings = {arm.name: spending_of(study, arm, runs, privacy.get(arm.name, ())) for arm in arms}
    limited = []
    for arm in arms:
        arm, sentence = within_budget(arm, spendings[arm.name], study.rounds if arm.rounds is None else arm.rounds)
        limited.append(arm)
        if sentence:
            tqdm.write(sentence, file=sys.stderr)
    return limited, spendings


def _check(study: Study, arms: Sequence[Arm], seeds: Sequence[int], runs: Runs, variants: Sequence[str]) -> None:
    if study.rounds < 1 or study.evaluate_every < 1:
        raise FlJaxError(f"rounds is {study.rounds} and evaluate_every {study.evaluate_every}: give 1 or more for both.")
    for name in (*study.site_names, *study.unseen_names):
        if name in OVER_SITES:
            raise FlJaxError(f"a site is called {name!r}, as rows over all sites are: give it another name.")
    folders = [f"{_folder_name(arm.name)}".casefold() for arm in arms]
    for arm, folder in zip(arms, folders, strict=True):
        if folders.count(folder) > 1:
            raise FlJaxError(f"two arms are called {arm.name!r} or differ from it in punctuation or case only: name them apart.")
    if not len(seeds) == len(variants) == runs.key.shape[0] == runs.data.shape[0]:
        raise FlJaxError(f"there are {len(seeds)} seeds for {runs.key.shape[0]} keys, {runs.data.shape[0]} data sets and {len(variants)} variants: "
                         "give each run one.")
    if len({*zip(variants, seeds, strict=True)}) < len(seeds):
        raise FlJaxError("two runs of an arm have one seed, so that their rows would be one: tell them apart by `variants`.")


def _fit_arm(
    study: Study, arm: Program, measure: Measure, labels: Sequence[Label], runs: Runs, stop: threading.Event,
    folder: RunFolder | None, resume: bool, progress: bool, may_diverge: bool, spending: Spending = NOTHING,
) -> Fit:
    with contextlib.ExitStack() as stack:
        began = time.perf_counter()
        state, done, rows = arm.initial, 0, [frame([])]
        checkpoints = None
        if folder is not None:
            checkpoints = stack.enter_context(Checkpoints(folder.path / "checkpoints" / _folder_name(arm.name), folder.config))
            if resume:
                found = checkpoints.restore_latest(state)
                if found is not None:
                    done, state, meta = found
                    check_meta(arm.name, meta, spending, done)
                own = {label.arm for label in labels}
                folder.truncate_after(own, done)
                before = folder.metrics()
                rows.append(before[before["arm"].isin(own)])
        bar = stack.enter_context(tqdm(
            total=arm.rounds, initial=done, desc=arm.name, unit="round", leave=False, disable=None if progress else True))
        while done < arm.rounds:
            length = block_length(study, arm.rounds, done)
            if length not in arm.blocks:  # of a run that ended within a block before, and goes on
                arm.blocks[length] = arm.compile(length)
            state, block = arm.blocks[length](runs, study.splits, state)
            measured = measure(study.splits, block.outputs)
            block, measured = jax.device_get((block, measured))
            if not may_diverge:
                _refuse_all_nonfinite(study, arm, labels, done, block)
            new = [*_block_rows(study, arm, labels, done + length, block, measured),
                   *epsilon_rows(labels, done + 1, done + length, spending)]
            done += length
            if folder is not None and checkpoints is not None:
                folder.append_metrics(new)
                checkpoints.save(done, state, {"arm": arm.name, "rounds": study.rounds, "privacy": to_meta(spending, done)})
            rows.append(frame(new))
            bar.update(length)
            if (epsilon := worst_epsilon(spending, done)) is not None:
                bar.set_postfix_str(f"epsilon {epsilon:.3g}")
            if stop.is_set():
                kept = f"; it is saved in {folder.path} and can be resumed" if folder is not None else ""
                raise KeyboardInterrupt(f"stopped after round {done} of {study.rounds} of {arm.name}{kept}.")
    seconds = time.perf_counter() - began
    return Fit(pd.concat(rows, ignore_index=True), state, arm.facts.payload, seconds, arm.compile_seconds, spending.ledgers(done), arm.facts.norms)


def _block_rows(
    study: Study, arm: Program, labels: Sequence[Label], done: int, block: Block, measured: Measured
) -> Iterator[MetricRow]:
    first = done - block.ids.shape[1] + 1
    yield from round_rows(labels, first, block.rounds, arm.facts.payload)
    for split, names in (("validation", study.site_names), ("test", study.site_names), ("unseen", study.unseen_names)):
        yield from evaluation_rows(labels, done, split, names, getattr(measured, split))


def _refuse_all_nonfinite(study: Study, arm: Program, labels: Sequence[Label], done: int, block: Block) -> None:
    """Raises where a round had messages and none of them was finite."""
    server: Metrics = block.rounds.server
    dead = np.argwhere((np.asarray(server["participants"]) == 0) & (np.asarray(server["nonfinite"]) > 0))
    if len(dead):
        s, t = dead[np.argmin(dead[:, 1])]
        bad = np.asarray(block.ids)[s, t][np.asarray(block.rounds.clients["nonfinite"])[s, t] > 0].tolist()
        own = arm.facts.num_clients == len(study.site_names)  # else the arm has a view of its own, such as all records at one place
        names = [study.site_names[i] if own else f"client {i} of {arm.facts.num_clients}" for i in bad]
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        raise FlJaxError(
            f"{labels[s].arm}, seed {labels[s].seed}: in round {done + int(t) + 1} no site sent a finite update "
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
