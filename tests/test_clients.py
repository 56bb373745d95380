"""One site's side of a round, driven here by a plain loop over its batches instead of the engine."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fl_jax import batches, clients, gradients, models, norms
from fl_jax.types import Batch, Site, Variables

KEY = jax.random.key(2)
ID = 2  # the largest site: 12 records


@pytest.fixture(scope="module")
def plain_variables(plain_model) -> Variables:
    return jax.jit(plain_model.init)(KEY)


@pytest.fixture(scope="module")
def normed_variables(normed_model) -> Variables:
    return jax.jit(normed_model.init)(KEY)


def records(sites):
    rows = slice(int(sites.offset[ID]), int(sites.offset[ID] + sites.size[ID]))
    return sites.x[rows], sites.y[rows]


def batches_of(budget, sites):
    """The batches of the site's round; what padding rows hold must not matter, so it is NaN."""
    x, y = records(sites)
    n = jnp.int32(len(y))
    order, draw = budget.order(KEY, n), jax.jit(budget.draw)
    for t in range(int(budget.steps(n))):
        index, mask = draw(order, jnp.int32(t))
        yield Batch(jnp.where(mask[:, None] > 0, x[index], jnp.nan), y[index], mask)


def go(client, variables, sites, shared=None):
    """One round of the site. Returns shared, what the site kept before, and the (message, kept, metrics) of its end."""
    first, kept = client.init(variables)
    shared = first if shared is None else shared
    site = Site(jnp.int32(ID), sites.size[ID], client.batches.steps(sites.size[ID]), lambda index: records(sites))
    carry, step = client.begin(KEY, shared, kept, site), jax.jit(client.step)
    for t, batch in enumerate(batches_of(client.batches, sites)):
        carry = step(jax.random.fold_in(KEY, t), carry, shared, batch)
    return shared, kept, client.end(carry, shared, kept)


def close(a, b, tolerance=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def full(sites):
    x, y = records(sites)
    return Batch(x, y, jnp.ones(len(y)))


@pytest.mark.parametrize("budget", [
    batches.epochs(2, 5), batches.epochs(1, 16), batches.updates(2, 5)], ids=["padded", "one batch", "a part"])
def test_the_loss_is_the_mean_over_the_records_seen(plain_model, plain_variables, sites, budget):
    client = clients.local_training(plain_model, gradients.plain(plain_model), optax.sgd(0.0), budget)
    _, _, (message, _, metrics) = go(client, plain_variables, sites)
    seen = [batch for batch in batches_of(budget, sites)]
    x, y, mask = (np.concatenate([np.asarray(getattr(batch, name)) for batch in seen]) for name in ("x", "y", "mask"))
    losses = plain_model.evaluate(plain_model.predict(plain_variables, x[mask > 0]), y[mask > 0])
    assert float(metrics["records"]) == mask.sum()
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-6)
    close(message, jax.tree.map(jnp.zeros_like, plain_variables), 0)  # at a learning rate of 0


def test_the_loss_is_of_the_model_as_it_was_at_each_step(plain_model, plain_variables, sites):
    budget = batches.epochs(1, 5)
    client = clients.local_training(plain_model, gradients.plain(plain_model), optax.sgd(0.5), budget)
    shared, _, (message, _, metrics) = go(client, plain_variables, sites)
    params, losses = plain_variables.params, []
    gradient = jax.jit(jax.grad(plain_model.loss, argnums=1, has_aux=True))
    for batch in batches_of(budget, sites):
        rows = np.asarray(batch.mask) > 0
        whole = Batch(batch.x[rows], batch.y[rows], jnp.ones(rows.sum()))
        losses += list(plain_model.evaluate(plain_model.predict(Variables(params, {}), whole.x), whole.y))
        slope, _ = gradient(KEY, params, {}, whole)
        params = jax.tree.map(lambda w, g: w - 0.5 * g, params, slope)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    close(message.params, optax.tree.sub(shared.params, params), 1e-5)


