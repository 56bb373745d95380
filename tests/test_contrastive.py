"""MOON against NumPy, where it becomes FedAvg, and what it does with padding and BatchNorm."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SIZES
from flax import nnx

from fl_jax import algorithms, batches, contrastive, gradients, measured, models, norms
from fl_jax.contrastive import Anchors
from fl_jax.errors import FlJaxError
from fl_jax.models.features import entering
from fl_jax.types import Batch, Cohort, Sites, Variables

KEY = jax.random.key(2)
MU, TAU = 3.0, 0.5
SIZE = 5


def everyone(steps, count=2):
    return Cohort(jnp.arange(count), jnp.ones(count), jnp.full(count, steps))


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(3)(x))
        return nn.Dense(1)(x)


RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(2, SIZE, 2)), RNG.normal(size=(2, SIZE))
SITES = Sites(jnp.asarray(X.reshape(-1, 2), jnp.float32), jnp.asarray(Y.reshape(-1), jnp.float32), jnp.array([0, SIZE]), jnp.array([SIZE] * 2))
SMALL = models.bridge(Small(), jnp.zeros((1, 2)), models.squared_error)


def representation(w, x):
    return np.tanh(x @ w[:6].reshape(2, 3) + w[6:9])


def objective(w, i, broadcast, previous, mu):
    """Eq. 3 and 5 of the paper for a network of the weights w, in float64."""
    z, others = representation(w, X[i]), [representation(v, X[i]) for v in (broadcast, previous)]
    cosines = [np.sum(z * other, 1) / np.linalg.norm(z, axis=1) / np.linalg.norm(other, axis=1) for other in others]
    exponents = np.exp(np.array(cosines) / TAU)
    return np.mean((z @ w[9:12] + w[12] - Y[i]) ** 2) - mu * np.mean(np.log(exponents[0] / exponents.sum(0)))


def flat(params):
    return np.concatenate([np.ravel(np.float64(params[f"Dense_{k}"][leaf])) for k in (0, 1) for leaf in ("kernel", "bias")])


def test_moon_is_algorithm_1():
    """Three rounds in float64 NumPy, whose gradients are central differences of the objective; with mu = 0 it is FedAvg."""
    rate, steps, mus = 0.1, 4, (0.0, MU)
    start = SMALL.init(KEY)
    work = measured.in_order(SIZE)._replace(steps=lambda num_records: jnp.full_like(num_records, steps))

    def three(algorithm):
        begin = algorithm.init(start, 2)
        return jax.lax.scan(lambda state, key: algorithm.round(key, state, everyone(steps), SITES), begin, jax.random.split(KEY, 3))

    states, metrics = jax.jit(jax.vmap(lambda mu: three(algorithms.moon(SMALL, optax.sgd(rate), work, "Dense_1", mu, tau=TAU))))(jnp.array(mus))
    for k, mu in enumerate(mus):
        w = flat(start.params)
        previous = [w, w]
        for r in range(3):
            found = []
            for i in range(2):
                v = w.copy()
                for _ in range(steps):
                    ends = [[objective(v + side, i, w, previous[i], mu) for side in (e, -e)] for e in 1e-5 * np.eye(13)]
                    v -= rate * np.array([(up - down) / 2e-5 for up, down in ends])
                found.append(v)
            w, previous = np.mean(found, 0), found
            np.testing.assert_allclose(metrics.clients["contrast"][k, r] == np.float32(np.log(2)), r == 0)
        np.testing.assert_allclose(flat(jax.tree.map(lambda leaf, k=k: leaf[k], states.shared.params)), w, rtol=1e-4, atol=1e-5)
        kept = states.clients.gradient.model.params
        np.testing.assert_allclose([flat(jax.tree.map(lambda leaf, i=i, k=k: leaf[k, i], kept)) for i in range(2)], found, rtol=1e-4, atol=1e-5)
    averaged, _ = jax.jit(lambda: three(algorithms.fedavg(SMALL, optax.sgd(rate), work)))()
    np.testing.assert_allclose(flat(jax.tree.map(lambda leaf: leaf[0], states.shared.params)), flat(averaged.shared.params), rtol=1e-5)
    assert np.abs(flat(jax.tree.map(lambda leaf: leaf[1], states.shared.params)) - flat(averaged.shared.params)).max() > 0.01


def hidden(params, x, mean, var):
    """What enters the head of the network with a BatchNorm layer, by hand."""
    x = x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    x = (x - mean) / jnp.sqrt(var + 1e-5) * params["BatchNorm_0"]["scale"] + params["BatchNorm_0"]["bias"]
    return jnp.maximum(x, 0)


def test_only_the_trained_pass_uses_the_batchs_statistics_and_padding_is_invisible(normed_model, sites):
    oracle = contrastive.contrastive(normed_model, "Dense_1", MU, TAU)
    params, stats = normed_model.init(KEY)
    keys = jax.random.split(KEY, 4)
    anchors = [Variables(optax.tree.random_like(key, params, sampler=jax.random.normal), {"BatchNorm_0": {
        "mean": jax.random.normal(key, (6,)), "var": 1 + jax.random.uniform(key, (6,))}}) for key in keys[:2]]
    x, y = sites.x[7:12], sites.y[7:12]
    padded = Batch(jnp.concatenate([x, jnp.full((2, 4), jnp.nan)]), jnp.concatenate([y, jnp.zeros(2, int)]), jnp.array([1.0] * 5 + [0.0] * 2))

    def by_hand(params):
        first = x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
        z = hidden(params, x, first.mean(0), first.var(0))
        others = [hidden(a.params, x, *(a.stats["BatchNorm_0"][name] for name in ("mean", "var"))) for a in anchors]
        logits = z @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
        near, far = (jnp.exp(jnp.sum(z * o, 1) / jnp.sqrt(jnp.sum(z**2, 1) * jnp.sum(o**2, 1)) / TAU) for o in others)
        contrast = -jnp.mean(jnp.log(near / (near + far)))
        loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss + MU * contrast, (loss, contrast)

    compute = jax.jit(oracle.compute)
    slope, _, after, metrics = compute(KEY, Anchors(*anchors), params, stats, padded)
    expected, (loss, contrast) = jax.jit(jax.grad(by_hand, has_aux=True))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), slope, expected)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5) and float(metrics["contrast"]) == pytest.approx(float(contrast), rel=1e-4)
    _, _, trained, _ = jax.jit(gradients.plain(normed_model).compute)(KEY, (), params, stats, padded)
    jax.tree.map(np.testing.assert_array_equal, after, trained)
    empty, *_ = compute(KEY, Anchors(*anchors), params, stats, padded._replace(mask=jnp.zeros(7)))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(empty))


def test_a_site_that_comes_late_has_no_previous_model(normed_model, sites):
    """Nor has a newcomer: a first round, whenever it is, is FedAvg's, and here FedBN's, whose local layers show it."""
    work = measured.in_order(4)
    moon, plain = (build(normed_model, optax.sgd(0.1), work) for build in (
        lambda *a: algorithms.moon(*a, "Dense_1", MU, norms=norms.LOCAL), algorithms.fedbn))
    cohort = Cohort(jnp.array([0, 4]), jnp.ones(2), jnp.full(2, 99))
    round = jax.jit(moon.round)
    state, _ = round(KEY, moon.init(normed_model.init(KEY), len(SIZES)), cohort, sites)
    _, metrics = round(KEY, state, cohort._replace(ids=jnp.array([4, 2])), sites)
    assert float(metrics.clients["contrast"][1]) == pytest.approx(np.log(2), rel=1e-6)
    assert abs(float(metrics.clients["contrast"][0]) - np.log(2)) > 1e-3
    welcomed = jax.jit(moon.welcome)(KEY, state, jnp.int32(2), sites)
    alike = plain.init(normed_model.init(KEY), len(SIZES))._replace(shared=state.shared, clients=state.clients._replace(gradient=()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
                 welcomed, jax.jit(plain.welcome)(KEY, alike, jnp.int32(2), sites))


def test_the_representation_is_what_enters_the_head(normed_model, sites):
    variables = normed_model.init(KEY)
    outputs, z = entering("Dense_1", lambda: normed_model.predict(variables, sites.x))
    head = variables.params["Dense_1"]
    np.testing.assert_allclose(z @ head["kernel"] + head["bias"], outputs, rtol=1e-5, atol=1e-5)
    images = models.bridge(models.FedAvgCNN(), jnp.zeros((1, 8, 8, 1)), models.softmax_cross_entropy)
    started, x = jax.eval_shape(images.init, KEY), jnp.ones((3, 8, 8, 1))
    assert jax.eval_shape(lambda given: entering("Conv_1", lambda: images.predict(given, x))[1], started).shape == (3, 4 * 4 * 32)


def test_a_head_that_cannot_be_found_is_refused(plain_model):
    x = jnp.zeros((2, 4))
    for model, head in [
        (plain_model, "Dense_1"), (models.bridge_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs), x, models.softmax_cross_entropy), "Dense_0")]:
        with pytest.raises(FlJaxError, match="flax linen"):
            entering(head, lambda model=model: model.predict(model.init(KEY), x))
    with pytest.raises(TypeError, match="gradient of its own"):
        algorithms.moon(plain_model, optax.sgd(0.1), batches.epochs(1, 4), "Dense_0", MU, gradient=gradients.plain(plain_model))
