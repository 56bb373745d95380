"""Algorithms whose shared model is made to be adapted: where they become FedAvg, and the meta-gradient against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SIZES

from fl_jax import aggregators, algorithms, batches, deployment, gradients, sampling
from fl_jax.alone import site_at
from fl_jax.errors import FlJaxError
from fl_jax.types import Batch

KEY = jax.random.key(2)
N, SGD, WORK = len(SIZES), optax.sgd(0.1), batches.epochs(1, 4)
HEAD = algorithms.layers("Dense_1")
EVERYONE = sampling.everyone()


def close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def two_rounds(algorithm, variables, sites):
    state, round = algorithm.init(variables, N), jax.jit(algorithm.round)
    for r in range(2):
        state, _ = round(jax.random.fold_in(KEY, r), state, EVERYONE.draw(KEY, r, sites), sites)
    return state


@pytest.fixture(scope="module")
def averaged(normed_model, sites):
    """What two rounds of FedAvg share."""
    return two_rounds(algorithms.fedavg(normed_model, SGD, WORK), jax.jit(normed_model.init)(KEY), sites).shared


def test_tuned_fedavg_shares_fedavgs_model_and_deploys_what_tuning_makes_of_it(normed_model, sites, averaged):
    variables = jax.jit(normed_model.init)(KEY)
    tuning = batches.epochs(3, 16)
    algorithm = algorithms.fedavg_tuned(normed_model, SGD, WORK, tuning)
    state = two_rounds(algorithm, variables, sites)
    close(state.shared, averaged, 0)
    deployed = jax.jit(algorithm.deploy)(KEY, state, jnp.int32(2), sites)
    tune = deployment.fine_tuned(normed_model, SGD, tuning)
    tuned = jax.jit(lambda key: tune(key, averaged, site_at(sites, jnp.int32(2))))(KEY)
    close(deployed, tuned, 1e-4)  # the order within the one batch of an epoch is another


def test_fedbabus_head_stays_as_it_was_until_a_site_tunes_it(normed_model, sites):
    variables = jax.jit(normed_model.init)(KEY)
    algorithm = algorithms.fedbabu(normed_model, SGD, WORK, HEAD, batches.epochs(2, 4))
    state = two_rounds(algorithm, variables, sites)
    close(state.shared.params["Dense_1"], variables.params["Dense_1"], 0)
    assert np.any(state.shared.params["Dense_0"]["kernel"] != variables.params["Dense_0"]["kernel"])
    deployed = jax.jit(algorithm.deploy)(KEY, state, jnp.int32(2), sites)
    assert np.any(deployed.params["Dense_1"]["kernel"] != variables.params["Dense_1"]["kernel"])


def test_fedbabu_without_a_head_shares_fedavgs_model(normed_model, sites, averaged):
    variables = jax.jit(normed_model.init)(KEY)
    algorithm = algorithms.fedbabu(normed_model, SGD, WORK, algorithms.layers(), WORK)
    close(two_rounds(algorithm, variables, sites).shared, averaged)


@pytest.fixture(scope="module")
def tripled(sites):
    """Eight records, each three times in a row, so that every part of a batch has the same ones: the paper's expectation without noise."""
    rows = np.repeat(np.arange(8), 3)
    return Batch(np.asarray(sites.x)[rows], np.asarray(sites.y)[rows], np.ones(24, np.float32))


def loss_of(model, batch, params):
    return model.loss(KEY, params, {}, batch)[0]


def slope_of(model):
    """(params, batch) -> the gradient of the loss."""
    return jax.jit(jax.grad(lambda params, batch: loss_of(model, batch, params)))


