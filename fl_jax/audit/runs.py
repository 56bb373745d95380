"""Runs of a mechanism for an audit: many of them with and without a canary, as the rows of one program, or one with many canaries."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fl_jax.audit.canaries import alignment
from fl_jax.audit.scores import Scores
from fl_jax.errors import FlJaxError
from fl_jax.sweep import each_run
from fl_jax.types import Array, Cohort, FederatedAlgorithm, Key, PyTree, Sampling, Sites, State

Run = Callable[[Key, Array], Array]
"""(key, present: bool scalar) -> score: one run with or without the canary, and how strongly it shows."""

Watch = Callable[[State, State], Array]
"""(state before, state after a round) -> what an attacker reads from them, float32 scalar or [k]; summed up over rounds."""


def repeated(run: Run, key: Key, num_runs: int) -> Scores:
    """The scores of `num_runs` independent runs with the canary and as many without, all in one program."""
    if num_runs < 2:
        raise FlJaxError(f"An audit needs at least 2 runs a side, and is to make {num_runs}.")
    present = jnp.arange(2 * num_runs) < num_runs
    scores = np.asarray(jax.jit(each_run(lambda row: run(*row)))((jax.random.split(key, 2 * num_runs), present)), np.float64)
    return Scores(scores[:num_runs], scores[num_runs:])


def one_run(run: Callable[[Key, Array], Array], key: Key, num_canaries: int) -> Scores:
    """The scores of one run, in which each of k canaries takes part by a fair coin of its own.

    run: (key, present bool[k]) -> scores float32[k].
    """
    coins, running = jax.random.split(key)
    present = jax.random.bernoulli(coins, 0.5, (num_canaries,))
    scores, inside = np.asarray(jax.jit(run)(running, present), np.float64), np.asarray(present)
    return Scores(scores[inside], scores[~inside])


def watched(
    algorithm: FederatedAlgorithm, sampling: Sampling, state: State, sites: Sites, rounds: int, watch: Watch, key: Key,
    among: Callable[[Cohort], Cohort] = lambda cohort: cohort,
) -> Array:
    """What an attacker who sees the model after every round reads from `rounds` rounds of a federated run.

    state: before the first round. among: changes a cohort that was drawn, e.g. leaves out canaries that are absent.
    """

    def one(state: State, key: Key) -> tuple[State, Array]:
        drawing, training = jax.random.split(key)
        after, _ = algorithm.round(training, state, among(sampling.draw(drawing, state.round, sites)), sites)
        return after, watch(state, after)

    _, seen = jax.lax.scan(one, state, jax.random.split(key, rounds))
    return jnp.sum(seen, axis=0)


def moved(canaries: PyTree) -> Watch:
    """The attacker who knows the canaries' directions, every leaf [k, ...], like the shared params, and sees how far the parameters
    went along them; down, as messages are pseudo-gradients."""
    return lambda before, after: alignment(jax.tree.map(jnp.subtract, before.shared.params, after.shared.params), canaries)


def absent(cohort: Cohort, first: Array, present: Array) -> Cohort:
    """The cohort without those of the clients first, first + 1, ... for which present, bool[k], does not hold."""
    place = cohort.ids - first
    canary = (place >= 0) & (place < present.shape[0])
    there = jnp.take(present, place, mode="clip")
    return cohort._replace(weight=jnp.where(canary & ~there, 0, cohort.weight))
