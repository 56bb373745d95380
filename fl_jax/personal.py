"""Clients with a model of their own beside the one that is shared: what each keeps, trains, sends and deploys."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fl_jax import trees
from fl_jax.clients import Training, by_path, everything_local, local_training
from fl_jax.types import Array, Batch, Batches, Client, Gradient, IsLocal, Key, Metrics, Model, PyTree, Site, Variables


class Two(NamedTuple):
    """Of the shared model and of the site's own: what is kept, or carried."""

    shared: PyTree
    own: PyTree


def own_training(model: Model, gradient: Gradient, optimizer: optax.GradientTransformation, batches: Batches) -> Client:
    """clients.local_training of a model that stays at its site as a whole. Its `step` takes as `shared` whatever variables the optimizer is
    to be anchored at."""
    return local_training(model, gradient, optimizer, batches, is_local=everything_local)


def beside(client: Client, own: Client) -> Client:
    """Two trainings on the same batches: `client`'s, whose message is sent, and that of the site's `own_training`, anchored at what was
    broadcast, which is deployed (Ditto; Li et al. 2021).

    Record-level privacy is `client`'s: the own model never leaves its site. Metrics of the own one begin with "own_".
    """

    def init(variables: Variables) -> tuple[PyTree, Two]:
        shared, kept = client.init(variables)
        return shared, Two(kept, own.init(variables)[1])

    def begin(key: Key, shared: PyTree, kept: Two, site: Site) -> Two:
        first, second = jax.random.split(key)
        return Two(client.begin(first, shared, kept.shared, site), own.begin(second, _nothing(shared), kept.own, site))

    def step(key: Key, carry: Two, shared: PyTree, batch: Batch) -> Two:
        first, second = jax.random.split(key)
        return Two(client.step(first, carry.shared, shared, batch), own.step(second, carry.own, shared, batch))

    def end(carry: Two, shared: PyTree, kept: Two) -> tuple[PyTree, Two, Metrics]:
        message, after, metrics = client.end(carry.shared, shared, kept.shared)
        _, mine, more = own.end(carry.own, _nothing(shared), kept.own)
        return message, Two(after, mine), metrics | {f"own_{name}": value for name, value in more.items()}

    def model(shared: PyTree, kept: Two) -> Variables:
        return own.model(_nothing(shared), kept.own)

    return Client(init, begin, step, end, model, client.batches, client.event, client.message_event, client.message_bits)


def pulled_to_mean(own: Client) -> Client:
    """A site's `own_training`, anchored at the mean of all sites' models, which it sends after the round (MR-MTL; Liu et al. 2022)."""

    def init(variables: Variables) -> tuple[Variables, PyTree]:
        return variables, own.init(variables)[1]

    def begin(key: Key, shared: Variables, kept: PyTree, site: Site) -> PyTree:
        return own.begin(key, _nothing(shared), kept, site)

    def end(carry: PyTree, shared: Variables, kept: PyTree) -> tuple[Variables, PyTree, Metrics]:
        _, mine, metrics = own.end(carry, _nothing(shared), kept)
        return optax.tree.sub(shared, mine.leaves), mine, metrics

    def model(shared: Variables, kept: PyTree) -> Variables:
        return own.model(_nothing(shared), kept)

    return Client(init, begin, own.step, end, model, own.batches, own.event)


class _Envelope(NamedTuple):
    """local: w_i. own: theta, and the oracle's state. loss: the sum over records of the losses at the first inner step."""

    local: PyTree
    own: Variables
    gradient: PyTree
    loss: Array
    records: Array