def test_the_meta_gradient_is_that_of_the_loss_after_a_step(plain_model, tripled):
    params, alpha = jax.jit(plain_model.init)(KEY).params, 0.7
    own = Batch(tripled.x[::3], tripled.y[::3], tripled.mask[::3])

    def after_a_step(w):
        slope = jax.grad(lambda v: loss_of(plain_model, own, v))(w)
        return loss_of(plain_model, own, jax.tree.map(lambda leaf, g: leaf - alpha * g, w, slope))

    loss, exact = jax.jit(jax.value_and_grad(after_a_step))(params)
    curved = gradients.meta(gradients.plain(plain_model), alpha, hessian_step=1e-2)
    found, _, _, metrics = jax.jit(curved.compute)(KEY, (), params, {}, tripled)
    close(found, exact, 2e-4)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    # without the second derivative it is the gradient at the adapted parameters, and not the same
    pairs = Batch(np.repeat(own.x, 2, 0), np.repeat(own.y, 2, 0), np.ones(16, np.float32))
    first_order, *_ = jax.jit(gradients.meta(gradients.plain(plain_model), alpha).compute)(KEY, (), params, {}, pairs)
    slope = slope_of(plain_model)
    adapted = jax.tree.map(lambda leaf, g: leaf - alpha * g, params, slope(params, own))
    close(first_order, slope(adapted, own))
    assert np.abs(first_order["Dense_0"]["kernel"] - exact["Dense_0"]["kernel"]).max() > 0.01


def test_without_an_inner_step_it_is_the_gradient_of_a_part_of_the_batch(plain_model, sites):
    params = jax.jit(plain_model.init)(KEY).params
    batch = Batch(np.asarray(sites.x)[:9], np.asarray(sites.y)[:9], np.float32(np.arange(9) < 8))
    for step, part in ((None, slice(1, None, 2)), (1e-3, slice(1, None, 3))):
        gradient = gradients.meta(gradients.plain(plain_model), 0.0, hessian_step=step)
        found, *_ = jax.jit(gradient.compute)(KEY, (), params, {}, batch)
        own = Batch(batch.x[part], batch.y[part], batch.mask[part])
        close(found, slope_of(plain_model)(params, own))


def test_per_fedavg_deploys_one_step_from_a_model_that_is_made_for_it(plain_model, sites):
    algorithm = algorithms.per_fedavg(plain_model, SGD, batches.epochs(1, 16), 0.3)
    state = two_rounds(algorithm, jax.jit(plain_model.init)(KEY), sites)
    deployed = jax.jit(algorithm.deploy)(KEY, state, jnp.int32(2), sites)
    rows = slice(int(sites.offset[2]), int(sites.offset[2] + sites.size[2]))
    own = Batch(np.asarray(sites.x)[rows], np.asarray(sites.y)[rows], np.ones(int(sites.size[2]), np.float32))
    slope = slope_of(plain_model)(state.shared.params, own)
    close(deployed.params, jax.tree.map(lambda w, g: w - 0.3 * g, state.shared.params, slope))


def test_inner_rates_are_axes_of_one_program(plain_model, sites):
    def run(rate):
        algorithm = algorithms.per_fedavg(plain_model, SGD, WORK, rate, hessian_step=1e-2)
        state = algorithm.init(plain_model.init(KEY), N)
        return algorithm.round(KEY, state, EVERYONE.draw(KEY, 0, sites), sites)[0].shared

    rates = jnp.array([0.0, 0.5])
    mapped, alone = jax.jit(jax.vmap(run))(rates), jax.jit(run)
    for i, rate in enumerate(rates):
        close(jax.tree.map(lambda leaf, i=i: leaf[i], mapped), alone(rate))


def test_what_does_not_fit_is_refused(plain_model, sites):
    with pytest.raises(FlJaxError, match="does not account"):
        gradients.meta(gradients.private(plain_model, 1.0, 1.0), 0.1)
    with pytest.raises(FlJaxError, match="larger batch size"):
        gradients.meta(gradients.plain(plain_model), 0.1, hessian_step=0.1).compute(
            KEY, (), jax.jit(plain_model.init)(KEY).params, {}, Batch(sites.x[:2], sites.y[:2], jnp.ones(2)))
    with pytest.raises(TypeError, match="leave out `deploy`"):
        algorithms.fedavg_tuned(plain_model, SGD, WORK, WORK, deploy=lambda key, variables, site: variables)
    for build in (lambda policy: algorithms.mr_mtl(plain_model, SGD, WORK, 1.0, norms=policy), lambda policy: algorithms.pfedme(
            plain_model, WORK, norms=policy)):
        with pytest.raises(TypeError, match="leave out `norms`"):
            build(None)
    assert algorithms.per_fedavg(plain_model, SGD, WORK, 0.1, aggregator=aggregators.median()).client_event == aggregators.mean().event
