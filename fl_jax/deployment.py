"""What a site does with a model before it uses it: train it further on its own records, or measure BatchNorm's statistics anew.

Nothing of this is kept or sent, so that it changes no round; evaluation asks for it (FederatedAlgorithm.deploy and .welcome). Without a
say, a site deploys what it has, and a newcomer what one round of its own makes of what it is given.
"""

import jax
import jax.numpy as jnp
import optax

from fl_jax import gradients, trees
from fl_jax.alone import alone
from fl_jax.clients import by_path, nothing_local
from fl_jax.norms import statistics_of_batch_norm
from fl_jax.personal import own_training
from fl_jax.transforms import only
from fl_jax.types import Array, Batch, Batches, Client, Deploy, Gradient, IsLocal, Key, Model, PyTree, Site, Variables


def deploying(client: Client, *steps: Deploy) -> Client:
    """`client`, whose sites take these steps, one after another, before they use what they have; before them its own, if it has any."""

    def adapt(key: Key, shared: PyTree, kept: PyTree, site: Site) -> Variables:
        first, *keys = jax.random.split(key, 1 + len(steps))
        variables = client.model(shared, kept) if client.adapt is None else client.adapt(first, shared, kept, site)
        for step, own in zip(steps, keys, strict=True):
            variables = step(own, variables, site)
        return variables

    return client._replace(adapt=adapt) if steps else client


def fine_tuned(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, *, gradient: Gradient | None = None,
    fixed: IsLocal = nothing_local,
) -> Deploy:
    """Trains what the site has on its own records, with a fresh optimizer.

    batches: how long, e.g. batches.epochs(1, 10), or batches.updates(1, 10) for a single step. fixed: leaves that stay as they are, e.g. the
    body of a network whose head alone is tuned. gradient: the oracle, by default the plain one. Another private one spends anew
    whenever a site deploys: no ledger counts that.
    """
    trained = by_path(model, lambda path, module: not fixed(path, module))
    client = own_training(model, gradient or gradients.plain(model), only(optimizer, trained), batches)

    def tuned(key: Key, variables: Variables, site: Site) -> Variables:
        shared, kept = client.init(variables)
        _, kept, _ = alone(client, key, shared, kept, site)
        return client.model(shared, kept)

    return tuned


def recalibrated(model: Model, batches: Batches) -> Deploy:
    """Measures the running statistics of BatchNorm layers anew on the site's records, whose labels play no part: what AdaBN does at a new
    domain (Li et al. 2016, "Revisiting batch normalization for practical domain adaptation", Algorithm 1).

    batches: one epoch is enough; of the batches' means and variances the mean is taken, weighted by their records. A site without records
    keeps the statistics that it has, and so does a model without BatchNorm.
    """
    measured = by_path(model, statistics_of_batch_norm)

    def adapt(key: Key, variables: Variables, site: Site) -> Variables:
        ordering, stepping = jax.random.split(key)
        order = batches.order(ordering, jnp.maximum(site.num_records, 1))
        params, stats = variables

        def step(t: Array, sums: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
            index, mask = batches.draw(order, t)
            batch = Batch(*site.take(index), mask)

            def after(start: float) -> PyTree:
                return model.loss(jax.random.fold_in(stepping, t), params, optax.tree.full_like(stats, start), batch)[1]

            # A running average is momentum * before + (1 - momentum) * batch, whatever the layer's momentum: two starts tell both.
            records = jnp.sum(mask)
            of_batch = jax.tree.map(lambda zero, one: zero / jnp.where(one - zero < 1, 1 - (one - zero), 1), after(0.0), after(1.0))
            return jax.tree.map(lambda total, leaf: total + records * leaf, sums[0], of_batch), sums[1] + records

        steps = jnp.where(site.num_records > 0, batches.steps(site.num_records), 0)
        total, records = jax.lax.fori_loop(0, steps, step, (optax.tree.zeros_like(stats), jnp.float32(0)))
        anew = jax.tree.map(lambda sum, leaf: jnp.where(records > 0, sum / jnp.maximum(records, 1), leaf), total, stats)
        chosen, _ = trees.split(Variables(params, anew), measured)
        _, rest = trees.split(variables, measured)
        return trees.merge(chosen, rest)

    return adapt
