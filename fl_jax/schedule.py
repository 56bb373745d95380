"""Which site steps where: dealing a cohort to devices, and choosing the number of lanes by a cost model.

A device steps L sites side by side, in L lanes; a lane takes the next site of the device's queue as soon as its own has ended. Nothing
here knows of models or algorithms.
"""

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fl_jax.types import Array


class Queues(NamedTuple):
    """slot: int32[D, c], positions in the cohort in the order in which each device takes them; length: int32[D], how many are real."""

    slot: Array
    length: Array


def deal(ids: Array, steps: Array, num_devices: int) -> Queues:
    """Deals a cohort to devices, longest first, each site to the device with the least work so far (Graham 1969, LPT).

    ids, steps: int32[c]; a site of 0 steps is dealt to nobody. Ties go by id, so that the order of the cohort does not matter.
    """
    order = jnp.lexsort((ids, -steps)).astype(jnp.int32)
    count = jnp.sum(steps > 0).astype(jnp.int32)
    if num_devices == 1:
        return Queues(order[None], count[None])

    def give(carry, slot):
        load, filled, queues = carry
        device = jnp.argmin(load)
        real = steps[slot] > 0
        queues = queues.at[device, jnp.where(real, filled[device], len(ids))].set(slot, mode="drop")
        return (load.at[device].add(steps[slot]), filled.at[device].add(real.astype(jnp.int32)), queues), None

    zeros = jnp.zeros(num_devices, jnp.int32)
    (_, filled, queues), _ = jax.lax.scan(give, (zeros, zeros, jnp.zeros((num_devices, len(ids)), jnp.int32)), order)
    return Queues(queues, filled)


def makespan(steps: Sequence[int] | np.ndarray, num_devices: int, lanes: int) -> int:
    """How many vmapped steps the busiest device makes for a cohort with these steps per site: a simulation of the engine, on the host."""
    ordered = sorted((int(s) for s in steps if s > 0), reverse=True)
    loads = [0] * num_devices
    queues: list[list[int]] = [[] for _ in range(num_devices)]
    for length in ordered:
        device = loads.index(min(loads))
        loads[device] += length
        queues[device].append(length)
    longest = 0
    for queue in queues:
        ends = [0] * lanes
        for length in queue:
            heappush(ends, heappop(ends) + length)
        longest = max(longest, *ends)
    return longest


class Cost(NamedTuple):
    """What a device's time goes into, in seconds. step: one vmapped step of all lanes. site: ending one site and beginning the next."""

    step: float
    site: float


def round_seconds(span: float, sites: int, cost: Cost) -> float:
    """The cost model: the steps of the busiest device, and the sites that it ends. span: its steps (makespan). sites: how many."""
    return span * cost.step + sites * cost.site


def mean_span(steps: np.ndarray, cohort_size: int, num_devices: int, lanes: int, *, draws: int = 20, seed: int = 0) -> float:
    """The mean makespan of uniformly drawn cohorts. steps: int[N], of each of the N sites; draws: how many (one if all take part)."""
    if cohort_size >= len(steps):
        return float(makespan(steps, num_devices, lanes))
    rng = np.random.default_rng(seed)
    return float(np.mean([makespan(rng.choice(steps, cohort_size, replace=False), num_devices, lanes) for _ in range(draws)]))


def candidate_lanes(share: int) -> list[int]:
    """Numbers of lanes worth a measurement for a device that gets `share` sites, ascending from 1 to share: those that divide it into
    full turns, each about half as many again as the one before."""
    splits = sorted({-(-share // turns) for turns in range(1, share + 1)}, reverse=True)
    chosen = splits[:1]
    for lanes in splits:
        if 3 * lanes <= 2 * chosen[-1]:
            chosen.append(lanes)
    return chosen[::-1]


def choose_lanes(
    steps: np.ndarray, cohort_size: int, cost: Callable[[int], Cost], *, num_devices: int = 1, candidates: Sequence[int] | None = None,
    draws: int = 20, seed: int = 0,
) -> tuple[int, dict[int, float]]:
    """The number of lanes a device that makes a round shortest by the cost model, and the seconds of a round for each one tried.

    steps: int[N], the steps of each of the N sites in a round. cost: (lanes) -> what a step and a site cost then, measured
    (fl_jax.tuning) or estimated; called once a candidate, ascending, and no more after one that is worse than the best by a quarter or
    two that are worse: more lanes share the fixed cost of a step, until their carries fall out of the cache. candidates: by default
    `candidate_lanes`. draws, seed: as in `mean_span`.
    """
    share = -(-min(cohort_size, len(steps)) // num_devices)
    seconds: dict[int, float] = {}
    worse = 0
    for lanes in sorted(candidates or candidate_lanes(share)):
        span = mean_span(steps, cohort_size, num_devices, lanes, draws=draws, seed=seed)
        before = min(seconds.values(), default=np.inf)
        seconds[lanes] = round_seconds(span, share, cost(lanes))
        worse = worse + 1 if seconds[lanes] > before else 0
        if worse == 2 or seconds[lanes] > 1.25 * before:
            break
    return min(seconds, key=lambda lanes: seconds[lanes]), seconds