def moreau_envelope(
    model: Model, gradient: Gradient, batches: Batches, *, strength: float | Array, inner_steps: int, inner_rate: float | Array,
    rate: float | Array,
) -> Client:
    """pFedMe's client: each batch moves the own model theta by `inner_steps` of gradient descent on f(theta) + strength/2 |theta - w|^2, and the
    local copy w of the shared one by -rate strength (w - theta), the gradient of the Moreau envelope (T. Dinh et al. 2020, "Personalized
    federated learning with Moreau envelopes", Algorithm 1 and eq. 7).

    The own model starts at the broadcast one in each round, as in the published code. Statistics are the own model's.
    """

    def init(variables: Variables) -> tuple[Variables, tuple[Variables, PyTree]]:
        return variables, (variables, gradient.init(variables.params))

    def begin(key: Key, shared: Variables, kept: tuple[Variables, PyTree], site: Site) -> _Envelope:
        del key, site
        return _Envelope(shared.params, shared, kept[1], jnp.float32(0), jnp.float32(0))

    def step(key: Key, carry: _Envelope, shared: Variables, batch: Batch) -> _Envelope:
        del shared
        (params, stats), state, losses = carry.own, carry.gradient, []
        for k in range(inner_steps):
            slope, state, stats, metrics = gradient.compute(jax.random.fold_in(key, k), state, params, stats, batch)
            params = jax.tree.map(lambda p, g, w: p - inner_rate * (g + strength * (p - w)), params, slope, carry.local)
            losses.append(metrics["loss"])
        local = jax.tree.map(lambda w, p: w - rate * strength * (w - p), carry.local, params)
        records = jnp.sum(batch.mask)
        return _Envelope(local, Variables(params, stats), state, carry.loss + losses[0] * records, carry.records + records)

    def end(carry: _Envelope, shared: Variables, kept: PyTree) -> tuple[Variables, tuple[Variables, PyTree], Metrics]:
        del kept
        message = optax.tree.sub(shared, Variables(carry.local, carry.own.stats))
        return message, (carry.own, carry.gradient), {"loss": carry.loss / jnp.maximum(carry.records, 1), "records": carry.records}

    return Client(init, begin, step, end, lambda shared, kept: kept[0], batches)


class _Mixture(NamedTuple):
    training: PyTree
    own: PyTree
    alpha: Array


def mixture(
    client: Client, gradient: Gradient, *, alpha: float | Array, rate: float | Array, alpha_rate: float | Array = 0.0
) -> Client:
    """APFL's client: trains the shared model as `client` does, and an own one v by the gradient of the mixture alpha v + (1 - alpha) w, which is
    deployed (Deng et al. 2020, "Adaptive personalized federated learning", Algorithm 1).

    client: of clients.local_training with nothing local. rate: of v's gradient descent. alpha_rate: of alpha's own, eq. 10; 0 keeps it
    fixed. gradient: an oracle without state, for the mixture. Statistics are those of the shared model.
    """

    def mixed(alpha: Array, own: PyTree, shared: PyTree) -> PyTree:
        return jax.tree.map(lambda v, w: alpha * v + (1 - alpha) * w, own, shared)

    def init(variables: Variables) -> tuple[Variables, tuple[PyTree, PyTree, Array]]:
        shared, kept = client.init(variables)
        return shared, (kept, variables.params, jnp.float32(alpha))

    def begin(key: Key, shared: Variables, kept: tuple[PyTree, PyTree, Array], site: Site) -> _Mixture:
        return _Mixture(client.begin(key, shared, kept[0], site), *kept[1:])

    def step(key: Key, carry: _Mixture, shared: Variables, batch: Batch) -> _Mixture:
        first, second = jax.random.split(key)
        (w, stats), v, a = carry.training.variables, carry.own, carry.alpha
        slope, *_ = gradient.compute(second, gradient.init(v), mixed(a, v, w), stats, batch)
        towards = optax.tree.vdot(jax.tree.map(jnp.subtract, v, w), slope)
        own = jax.tree.map(lambda leaf, g: leaf - rate * a * g, v, slope)
        return _Mixture(client.step(first, carry.training, shared, batch), own, jnp.clip(a - alpha_rate * towards, 0, 1))

    def end(carry: _Mixture, shared: Variables, kept: tuple[PyTree, PyTree, Array]) -> tuple[Variables, PyTree, Metrics]:
        message, after, metrics = client.end(carry.training, shared, kept[0])
        return message, (after, carry.own, carry.alpha), metrics | {"alpha": carry.alpha}

    def model(shared: Variables, kept: tuple[PyTree, PyTree, Array]) -> Variables:
        _, own, a = kept
        return Variables(mixed(a, own, shared.params), shared.stats)

    return Client(init, begin, step, end, model, client.batches, client.event, client.message_event, client.message_bits)


