"""The blocks of an arm whose clients' state lies in the host's memory: [runs, clients, ...], of which a round sees its cohort's rows.

For populations whose state does not fit on the device, such as a model of their own for each of thousands of clients. Runs follow one
another on one device, each round is a call, and what sites deploy is made for a few sites at a time; draws and results are those of
fl_jax.arms.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fl_jax import evaluation
from fl_jax.arms import Arm, Block, Facts, Outputs, Runs, Study, donors_of, one_run, starts
from fl_jax.types import Array, Cohort, Key, PyTree, RoundMetrics, Sites, Splits, State, Variables

GROUP = 32  # sites whose models are on the device at once while they are measured


class HostArm(NamedTuple):
    """An arm, ready to run. initial: its state, `clients` in NumPy arrays, which blocks change in place. block: (length) -> (runs, splits,
    state) -> (state, Block). outputs: what a block's predictions look like. facts: what is known before."""

    initial: State
    block: Callable[[int], Callable[[Runs, Splits, State], tuple[State, Block]]]
    outputs: Outputs
    facts: Facts


def compile(study: Study, arm: Arm, runs: Runs, variables: Variables) -> HostArm:
    """The functions of an arm, compiled when they are first called but for their shapes. variables: initial ones of each run [S, ...]."""
    start, facts = starts(study, arm, runs, variables)
    num_clients, count = facts.num_clients, runs.key.shape[0]

    def without_rows(row: tuple[Runs, Variables]) -> State:  # so that XLA makes one client's state, not all clients'
        state = start(row)
        return state._replace(clients=jax.tree.map(lambda leaf: leaf[:1], state.clients))

    initial = jax.jit(lambda rows: jax.lax.map(without_rows, rows))((runs, variables))
    clients = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf), num_clients, axis=1), initial.clients)
    draw, visit = jax.jit(lambda run, splits, round: one_run(arm, run, splits).cohort(round)), jax.jit(_visit(arm))
    measure, measure_unseen = jax.jit(_outputs(study, arm)), jax.jit(_unseen(study, arm))

    def rounds(length: int, run: Runs, splits: Splits, state: State, kept: PyTree) -> tuple[State, Array, RoundMetrics]:
        """kept: this run's [N, ...], changed in place."""
        history: list[tuple[Array, RoundMetrics]] = []
        for _ in range(length):
            cohort, key = draw(run, splits, state.round)
            ids = np.clip(np.asarray(cohort.ids), 0, num_clients - 1)
            after, metrics = visit(run, splits, key, state._replace(clients=_rows(kept, ids)), cohort)
            came = np.asarray(metrics.clients["participated"]) > 0

            def put(leaf: np.ndarray, rows: Array, ids: np.ndarray = ids, came: np.ndarray = came) -> None:
                leaf[ids[came]] = np.asarray(rows)[came]

            jax.tree.map(put, kept, after.clients)
            state = after._replace(clients=())
            history.append((cohort.ids, metrics))
        ids, metrics = jax.device_get(jax.tree.map(lambda *leaves: jnp.stack(leaves), *history))
        return state, ids, metrics

    def looks(run: Runs, splits: Splits, state: State, kept: PyTree) -> Outputs:
        num_sites = len(study.site_names)
        parts = []
        for first in range(0, num_sites, GROUP):
            ids = np.arange(first, first + min(GROUP, num_sites), dtype=np.int32)
            rows = _rows(kept, np.clip(ids, 0, num_clients - 1))
            parts.append(jax.device_get(measure(run, splits, state._replace(clients=rows), ids)))
        validation, test = (np.sum(outputs, axis=0) for outputs in zip(*parts, strict=True))
        if splits.support is None:
            donors = np.asarray(donors_of(study))
            rows = _rows(kept, np.clip(donors, 0, num_clients - 1))
            return Outputs(validation, test, jax.device_get(measure_unseen(run, splits, state._replace(clients=rows), donors)))
        unseen = [_newcomer(arm, measure_unseen, run, splits, state, kept, i) for i in range(len(study.unseen_names))]
        return Outputs(validation, test, np.sum(unseen, axis=0))

    def block(length: int) -> Callable[[Runs, Splits, State], tuple[State, Block]]:
        def call(runs: Runs, splits: Splits, state: State) -> tuple[State, Block]:
            # sharing a run over devices would make each of them do all of it
            runs, splits, shared = jax.device_put((runs, splits, state._replace(clients=())), jax.devices()[0])
            states, blocks = [], []
            for s in range(count):
                run, rest = jax.tree.map(lambda leaf, s=s: leaf[s], (runs, shared))
                kept = jax.tree.map(lambda leaf, s=s: leaf[s], state.clients)
                rest, ids, metrics = rounds(length, run, splits, rest, kept)
                states.append(rest)
                blocks.append(Block(ids, metrics, looks(run, splits, rest, kept)))
            after = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
            return after._replace(clients=state.clients), jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)

        return call

    run, one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), (runs, initial._replace(clients=clients)))
    rows = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((GROUP, *leaf.shape[1:]), leaf.dtype), one.clients)
    shapes = jax.eval_shape(measure, run, study.splits, one._replace(clients=rows), jax.ShapeDtypeStruct((GROUP,), jnp.int32))
    few = jax.eval_shape(lambda ids: ids, donors_of(study) if study.splits.support is None else jnp.zeros(1, jnp.int32))
    rows = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*few.shape, *leaf.shape[1:]), leaf.dtype), one.clients)
    unseen = jax.eval_shape(measure_unseen, run, study.splits, one._replace(clients=rows), few)
    outputs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), Outputs(shapes[0], shapes[1], unseen))
    return HostArm(initial._replace(clients=clients), block, outputs, facts)