def test_what_is_local_trains_and_stays_and_the_rest_is_sent(normed_model, normed_variables, sites):
    budget, gradient = batches.epochs(2, 5), gradients.plain(normed_model)
    everything = go(clients.local_training(normed_model, gradient, optax.sgd(0.1), budget), normed_variables, sites)
    client = clients.local_training(normed_model, gradient, optax.sgd(0.1), budget, is_local=norms.LOCAL.is_local)
    shared, before, (message, kept, _) = go(client, normed_variables, sites)
    assert jax.tree.structure(message) == jax.tree.structure(shared) and jax.tree.structure(kept) == jax.tree.structure(before)
    close(client.model(shared, before), normed_variables, 0)
    trained = optax.tree.sub(everything[0], everything[2][0])
    close(client.model(optax.tree.sub(shared, message), kept), trained)
    assert all(np.abs(a - b).max() > 1e-4 for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(before), strict=True))
    alone = clients.local_training(normed_model, gradient, optax.sgd(0.1), budget, is_local=clients.everything_local)
    shared, _, (message, kept, _) = go(alone, normed_variables, sites)
    assert not jax.tree.leaves(shared) and not jax.tree.leaves(message)
    close(kept.leaves, trained)


def test_the_optimizer_is_fresh_in_each_round_and_is_given_the_broadcast_as_the_anchor(normed_model, normed_variables, sites):
    seen = []

    def update(updates, count, params=None, *, anchor, **_):
        seen.append(jax.tree.structure(anchor))
        pull = jax.tree.map(lambda g, w, a: g if a is None else w - a, updates, params, anchor)
        return jax.tree.map(lambda g: -g / (1.0 + count), pull), count + 1

    schedule = optax.GradientTransformationExtraArgs(lambda params: jnp.int32(0), update)
    gradient = gradients.plain(normed_model)
    client = clients.local_training(normed_model, gradient, schedule, batches.epochs(1, 5), is_local=norms.LOCAL.is_local)
    shared, _, (message, _, _) = go(client, normed_variables, sites)
    assert seen[0] == jax.tree.structure(shared.params)
    close(message, jax.tree.map(jnp.zeros_like, message), 0)  # the first step is at the anchor, and there it stays
    _, _, (again, _, _) = go(client, normed_variables, sites)
    close(again, message, 0)


@pytest.mark.parametrize("batch_size", [5, 4, 16])
def test_fedsgd_sends_the_gradient_of_the_mean_loss_whatever_the_batch_size(plain_model, plain_variables, sites, batch_size):
    client = clients.full_gradient(gradients.plain(plain_model), batches.epochs(1, batch_size))
    shared, kept, (message, kept_after, metrics) = go(client, plain_variables, sites)
    whole = full(sites)
    value, slope = jax.value_and_grad(lambda params: plain_model.loss(KEY, params, {}, whole)[0])(plain_variables.params)
    close(message, Variables(slope, {}), 1e-6)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    assert float(metrics["records"]) == len(whole.y) and kept == kept_after == ()
    assert client.model(shared, kept) is shared


def test_fedsgd_sends_what_its_batches_did_to_the_statistics(normed_model, normed_variables, sites):
    client = clients.full_gradient(gradients.plain(normed_model), batches.epochs(1, 16))
    shared, _, (message, _, _) = go(client, normed_variables, sites)
    whole = full(sites)
    slope, stats = jax.jit(jax.grad(normed_model.loss, argnums=1, has_aux=True))(KEY, *normed_variables, whole)
    close(message, Variables(slope, optax.tree.sub(shared.stats, stats)), 2e-6)


def test_a_batch_of_padding_only_gives_no_gradient_and_keeps_statistics(normed_model, normed_variables):
    nothing = Batch(jnp.full((4, 4), jnp.nan), jnp.zeros(4, jnp.int32), jnp.zeros(4))
    slope, _, stats, metrics = jax.jit(gradients.plain(normed_model).compute)(KEY, (), *normed_variables, nothing)
    close(slope, jax.tree.map(jnp.zeros_like, normed_variables.params), 0)
    close(stats, normed_variables.stats, 0)
    assert metrics["loss"] == 0


def test_a_predicate_is_asked_about_the_innermost_module_that_owns_a_leaf():
    model = models.bridge(models.ResNet18(3, models.batch_norm, width=4), jnp.zeros((1, 8, 8, 1)), models.softmax_cross_entropy)
    asked = {}
    client = clients.local_training(model, gradients.plain(model), optax.sgd(0.1), batches.epochs(1, 4),
                                    is_local=lambda path, module: asked.update({path: module.__name__}) or False)
    jax.eval_shape(client.init, jax.eval_shape(model.init, KEY))
    assert {path[-2].rstrip("0123456789_"): name for path, name in asked.items()} == {
        "Conv": "Conv", "BatchNorm": "BatchNorm", "Dense": "Dense"}
    assert asked["params", "ResidualBlock_2", "BatchNorm_2", "scale"] == "BatchNorm"
