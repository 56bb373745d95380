"""Which site steps where: dealing a cohort to devices, and choosing the number of lanes by a cost model.

A device steps L sites side by side, in L lanes; a lane takes the next site of the device's queue as soon as its own has ended. Both
functions here know nothing of models or algorithms.
"""

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
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
        heapify(ends)
        for length in queue:
            heappush(ends, heappop(ends) + length)
        longest = max(longest, *ends)
    return longest


def choose_lanes(
    steps: np.ndarray, cohort_size: int, step_seconds: Callable[[int], float], *, num_devices: int = 1, site_seconds: float = 0.0,
    candidates: Sequence[int] | None = None, draws: int = 20, seed: int = 0,
) -> int:
    """The number of lanes a device that makes a round shortest: the longest lane times the time of one step with so many lanes.

    steps: int[N], the steps of each of the N sites in a round. step_seconds: (lanes) -> seconds of one vmapped step, measured
    (fl_jax.training.measure_step) or estimated; called once a candidate. site_seconds: seconds to end one site and begin the next.
    candidates: numbers to consider; by default 1, 2, 3, 4, 5, 8, 10, 16, ... up to a device's share of the cohort. draws: cohorts that
    are simulated (one if everybody takes part).
    """
    share = -(-cohort_size // num_devices)
    if candidates is None:
        candidates = [n for n in (1, 2, 3, 4, 5, 8, 10, 16, 25, 32, 50, 64, 100, 128) if n <= share]
    rng = np.random.default_rng(seed)
    whole = cohort_size >= len(steps)
    cohorts = [steps if whole else rng.choice(steps, cohort_size, replace=False) for _ in range(1 if whole else draws)]

    def seconds(lanes: int) -> float:
        spans = np.mean([makespan(cohort, num_devices, lanes) for cohort in cohorts])
        return float(spans) * step_seconds(lanes) + share * site_seconds

    return min(candidates, key=seconds)