class _Blended(NamedTuple):
    """Of FedALA: what a site keeps. client: of the shared training. own: its model. weights: of its blending, None below the top. rounds: int32, in
    how many it took part."""

    client: PyTree
    own: Variables
    weights: PyTree
    rounds: Array


def blended(
    client: Client, model: Model, gradient: Gradient, top: IsLocal, *, rate: float | Array, share: float | Array, first_passes: int | Array
) -> Client:
    """FedALA's client: `client`, of clients.local_training, that begins a round at own + (shared - own) * W, element by element in the layers
    of `top` and at the shared model below, where W in [0, 1] descends the loss first (Zhang et al. 2023, "FedALA: Adaptive local aggregation
    for personalized federated learning", Algorithm 1, eq. 3 to 5).

    gradient: an oracle without state, for W. share: of the steps of one pass in which W learns. The own model, trained, is deployed. A
    newcomer blends what it is given with the mean of the sites' models.
    """
    is_top = by_path(model, top)

    def above(params: PyTree) -> PyTree:
        return trees.split(Variables(params, {}), is_top)[0].params

    def init(variables: Variables) -> tuple[Variables, _Blended]:
        shared, kept = client.init(variables)
        return shared, _Blended(kept, variables, jax.tree.map(jnp.ones_like, above(variables.params)), jnp.int32(0))

    def begin(key: Key, shared: Variables, kept: _Blended, site: Site) -> tuple[PyTree, PyTree]:
        ordering, learning, training = jax.random.split(key, 3)
        (given, stats), own = client.model(shared, kept.client), kept.own.params
        apart = jax.tree.map(jnp.subtract, above(given), above(own))
        order = client.batches.order(ordering, jnp.maximum(site.num_records, 1))
        pass_steps = -(-site.num_records // client.batches.size)

        def blend(weights: PyTree) -> PyTree:
            mixed = jax.tree.map(lambda v, d, w: v + d * w, above(own), apart, weights)
            return jax.tree.map(lambda w, m: w if m is None else m, given, mixed, is_leaf=lambda leaf: leaf is None)

        def learn(t: Array, weights: PyTree) -> PyTree:
            index, mask = client.batches.draw(order, t)
            at = blend(weights)
            slope, *_ = gradient.compute(
                jax.random.fold_in(learning, t), gradient.init(at), at, stats, Batch(*site.take(index), mask, client.batches.expected(order)))
            return jax.tree.map(lambda w, g, d: jnp.clip(w - rate * g * d, 0, 1), weights, above(slope), apart)

        passes = jnp.where(kept.rounds == 1, first_passes, 1)
        steps = jnp.ceil(share * pass_steps).astype(jnp.int32) * passes
        weights = jax.lax.fori_loop(0, steps, learn, kept.weights)
        begun: Training = client.begin(training, shared, kept.client, site)
        return begun._replace(variables=begun.variables._replace(params=blend(weights))), weights

    def step(key: Key, carry: tuple[PyTree, PyTree], shared: Variables, batch: Batch) -> tuple[PyTree, PyTree]:
        return client.step(key, carry[0], shared, batch), carry[1]

    def end(carry: tuple[PyTree, PyTree], shared: Variables, kept: _Blended) -> tuple[Variables, _Blended, Metrics]:
        training, weights = carry
        message, after, metrics = client.end(training, shared, kept.client)
        leaves = jax.tree.leaves(weights)
        mean = sum(jnp.sum(leaf) for leaf in leaves) / max(sum(leaf.size for leaf in leaves), 1)
        return message, _Blended(after, training.variables, weights, kept.rounds + 1), metrics | {"shared_weight": jnp.float32(mean)}

    def own_model(shared: Variables, kept: _Blended) -> Variables:
        del shared
        return kept.own

    return Client(init, begin, step, end, own_model, client.batches, client.event, client.message_event, client.message_bits)


def _nothing(tree: PyTree) -> PyTree:
    """The tree with None for every leaf: what is shared where everything stays."""
    return trees.split(tree, lambda path: False)[0]
