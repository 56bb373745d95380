"""How many lanes a device should have, by measurement: the cost model of fl_jax.schedule with the seconds of this machine.

Everything goes through the public interface: a round of an algorithm with a cohort whose sites are capped at a few steps.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fl_jax.core import CLIENTS, Engine, on_every_device
from fl_jax.errors import FlJaxError
from fl_jax.schedule import Cost, choose_lanes, mean_span, round_seconds
from fl_jax.types import Batches, Cohort, FederatedAlgorithm, Sites, Variables

Build = Callable[[Engine], FederatedAlgorithm]
CONTENDERS = 1.25  # candidates this near to the best are measured once more, side by side
REPEATS, MANY_REPEATS = 3, 20
PROBE_SECONDS = 0.03  # the steps that are timed should last so long, that microseconds can be told from noise
SIDE_BY_SIDE_SECONDS = 2.0


class Measured(NamedTuple):
    """lanes: a candidate. step_seconds: one vmapped step of all of them. site_seconds: to end a site and begin the next.
    round_seconds: what the cost model makes of it for a round of the cohort asked for."""

    lanes: int
    step_seconds: float
    site_seconds: float
    round_seconds: float


class Tuning(NamedTuple):
    """engine: the fastest. table: what was measured, ascending in lanes. seconds: what measuring cost, compilation included."""

    engine: Engine
    table: tuple[Measured, ...]
    seconds: float


def tune_lanes(
    build: Build, variables: Variables, sites: Sites, cohort_size: int, batches: Batches, mesh: Mesh | None = None, *,
    candidates: Sequence[int] | None = None,
) -> Tuning:
    """Chooses the number of lanes a device for rounds of `cohort_size` sites drawn uniformly from `sites`.

    build: (Engine) -> the algorithm, e.g. lambda engine: fedavg(model, optimizer, batches, engine=engine). variables: of its model.
    batches: the client's, for the steps of each site. mesh: the devices (core.client_mesh). candidates: numbers of lanes to try; by
    default schedule.candidate_lanes. Each one tried costs the compilation of a round and about a second. Raises FlJaxError where no
    site has a record or a candidate is below 1.
    """
    start = time.perf_counter()
    if candidates is not None and (len(candidates) == 0 or min(candidates) < 1):
        raise FlJaxError(f"Numbers of lanes to try must be 1 or more, but are {list(candidates)}.")
    sizes = np.asarray(sites.size)
    steps = np.where(sizes > 0, np.asarray(batches.steps(jnp.asarray(sizes, jnp.int32))), 0)
    if steps.max(initial=0) < 1:
        raise FlJaxError("No site has a record to measure with.")
    num_devices = 1 if mesh is None else mesh.shape[CLIENTS]
    share = -(-min(cohort_size, len(steps)) // num_devices)
    sites = on_every_device(sites, mesh)
    probes: dict[int, _Probe] = {}

    def cost(lanes: int) -> Cost:
        probes[lanes] = _Probe(build(Engine(lanes, mesh)), variables, sites, steps, lanes, mesh)
        return probes[lanes].cost()

    _, seconds = choose_lanes(steps, cohort_size, cost, num_devices=num_devices, candidates=candidates)
    least = min(seconds.values())  # of tiny steps on a busy machine a slope may come out as 0 or less: the least itself always contends
    contenders = [lanes for lanes in seconds if seconds[lanes] <= max(least, CONTENDERS * least)]
    if len(contenders) > 1:  # a busy moment during one candidate's turn must not decide: short times in turn, and the least of many
        begin = time.perf_counter()
        for repeat in range(MANY_REPEATS):
            for lanes in contenders:
                probes[lanes].measure()
            if repeat + 1 >= REPEATS and time.perf_counter() - begin > SIDE_BY_SIDE_SECONDS:
                break
    costs = {lanes: probe.cost() for lanes, probe in probes.items()}
    spans = {lanes: mean_span(steps, cohort_size, num_devices, lanes) for lanes in probes}
    table = tuple(Measured(lanes, *costs[lanes], round_seconds(spans[lanes], share, costs[lanes])) for lanes in sorted(probes))
    best = min((row for row in table if row.lanes in contenders), key=lambda row: row.round_seconds)
    return Tuning(Engine(best.lanes, mesh), table, time.perf_counter() - start)


class _Probe:
    """A compiled round for a number of lanes, and the least seconds it took for three cohorts, which differ in data only.

    One site a lane for few steps, the same for more steps, and two sites a lane for few steps: the first two differ by steps alone, the
    third by sites and their steps, so that what a round costs whatever it does falls out.
    """

    def __init__(
        self, algorithm: FederatedAlgorithm, variables: Variables, sites: Sites, steps: np.ndarray, lanes: int, mesh: Mesh | None
    ):
        num_devices = 1 if mesh is None else mesh.shape[CLIENTS]
        self._lanes, self._sites = lanes, sites
        order = np.argsort(-steps, kind="stable")
        # the longest sites; one may stand in again for others, since what the round returns is not looked at
        self._ids = np.resize(order[steps[order] > 0], 2 * lanes * num_devices)
        longest = int(steps[self._ids].min())
        self._state = on_every_device(algorithm.init(variables, len(steps)), mesh)
        self._round = jax.jit(lambda key, state, cohort, sites: algorithm.round(key, state, cohort, sites))
        self._few = min(2, max(1, longest - 1))
        self._many = min(longest, self._few + 1)
        self._seconds(1, self._few)  # compiles
        few = self._least_seconds(1, self._few)
        while self._many < longest and self._least_seconds(1, self._many) < few + PROBE_SECONDS:
            self._many = min(2 * self._many, longest)
        self._least = np.full(3, np.inf)
        for _ in range(REPEATS):
            self.measure()

    def measure(self) -> None:
        """Times the three cohorts once more."""
        now = [self._seconds(1, self._few), self._seconds(1, self._many), self._seconds(2, self._few)]
        self._least = np.minimum(self._least, now)

    def cost(self) -> Cost:
        """Seconds of a step and of a site from the least times so far."""
        few, many, twice = self._least
        step = max(many - few, 0.0) / (self._many - self._few) if self._many > self._few else few / self._few
        return Cost(step, max(twice - few - self._few * step, 0.0) / self._lanes)

    def _least_seconds(self, sites_a_lane: int, cap: int) -> float:
        return min(self._seconds(sites_a_lane, cap) for _ in range(REPEATS))

    def _seconds(self, sites_a_lane: int, cap: int) -> float:
        number = len(self._ids) // 2 * sites_a_lane
        ids = np.where(np.arange(len(self._ids)) < number, self._ids, len(self._sites.size))
        cohort = Cohort(jnp.asarray(ids, jnp.int32), jnp.ones(len(ids), jnp.float32), jnp.full(len(ids), cap, jnp.int32))
        start = time.perf_counter()
        jax.block_until_ready(self._round(jax.random.key(0), self._state, cohort, self._sites))
        return time.perf_counter() - start
