"""The vocabulary of fl_jax: what a record, a site, a model, a client, an aggregator and a federated algorithm are.

Everything here is a NamedTuple: values that are data are pytrees of arrays and pass through `jit`, `vmap` and `scan`; values that
are behaviour (Model, Client, Aggregator, FederatedAlgorithm, ...) are plain tuples of pure functions, key first, state in and out.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp

Array = jax.Array
PyTree = Any
Key = jax.Array
Metrics = dict[str, Array]


class Variables(NamedTuple):
    """What a model deploys.

    params: trained leaves. stats: leaves that are measured, not trained (BatchNorm's running mean and variance); {} if none.
    Statistics are averaged by a server and never optimized.
    """

    params: PyTree
    stats: PyTree


class Batch(NamedTuple):
    """A mini-batch of static size B: x [B, ...], y [B, ...] (either may be a pytree), mask float32[B], 0 where a row is padding.

    expected: float32 scalar, how many rows hold a record in expectation: what a private mean divides by, whatever was drawn. None
    where nobody said.
    """

    x: PyTree
    y: PyTree
    mask: Array
    expected: Array | None = None


class Survival(NamedTuple):
    """The y of records that are followed until an event or until they are lost from sight (right censoring).

    time: float32 [B], of the event or of the last sight, in any unit. event: bool or float32 [B]; 1 where the event was seen, 0
    where the record is censored. A data set with such a y has num_classes 0.
    """

    time: Array
    event: Array


class Sites(NamedTuple):
    """The records of N sites, one after another in flat device arrays, without padding to the largest.

    x, y: pytrees of [R, ...]. offset, size: int32[N]; site i owns rows offset[i] : offset[i] + size[i].
    """

    x: PyTree
    y: PyTree
    offset: Array
    size: Array


class Splits(NamedTuple):
    """The device side of a federated data set: Sites for training, validation and test of the same N sites, in the same order, and
    `unseen`: sites that take no part in training (N may be 0), whose records are all for testing. support: of the same unseen sites,
    the records by which each may adapt what it is given; None where they have none.

    Stacked over seeds, every leaf has a leading axis of seeds.
    """

    train: Sites
    validation: Sites
    test: Sites
    unseen: Sites
    support: Sites | None = None


class Site(NamedTuple):
    """One site as a client sees it when a round reaches it: all scalars int32, and its key of this round.

    id: its index among the N sites. num_records: how many records it holds. num_steps: how many steps it makes this round.
    take: index int32[B] in [0, num_records) -> (x, y), for a client that looks at records before its first step.
    """

    id: Array
    num_records: Array
    num_steps: Array
    take: Callable[[Array], tuple[PyTree, PyTree]]


class Model(NamedTuple):
    """A model behind the one bridge that algorithms use (see fl_jax.models).

    init:    (key) -> Variables
    loss:    (key, params, stats, batch) -> (scalar mean loss over the unmasked rows, stats); training mode
    predict: (Variables, x [B, ...]) -> outputs [B, K] (logits; K = 1 for a single logit or a risk score); evaluation mode
    evaluate: (outputs [B, K], y [B, ...]) -> per-record loss float32[B]; None where the loss is of the whole batch
    modules: key path of a leaf's module, e.g. ("Dense_0",) -> module class; what `is_local` predicates look at
    name:    named in results
    """

    init: Callable[[Key], Variables]
    loss: Callable[[Key, PyTree, PyTree, Batch], tuple[Array, PyTree]]
    predict: Callable[[Variables, PyTree], Array]
    evaluate: Callable[[Array, PyTree], Array] | None
    modules: Mapping[tuple[str, ...], type]
    name: str


Deploy = Callable[[Key, Variables, Site], Variables]
"""(key, what the site has, the site and its records) -> what it deploys; see fl_jax.deployment."""

IsLocal = Callable[[tuple[str, ...], type], bool]
"""(key path of a leaf as strings, starting with "params" or "stats"; class of the module that owns it) -> stays at the site?"""

class Gradient(NamedTuple):
    """A gradient oracle, and what a step of it costs.

    init:    (params) -> state, what a site keeps of it from step to step and between rounds, e.g. a clip that adapts; () if nothing
    compute: (key, state, params, stats, batch) -> (gradient like params, state, stats, metrics: scalars, a mean over the batch)
    metrics: the names of these metrics; "loss" is one
    event:   the record-level DpEvent of one step for a record in the batch, before records are sampled; noise in clips
    """

    init: Callable[[PyTree], PyTree]
    compute: Callable[[Key, PyTree, PyTree, PyTree, Batch], tuple[PyTree, PyTree, PyTree, Metrics]]
    metrics: tuple[str, ...] = ("loss",)
    event: dp_accounting.DpEvent = dp_accounting.NonPrivateDpEvent()


def no_amplification(event: dp_accounting.DpEvent) -> dp_accounting.DpEvent:
    """The amplification of a sampler for which nothing can be claimed: the event itself."""
    return event


def unaccounted(event: dp_accounting.DpEvent, num_records: int) -> dp_accounting.DpEvent:
    """The round of batches of which nothing is known: not private, whatever a step costs."""
    del event, num_records
    return dp_accounting.NonPrivateDpEvent()


class Batches(NamedTuple):
    """Which records are in which step.

    size:     B, static
    steps:    (num_records int32) -> int32, the steps a site makes in one round
    order:    (key, num_records) -> what a site prepares once a round, e.g. the seed of its order
    draw:     (order, t) -> (index int32[B] in [0, num_records), mask float32[B]); pure, so the same on any lane
    expected: (order) -> float32, how many records a step has in expectation
    account:  (DpEvent of one step, num_records) -> DpEvent of a round at a site of so many records, with the amplification that the
              sampling of records earns and under the relation that it needs
    """

    size: int
    steps: Callable[[Array], Array]
    order: Callable[[Key, Array], PyTree]
    draw: Callable[[PyTree, Array], tuple[Array, Array]]
    expected: Callable[[PyTree], Array]
    account: Callable[[dp_accounting.DpEvent, int], dp_accounting.DpEvent] = unaccounted


def not_private(num_records: int) -> dp_accounting.DpEvent:
    """The event of a client that promises nothing: epsilon is infinite."""
    del num_records
    return dp_accounting.NonPrivateDpEvent()


def mean_state(key: Key, clients: PyTree) -> PyTree:
    """What a newcomer begins with where nothing else is said: the mean over the sites' states [N, ...]; of what is not real, the first's."""
    del key

    def middle(leaf: Array) -> Array:
        return leaf.mean(0) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf[0]

    return jax.tree.map(middle, clients)


def uncompressed(shared: PyTree) -> int:
    """The bits of a message that is sent as it is."""
    return sum(8 * leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shared))


class Client(NamedTuple):
    """One site's side of a round, written for ONE site; the engine decides which sites step side by side.

    init:    (variables) -> (shared, client_state): what is broadcast, and what one site keeps between rounds
    begin:   (key, shared, client_state, site) -> carry
    step:    (key, carry, shared, batch) -> carry: one mini-batch
    end:     (carry, shared, client_state) -> (message, client_state, metrics): message is a pseudo-gradient like `shared`
    model:   (shared, client_state) -> variables: what the site deploys
    batches: the records of each step
    event:   (num_records) -> the record-level DpEvent of one round
    message_event: the client-level DpEvent of one message for whoever sees it, where it is private before the server gets it
    message_bits: (shared) -> the bits of one message on the wire; a Python int, known from shapes
    adapt:   (key, shared, client_state, site) -> variables: what the site deploys after one more look at its records, which changes
             nothing that is kept or sent (fl_jax.deployment); None: `model`
    newcomer: (key, client states [N, ...]) -> the state with which a site begins that has taken no part
    """

    init: Callable[[Variables], tuple[PyTree, PyTree]]
    begin: Callable[[Key, PyTree, PyTree, Site], PyTree]
    step: Callable[[Key, PyTree, PyTree, Batch], PyTree]
    end: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree, Metrics]]
    model: Callable[[PyTree, PyTree], Variables]
    batches: Batches
    event: Callable[[int], dp_accounting.DpEvent] = not_private
    message_event: dp_accounting.DpEvent = dp_accounting.NonPrivateDpEvent()
    message_bits: Callable[[PyTree], int] = uncompressed
    adapt: Callable[[Key, PyTree, PyTree, Site], Variables] | None = None
    newcomer: Callable[[Key, PyTree], PyTree] = mean_state


class Uplink(NamedTuple):
    """What happens to a message before it leaves its site (fl_jax.uplink), written for ONE site.

    init:  (shared) -> state that the site keeps between rounds
    apply: (key, state, message) -> (message, state, metrics); both messages are like `shared`
    event: the DpEvent of one message, for whoever sees it and whatever else the site could have sent
    bits:  (shared) -> the bits of one message on the wire; a Python int, known from shapes
    """

    init: Callable[[PyTree], PyTree]
    apply: Callable[[Key, PyTree, PyTree], tuple[PyTree, PyTree, Metrics]]
    event: dp_accounting.DpEvent = dp_accounting.NonPrivateDpEvent()
    bits: Callable[[PyTree], int] = uncompressed


class Aggregator(NamedTuple):
    """How messages become one pseudo-gradient.

    init:    (shared, num_clients) -> state
    lift:    (key, state, weight, message) -> summand of one client; clipping lives here
    combine: (key, state, total) -> (pseudo-gradient like shared, state, metrics); noise and division live here
    event:   the client-level DpEvent of one round, before sampling; its noise is in clips (the bound on one summand), whatever the
             neighbouring relation, which is the ledger's (fl_jax.privacy)
    stacked: False: `total` is the sum of the summands, streamed (memory: one summand a lane). True: `total` is every summand,
             stacked on a leading axis of the cohort's length (zeros where nobody took part), for medians and the like.
    acts_when_empty: whether the server steps in a round without participants. A private aggregator must (that nobody came is
             private too); the others must not (an empty round is not a zero gradient).
    period:  how many rounds the event pays for: T rounds cost ceil(T / period) of it. Above 1 the event is one of
             fl_jax.mechanism, which is worth something only under a sampler that keeps a client's participations so far apart
    """

    init: Callable[[PyTree, int], PyTree]
    lift: Callable[[Key, PyTree, Array, PyTree], PyTree]
    combine: Callable[[Key, PyTree, PyTree], tuple[PyTree, PyTree, Metrics]]
    event: dp_accounting.DpEvent = dp_accounting.NonPrivateDpEvent()
    stacked: bool = False
    acts_when_empty: bool = False
    period: int = 1


class Cohort(NamedTuple):
    """Who takes part in a round.

    ids:    int32[c], distinct; an id equal to the number of clients is padding
    weight: float32[c], the client's weight in the aggregate; 0 = dropped out (it neither trains nor sends)
    steps:  int32[c], a cap on the client's steps: a straggler does fewer than its batches prescribe
    """

    ids: Array
    weight: Array
    steps: Array


class State(NamedTuple):
    """Everything a federated run carries from round to round.

    round: int32, rounds done. shared: what is broadcast. server: the optax state. aggregator: its state.
    clients: what sites keep, every leaf with a leading axis of num_clients.
    """

    round: Array
    shared: PyTree
    server: PyTree
    aggregator: PyTree
    clients: PyTree


class RoundMetrics(NamedTuple):
    """What a round reports and the next does not need. None of it is covered by a privacy guarantee.

    clients: each float32[c] in the cohort's order, 0 for padding and drop-outs: "participated", "nonfinite" (1: the message was
             not finite and was left out), "steps", and what the client's `end` returns.
    server:  scalars: "participants", "nonfinite", "lane_steps" (steps executed, idle lanes included), "steps" (useful ones),
             "update_norm", and what the aggregator's `combine` returns.
    """

    clients: Metrics
    server: Metrics


class FederatedAlgorithm(NamedTuple):
    """All that training, evaluation and tests may touch.

    init:  (variables, num_clients) -> State
    round: (key, State, Cohort, Sites) -> (State, RoundMetrics)
    visit: `round` on a State that holds the cohort's clients alone, a row each [c, ...]: what a round is without gather and scatter, for
           populations whose state does not fit on the device (fl_jax.host_clients)
    model: (State, id int32) -> Variables that site `id` has; vmap it for several
    deploy: (key, State, id int32, Sites) -> Variables that site `id` deploys, after one more look at its records among these; the state
            stays as it is. Without such a look it is `model`
    newcomer: (key, State.clients) -> what a site keeps that has taken no part
    welcome: (key, State, id int32, Sites) -> Variables that a site deploys which has taken no part: site `id` of these Sites, not of the
            federation's. It makes one round of its own on its records, of which nothing is sent; without records it takes what it is given
    payload: (State) -> (down, up), bytes that one client receives and sends in a round; Python ints
    client_event: the client-level DpEvent of one round, before client sampling is accounted
    record_event: (num_records) -> the record-level DpEvent of one round at a site
    client_period: how many rounds client_event pays for: T rounds cost ceil(T / client_period) of it
    norms: the name of its BatchNorm policy (fl_jax.norms), which stands in every result
    """

    init: Callable[[Variables, int], State]
    round: Callable[[Key, State, Cohort, Sites], tuple[State, RoundMetrics]]
    visit: Callable[[Key, State, Cohort, Sites], tuple[State, RoundMetrics]]
    model: Callable[[State, Array], Variables]
    deploy: Callable[[Key, State, Array, Sites], Variables]
    newcomer: Callable[[Key, PyTree], PyTree]
    welcome: Callable[[Key, State, Array, Sites], Variables]
    payload: Callable[[State], tuple[int, int]]
    client_event: dp_accounting.DpEvent
    record_event: Callable[[int], dp_accounting.DpEvent]
    client_period: int = 1
    norms: str = ""


class Sampling(NamedTuple):
    """Who takes part.

    draw:    (key, t, sites) -> Cohort. key: this round's. t: int32, rounds done before it, for samplers that promise something of
             rounds together: a promise must hold whatever keys it is given
    amplify: DpEvent of one round -> DpEvent of one sampled round; the sampler alone knows the amplification that it earns
    """

    draw: Callable[[Key, Array, Sites], Cohort]
    amplify: Callable[[dp_accounting.DpEvent], dp_accounting.DpEvent]
