"""What a study trains and measures, and one run of it as pure functions: its draws, its rounds, and what its sites deploy after them.

An arm is one thing that is trained. What a run draws in round r depends on its key and r alone, wherever its state lies.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fl_jax import evaluation
from fl_jax.metrics import CLASSIFICATION, Metric
from fl_jax.types import (
    Array,
    Cohort,
    FederatedAlgorithm,
    Key,
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
    is trained for, such as those within a privacy budget; None: all. clients_on_host: what clients keep between rounds lies in the host's
    memory, for populations that do not fit on the device; the results are the same, and slower to come by (fl_jax.host_clients).
    """

    name: str
    build: Callable[[PyTree], FederatedAlgorithm]
    sampling: Callable[[Sites], Sampling]
    view: Callable[[Splits], Splits] = lambda splits: splits
    rounds: int | None = None
    clients_on_host: bool = False


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


def seeds_of(seeds: Sequence[int], *, stacked: bool) -> Runs:
    """One run a seed. stacked: whether run i has data set i of the study's splits, or all have the one that there is."""
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    return Runs(keys, jnp.arange(len(seeds), dtype=jnp.int32) if stacked else jnp.zeros(len(seeds), jnp.int32))


def row_of(splits: Splits, index: Array) -> Splits:
    """One of the stacked data sets; where there is one only, without a copy."""
    return jax.tree.map(lambda leaf: leaf[0] if leaf.shape[0] == 1 else leaf[index], splits)


class OneRun(NamedTuple):
    """One run of an arm, on its own data. algorithm, sampling: as the arm builds them. train: the sites that it trains. own: its federation's
    splits. key: from which its rounds draw."""

    algorithm: FederatedAlgorithm
    sampling: Sampling
    train: Sites
    own: Splits
    key: Key

    def cohort(self, round: Array) -> tuple[Cohort, Key]:
        """Who takes part in a round, and the round's key."""
        cohort_key, round_key = jax.random.split(jax.random.fold_in(self.key, round))
        return self.sampling.draw(cohort_key, round, self.train), round_key

    def look_key(self, round: Array, id: Array) -> Key:
        """Of a look at what site `id` deploys after so many rounds: the same however often it is looked at; unseen sites count on."""
        return jax.random.fold_in(jax.random.fold_in(self.key, jnp.iinfo(jnp.int32).max - round), id)

    def deployed(self, state: State, ids: Array, train: Sites) -> evaluation.ModelOfSite:
        """Position in ids, int32[n], -> what that site deploys. state.clients and `train` have these sites' rows in this order."""
        return lambda i: self.algorithm.deploy(self.look_key(state.round, ids[i]), state, i, train)

    def welcomed(self, state: State, support: Sites) -> evaluation.ModelOfSite:
        """Unseen site -> what it deploys, with its support."""
        count = self.own.train.size.shape[0]
        return lambda i: self.algorithm.welcome(self.look_key(state.round, count + i), state, i, support)


def one_run(arm: Arm, run: Runs, splits: Splits) -> OneRun:
    """A run, one row of `Runs`, on its row of the stacked splits."""
    own = row_of(splits, run.data)
    return OneRun(arm.build(run.hyper), arm.sampling(own.train), arm.view(own).train, own, jax.random.split(run.key)[1])


def clients_of(study: Study, arm: Arm) -> int:
    """How many clients an arm has: one where its view pools the records."""
    return jax.eval_shape(lambda splits: arm.view(row_of(splits, jnp.int32(0))), study.splits).train.size.shape[0]


def donors_of(study: Study) -> Array:
    """The sites whose models are tried at unseen ones: int32[d], all of them or MAX_DONORS spread over them."""
    return jnp.asarray(np.unique(np.linspace(0, len(study.site_names) - 1, MAX_DONORS).round()), jnp.int32)


class Facts(NamedTuple):
    """What is known of an arm before it trains. num_clients: how many it has. payload: bytes (down, up) of a client and round. norms: its
    BatchNorm policy."""

    num_clients: int
    payload: tuple[int, int]
    norms: str


def starts(study: Study, arm: Arm, runs: Runs, variables: Variables) -> tuple[Callable[[tuple[Runs, Variables]], State], Facts]:
    """The function (run, variables) -> its state before training, and what is known of the arm then."""
    num_clients = clients_of(study, arm)
    facts: list[Facts] = []

    def start(row: tuple[Runs, Variables]) -> State:
        run, variables = row
        algorithm = arm.build(run.hyper)
        state = algorithm.init(variables, num_clients)
        facts.append(Facts(num_clients, algorithm.payload(state), algorithm.norms))  # of shapes alone, so known while tracing
        return state

    jax.eval_shape(start, jax.tree.map(lambda leaf: leaf[0], (runs, variables)))
    return start, facts[0]


def rounds_of_run(study: Study, arm: Arm, length: int, row: tuple[Runs, State], splits: Splits) -> tuple[State, Block]:
    """So many rounds of one run, with its state on the device, and the predictions of what its sites deploy then."""
    run, state = row
    one = one_run(arm, run, splits)

    def round(state: State, _: None) -> tuple[State, tuple[Array, RoundMetrics]]:
        cohort, key = one.cohort(state.round)
        state, metrics = one.algorithm.round(key, state, cohort, one.train)
        return state, (cohort.ids, metrics)

    state, (ids, metrics) = jax.lax.scan(round, state, length=length)
    own, predict = one.own, study.model.predict
    deployed = one.deployed(state, jnp.arange(own.train.size.shape[0], dtype=jnp.int32), own.train)
    validation, test = evaluation.predict_splits(deployed, predict, (own.validation, own.test), study.chunk)
    if own.support is None:
        unseen = evaluation.predict_unseen(deployed, predict, own.unseen, donors_of(study), study.chunk)
    else:
        unseen = evaluation.predict_sites(one.welcomed(state, own.support), predict, own.unseen, study.chunk)[None]
    return state, Block(ids, metrics, Outputs(validation, test, unseen))