def _rows(kept: PyTree, ids: np.ndarray) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[ids], kept)


def _visit(arm: Arm) -> Callable[..., tuple[State, RoundMetrics]]:
    def visit(run: Runs, splits: Splits, key: Key, state: State, cohort: Cohort) -> tuple[State, RoundMetrics]:
        one = one_run(arm, run, splits)
        return one.algorithm.visit(key, state, cohort, one.train)

    return visit


def _some(sites: Sites, ids: Array) -> Sites:
    """The sites `ids` of these; one beyond the last has no records."""
    size = jnp.where(ids < sites.size.shape[0], jnp.take(sites.size, ids, mode="clip"), 0)
    return sites._replace(offset=jnp.take(sites.offset, ids, mode="clip"), size=size)


def _outputs(study: Study, arm: Arm) -> Callable[..., tuple[Array, ...]]:
    """(run, splits, state with the rows of the sites `ids`, ids) -> predictions of their validation and test records."""

    def outputs(run: Runs, splits: Splits, state: State, ids: Array) -> tuple[Array, ...]:
        one = one_run(arm, run, splits)
        validation, test, train = (_some(sites, ids) for sites in (one.own.validation, one.own.test, one.own.train))
        return evaluation.predict_splits(one.deployed(state, ids, train), study.model.predict, (validation, test), study.chunk)

    return outputs


def _unseen(study: Study, arm: Arm) -> Callable[..., Array]:
    """(run, splits, state, ids) -> predictions [d, R, K] of unseen records: with the models of the donors `ids`, whose rows the state has; where
    there is support, of the one unseen site `ids[0]`, with what a newcomer begins with as the state's only row."""

    def unseen(run: Runs, splits: Splits, state: State, ids: Array) -> Array:
        one, predict = one_run(arm, run, splits), study.model.predict
        if one.own.support is None:
            deployed = one.deployed(state, ids, _some(one.own.train, ids))
            places = jnp.arange(ids.shape[0], dtype=jnp.int32)
            return evaluation.predict_unseen(deployed, predict, one.own.unseen, places, study.chunk)
        only = one.own.unseen._replace(size=jnp.where(jnp.arange(one.own.unseen.size.shape[0]) == ids[0], one.own.unseen.size, 0))
        return evaluation.predict_sites(one.welcomed(state, one.own.support), predict, only, study.chunk)[None]

    return unseen


def _newcomer(
    arm: Arm, measure_unseen: Callable[..., Array], run: Runs, splits: Splits, state: State, kept: PyTree, site: int
) -> np.ndarray:
    """Predictions of one unseen site's records, with the state that it begins with made of all clients' on the host."""
    one: Any = one_run(arm, run, splits)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        key = jax.random.split(one.look_key(state.round, one.own.train.size.shape[0] + site), 3)[0]
        begins = jax.tree.map(lambda leaf: np.asarray(leaf)[None], one.algorithm.newcomer(key, kept))
    return jax.device_get(measure_unseen(run, splits, state._replace(clients=begins), np.array([site], np.int32)))
