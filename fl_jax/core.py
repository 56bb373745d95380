"""The round: the only place that gathers, vmaps, shards and reduces.

`federate` joins a client, an aggregator and an optax server into a FederatedAlgorithm. What the server broadcasts (`shared`) is one
pytree, a site answers with a pseudo-gradient of exactly that structure, and everything else is a transformation or a reduction.
"""

from functools import partial
from typing import Any, NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fl_jax import schedule, trees
from fl_jax.alone import alone, site_at, site_keys, take_rows
from fl_jax.types import (
    Aggregator,
    Array,
    Batch,
    Client,
    Cohort,
    FederatedAlgorithm,
    Key,
    PyTree,
    RoundMetrics,
    Site,
    Sites,
    State,
    Variables,
)

NEVER = jnp.iinfo(jnp.int32).max // 2
CLIENTS = "clients"  # the mesh axis over which sites are dealt


class Engine(NamedTuple):
    """How a round is executed; results do not depend on it, but for float32 rounding of sums.

    lanes: how many sites step side by side on each device (fl_jax.tuning chooses). mesh: a jax Mesh with an axis named "clients" over
    whose devices a cohort is dealt; None: one device.
    """

    lanes: int = 1
    mesh: Mesh | None = None


ONE_LANE = Engine()


def federate(
    client: Client, aggregator: Aggregator, server: optax.GradientTransformation, engine: Engine = ONE_LANE
) -> FederatedAlgorithm:
    """Joins a client, an aggregator and a server optimizer into a federated algorithm.

    client: what a site does, written for one site. aggregator: how messages become one pseudo-gradient. server: an optax transformation
    of that pseudo-gradient; optax.sgd(1.0) is plain averaging. It is given the share of all clients that took part, as the extra argument
    `participation`. Results do not depend on the order of the cohort or on padding.
    """
    lanes, mesh = engine
    server = optax.with_extra_args_support(server)
    num_devices = 1 if mesh is None else mesh.shape[CLIENTS]

    def init(variables: Variables, num_clients: int) -> State:
        shared, kept = client.init(variables)
        clients = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_clients, *jnp.shape(leaf))), kept)
        return State(jnp.int32(0), shared, server.init(shared), aggregator.init(shared, num_clients), clients)

    def visit(key: Key, state: State, cohort: Cohort, sites: Sites) -> tuple[State, RoundMetrics]:
        site_key, server_key = jax.random.split(key)
        num_clients = sites.size.shape[0]
        size = jnp.take(sites.size, cohort.ids, mode="clip")
        active = (cohort.ids >= 0) & (cohort.ids < num_clients) & (cohort.weight > 0) & (size > 0)
        steps = jnp.where(active, jnp.minimum(client.batches.steps(size), cohort.steps), 0).astype(jnp.int32)
        tasks = _Tasks(cohort.ids, cohort.weight, jnp.take(sites.offset, cohort.ids, mode="clip"), size, steps, state.clients)
        work = partial(_work, client, aggregator, lanes)
        queues = schedule.deal(cohort.ids, steps, num_devices)
        inputs = (site_key, state.shared, state.aggregator, tasks, sites)
        if mesh is None:
            done = work(jax.tree.map(lambda leaf: leaf[0], queues), *inputs)
        else:
            done = _sharded(work, mesh)(queues, *inputs)

        participants = jnp.sum(done.reports["participated"])
        pseudo_gradient, aggregate, reported = aggregator.combine(server_key, state.aggregator, done.total)
        updates, optimizer = server.update(
            pseudo_gradient, state.server, state.shared, participation=jnp.float32(participants / num_clients))
        after = State(state.round, optax.apply_updates(state.shared, updates), optimizer, aggregate, state.clients)
        if not aggregator.acts_when_empty:
            after = trees.select(participants > 0, after, state)
        # a site that did not take part, or whose message was not finite, keeps what it had
        accepted = done.reports["participated"] > 0
        clients = jax.vmap(trees.select)(accepted, done.kept, state.clients)
        metrics = {
            "participants": participants,
            "nonfinite": jnp.sum(done.reports["nonfinite"]),
            "steps": jnp.sum(steps).astype(jnp.float32),
            "lane_steps": done.lane_steps,
            "update_norm": optax.tree.norm(updates),
            **reported,
        }
        return after._replace(round=state.round + 1, clients=clients), RoundMetrics(done.reports, metrics)

    def round(key: Key, state: State, cohort: Cohort, sites: Sites) -> tuple[State, RoundMetrics]:
        after, metrics = visit(key, state._replace(clients=trees.rows(state.clients, cohort.ids)), cohort, sites)
        num_clients = sites.size.shape[0]
        came = jnp.where(metrics.clients["participated"] > 0, cohort.ids, num_clients)
        return after._replace(clients=trees.set_rows(state.clients, came, after.clients)), metrics

    def model(state: State, id: Array) -> Variables:
        return client.model(state.shared, trees.row(state.clients, id))

    def deploy(key: Key, state: State, id: Array, sites: Sites) -> Variables:
        kept = trees.row(state.clients, id)
        if client.adapt is None:
            return client.model(state.shared, kept)
        return client.adapt(key, state.shared, kept, site_at(sites, id))

    def welcome(key: Key, state: State, id: Array, sites: Sites) -> Variables:
        beginning, training, adapting = jax.random.split(key, 3)
        site = site_at(sites, id)
        kept = client.newcomer(beginning, state.clients)
        _, trained, _ = alone(client, training, state.shared, kept, site)
        kept = trees.select(site.num_records > 0, trained, kept)
        return client.model(state.shared, kept) if client.adapt is None else client.adapt(adapting, state.shared, kept, site)

    def payload(state: State) -> tuple[int, int]:
        return trees.num_bytes(state.shared), -(-client.message_bits(state.shared) // 8)

    # what is private in the server's hands, or else before it gets there
    event = client.message_event if aggregator.event == dp_accounting.NonPrivateDpEvent() else aggregator.event
    return FederatedAlgorithm(
        init, round, visit, model, deploy, client.newcomer, welcome, payload, event, client.event, aggregator.period)


def device_mesh(axis: str, num_devices: int | None = None) -> Mesh | None:
    """A mesh of one axis over the first `num_devices` devices (all of them by default); None for a single device."""
    devices = jax.devices()[:num_devices]
    return jax.make_mesh((len(devices),), (axis,), axis_types=(AxisType.Auto,), devices=devices) if len(devices) > 1 else None


def client_mesh(num_devices: int | None = None) -> Mesh | None:
    """The mesh over whose devices an Engine deals the sites of a cohort: `device_mesh` with the axis "clients"."""
    return device_mesh(CLIENTS, num_devices)


def on_every_device(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """The arrays of a tree on every device of a mesh, as a round returns its state; as they are where mesh is None.

    State and data that lie on one device only would be copied to the others in each call, and the second call of a jitted round, with
    the state that the first returned, would compile once more.
    """
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


class _Tasks(NamedTuple):
    """The cohort with what its sites hold, every leaf [c, ...]."""

    id: Array
    weight: Array
    offset: Array
    size: Array
    steps: Array
    kept: PyTree


class _Lane(NamedTuple):
    """What a lane is doing; stacked, every leaf [L, ...]. slot: its place in the cohort. order: of its batches. t: steps made. left: to go."""

    slot: Array
    offset: Array
    key: Key
    order: PyTree
    t: Array
    left: Array
    carry: PyTree


class _Done(NamedTuple):
    """What came of a cohort. total: the aggregator's summands. kept: client states [c, ...]. reports: metrics [c]."""

    total: PyTree
    kept: PyTree
    reports: dict[str, Array]
    lane_steps: Array


def _sharded(work: Any, mesh: Mesh) -> Any:
    """`work` on every device of the mesh with its own queue; each slot is filled on one device only, so sums put them together."""

    def one_device(queues: schedule.Queues, *inputs: Any) -> _Done:
        done = work(jax.tree.map(lambda leaf: leaf[0], queues), *inputs)
        return jax.tree.map(lambda leaf: jax.lax.psum(leaf, CLIENTS), done)

    everywhere = PartitionSpec()
    return jax.shard_map(one_device, mesh=mesh, in_specs=(PartitionSpec(CLIENTS), *(everywhere,) * 5), out_specs=everywhere, check_vma=False)


def _work(
    client: Client, aggregator: Aggregator, lanes: int,
    queue: schedule.Queues, key: Key, shared: PyTree, aggregate: PyTree, tasks: _Tasks, sites: Sites,
) -> _Done:
    """One device works through its queue. The hot loop is vmapped steps with neither mask nor cond in it, up to the step at which the
    next lane's site ends; then that one site ends, is lifted into the total, and its lane begins the next site of the queue."""

    take = partial(take_rows, sites)

    def begin(position: Array) -> _Lane:
        slot = queue.slot[jnp.minimum(position, queue.slot.shape[0] - 1)]
        task = trees.row(tasks, slot)
        site = Site(task.id, task.size, task.steps, partial(take, task.offset))
        ordering, beginning, stepping, _ = site_keys(key, task.id)
        order = client.batches.order(ordering, jnp.maximum(task.size, 1))
        left = jnp.where(position < queue.length, task.steps, NEVER)
        return _Lane(slot, task.offset, stepping, order, jnp.int32(0), left, client.begin(beginning, shared, task.kept, site))

    def step(key: Key, t: Array, carry: PyTree, batch: Batch) -> PyTree:
        return client.step(jax.random.fold_in(key, t), carry, shared, batch)

    def advance(group: _Lane, count: Array) -> _Lane:
        def together(i: Array, carry: PyTree) -> PyTree:
            t = group.t + i
            index, mask = jax.vmap(client.batches.draw)(group.order, t)
            rows = take(group.offset[:, None], index)
            expected = jax.vmap(client.batches.expected)(group.order)
            return jax.vmap(step)(group.key, t, carry, Batch(*rows, mask, expected))

        def alone(i: Array, carry: PyTree) -> PyTree:
            index, mask = client.batches.draw(lane.order, lane.t + i)
            return step(lane.key, lane.t + i, carry, Batch(*take(lane.offset, index), mask, client.batches.expected(lane.order)))

        if lanes > 1:
            carry = jax.lax.fori_loop(0, count, together, group.carry)
        else:  # without an axis of lanes, which would cost a copy of the carry in every step
            lane = jax.tree.map(lambda leaf: leaf[0], group)
            carry = jax.tree.map(lambda leaf: leaf[None], jax.lax.fori_loop(0, count, alone, lane.carry))
        return group._replace(carry=carry, t=group.t + count, left=group.left - count)

    def finish(done: _Done, lane: _Lane) -> _Done:
        task = trees.row(tasks, lane.slot)
        message, kept, reports = client.end(lane.carry, shared, task.kept)
        finite = trees.all_finite((message, kept))
        weight = jnp.where(finite, task.weight, 0.0)
        message = trees.select(finite, message, jax.tree.map(jnp.zeros_like, message))
        summand = aggregator.lift(site_keys(key, task.id)[3], aggregate, weight, message)
        if aggregator.stacked:
            total = trees.set_row(done.total, lane.slot, summand)
        else:
            total = jax.tree.map(jnp.add, done.total, summand)
        reports = {name: jnp.float32(value) for name, value in reports.items()} | {
            "participated": jnp.float32(finite), "nonfinite": 1.0 - jnp.float32(finite), "steps": jnp.float32(lane.t)}
        return _Done(total, trees.set_row(done.kept, lane.slot, kept), trees.set_row(done.reports, lane.slot, reports), done.lane_steps)

    def turn(loop: tuple[_Done, _Lane, Array, Array]) -> tuple[_Done, _Lane, Array, Array]:
        done, group, idle, ended = loop
        # A site begins here, not when the one before it in its lane ends: what that one left is then read a whole turn before it is
        # overwritten, so that XLA overwrites it in place and copies no lane. The first turn begins lane 0 once more.
        group = trees.set_row(group, idle, begin(jnp.where(ended > 0, lanes - 1 + ended, 0)))
        ending = jnp.argmin(group.left)
        count = group.left[ending]
        group = advance(group, count)
        done = finish(done, trees.row(group, ending))._replace(lane_steps=done.lane_steps + jnp.float32(lanes) * count)
        return done, group, ending, ended + 1

    group = jax.vmap(begin)(jnp.arange(lanes, dtype=jnp.int32))
    nothing = _nothing(client, aggregator, key, shared, aggregate, tasks, trees.row(group.carry, jnp.int32(0)))
    start = (nothing, group, jnp.int32(0), jnp.int32(0))
    done, _, _, _ = jax.lax.while_loop(lambda loop: loop[3] < queue.length, turn, start)
    return done


def _nothing(client: Client, aggregator: Aggregator, key: Key, shared: PyTree, aggregate: PyTree, tasks: _Tasks, carry: PyTree) -> _Done:
    """The zero that a device starts from, shaped as the client and the aggregator prescribe."""
    kept = trees.row(tasks.kept, jnp.int32(0))
    message, _, reports = jax.eval_shape(client.end, carry, shared, kept)
    given: Any = jax.tree.structure(message)  # the stubs leave open whether a structure can be compared
    expected: Any = jax.tree.structure(shared)
    if given != expected:
        raise TypeError(f"a client's message must have the structure of what is shared: {given} is not {expected}")
    summand = jax.eval_shape(aggregator.lift, key, aggregate, jnp.float32(0), message)
    cohort = tasks.id.shape[0]
    lead = (cohort,) if aggregator.stacked else ()
    total = jax.tree.map(lambda leaf: jnp.zeros(lead + leaf.shape, leaf.dtype), summand)
    columns = {name: jnp.zeros(cohort, jnp.float32) for name in (*reports, "participated", "nonfinite", "steps")}
    return _Done(total, jax.tree.map(jnp.zeros_like, tasks.kept), columns, jnp.float32(0))
