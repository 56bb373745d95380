"""Several shared models, of which each site trains and deploys the one that suits its records: IFCA's client and its mean."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fl_jax import trees
from fl_jax.site_loss import site_loss
from fl_jax.types import Aggregator, Array, Batch, Client, Key, Metrics, Model, PyTree, Site, Variables


class Clusters(NamedTuple):
    """What is broadcast, and a message. models: what the client shares, stacked [k, ...]. members: float32[k], in a message 1 for the chosen
    cluster; in what is broadcast 0."""

    models: PyTree
    members: Array


class Member(NamedTuple):
    """What a site keeps, or carries. client: of its own. cluster: int32, the one that it chose last."""

    client: PyTree
    cluster: Array


def nearest(client: Client, model: Model, num_clusters: int, key: Key) -> Client:
    """`client` with the one of `num_clusters` models whose loss on the site's records is the least (Ghosh et al. 2020, "An efficient framework
    for clustered federated learning", Algorithm 1, lines 6 to 8).

    key: draws the start of all models but the first, which is the given one. Metric: "cluster", the chosen one. A site that has not yet
    taken part deploys the first; evaluation lets a newcomer with records choose.
    """
    loss = site_loss(model, client.batches.size)

    def init(variables: Variables) -> tuple[Clusters, Member]:
        shared, kept = client.init(variables)
        others = [client.init(model.init(own))[0] for own in jax.random.split(key, num_clusters - 1)]
        models = jax.tree.map(lambda *leaves: jnp.stack(leaves), shared, *others)
        return Clusters(models, jnp.zeros(num_clusters)), Member(kept, jnp.int32(0))

    def begin(key: Key, shared: Clusters, kept: Member, site: Site) -> Member:
        losses = jax.lax.map(lambda one: loss(client.model(one, kept.client), site), shared.models)
        cluster = jnp.argmin(losses).astype(jnp.int32)
        return Member(client.begin(key, trees.row(shared.models, cluster), kept.client, site), cluster)

    def step(key: Key, carry: Member, shared: Clusters, batch: Batch) -> Member:
        return carry._replace(client=client.step(key, carry.client, trees.row(shared.models, carry.cluster), batch))

    def end(carry: Member, shared: Clusters, kept: Member) -> tuple[Clusters, Member, Metrics]:
        message, own, metrics = client.end(carry.client, trees.row(shared.models, carry.cluster), kept.client)
        chosen = jax.nn.one_hot(carry.cluster, num_clusters)
        models = jax.tree.map(lambda leaf: jnp.multiply.outer(chosen.astype(leaf.dtype), leaf), message)
        return Clusters(models, chosen), Member(own, carry.cluster), metrics | {"cluster": carry.cluster}

    def model_of_site(shared: Clusters, kept: Member) -> Variables:
        return client.model(trees.row(shared.models, kept.cluster), kept.client)

    def bits(shared: Clusters) -> int:
        one, mark = client.message_bits(jax.eval_shape(lambda tree: trees.row(tree, jnp.int32(0)), shared.models)), 32
        return one + mark

    return Client(init, begin, step, end, model_of_site, client.batches, client.event, message_bits=bits)


def mean_of_members() -> Aggregator:
    """Of each model the mean of the messages of those who chose it, weighted by the cohort's weights; nobody's stays as it is (Ghosh et al.
    2020, Algorithm 1, option II). Metric: "largest_cluster", its share of the weight."""

    def lift(key: Key, state: PyTree, weight: Array, message: Clusters) -> Clusters:
        del key, state
        return optax.tree.scale(weight, message)

    def combine(key: Key, state: PyTree, total: Clusters) -> tuple[Clusters, PyTree, Metrics]:
        del key
        share = jnp.where(total.members > 0, 1 / jnp.where(total.members > 0, total.members, 1), 0)
        models = jax.tree.map(lambda leaf: leaf * share.reshape(-1, *(1,) * (leaf.ndim - 1)), total.models)
        largest = jnp.max(total.members) / jnp.maximum(jnp.sum(total.members), jnp.finfo(jnp.float32).tiny)
        return Clusters(models, jnp.zeros_like(total.members)), state, {"largest_cluster": largest}

    return Aggregator(lambda shared, num_clients: (), lift, combine)
