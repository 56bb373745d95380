"""Algorithms in which every site deploys a model of its own: where they become others, closed forms, and NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SIZES

from fl_jax import algorithms, batches, models, norms, sampling
from fl_jax.types import Cohort, Sites, Variables

KEY = jax.random.key(1)
N = len(SIZES)
SGD, WORK = optax.sgd(0.1), batches.epochs(1, 4)
HEAD = algorithms.layers("Dense_1")
EVERYTHING = algorithms.layers("Dense_0")  # of a network of one layer
NOTHING = algorithms.layers()


def cohort_of(ids):
    return Cohort(jnp.asarray(ids, jnp.int32), jnp.ones(len(ids)), jnp.full(len(ids), sampling.ALL_STEPS, jnp.int32))


COHORTS = [cohort_of([0, 2, 4, 5]), cohort_of([1, 2, 3, 5])]


rounds = {}  # of each builder and model: compiled once for all values of the builder's hyper-parameters


def deployed(build, model, variables, sites, cohorts=COHORTS, hyper=()):
    """The state after a round of build(model, *hyper) for each cohort, and what each site deploys."""
    round = rounds.setdefault((build, id(model)), jax.jit(lambda hyper, *inputs: build(model, *hyper).round(*inputs)))
    algorithm = build(model, *hyper)
    state = algorithm.init(variables, N)
    for r, cohort in enumerate(cohorts):
        state, _ = round(hyper, jax.random.fold_in(KEY, r), state, cohort, sites)
    return state, jax.vmap(lambda id: algorithm.model(state, id))(jnp.arange(N))


def ditto(model, strength):
    return algorithms.ditto(model, SGD, WORK, strength)


def apfl(model, alpha):
    return algorithms.apfl(model, 0.1, WORK, alpha)


def fedrep_of_the_head(model, share):
    return algorithms.fedrep(model, optax.sgd(0.1, 0.9), WORK, HEAD, head_share=share)


def fedala_of_everything(model, rate):
    return algorithms.fedala(model, SGD, WORK, EVERYTHING, rate=rate)


def close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def references(plain_model, sites):
    """Of the plain model: its start, what sites deploy after FedAvg, and after local training."""
    variables = jax.jit(plain_model.init)(KEY)
    return variables, *(deployed(build, plain_model, variables, sites)[1] for build in (
        lambda model: algorithms.fedavg(model, SGD, WORK), lambda model: algorithms.local_only(model, SGD, WORK)))


@pytest.mark.parametrize("build, hyper, becomes", [
    (ditto, (0.0,), "local"),
    (lambda model: algorithms.mr_mtl(model, SGD, WORK, 0.0), (), "local"),
    (apfl, (1.0,), "local"),
    (apfl, (0.0,), "averaged"),
    (lambda model: algorithms.fedper(model, SGD, WORK, EVERYTHING), (), "local"),
    (lambda model: algorithms.fedper(model, SGD, WORK, NOTHING), (), "averaged"),
    (lambda model: algorithms.lg_fedavg(model, SGD, WORK, EVERYTHING), (), "averaged"),
    (lambda model: algorithms.lg_fedavg(model, SGD, WORK, NOTHING), (), "local"),
    (lambda model: algorithms.fedrep(model, SGD, WORK, NOTHING, head_share=0.0), (), "averaged"),
    (lambda model: algorithms.fedrep(model, SGD, WORK, EVERYTHING, head_share=1.0), (), "local"),
    (lambda model: algorithms.silobn(model, SGD, WORK), (), "averaged"),
], ids=["Ditto 0", "MR-MTL 0", "APFL 1", "APFL 0", "FedPer of everything", "FedPer of nothing", "LG-FedAvg of everything", "LG-FedAvg of nothing",
        "FedRep without a head", "FedRep that is all head", "SiloBN without norms"])
def test_special_cases_are_fedavg_or_local_training(plain_model, sites, references, build, hyper, becomes):
    variables, averaged, local = references
    close(deployed(build, plain_model, variables, sites, hyper=hyper)[1], {"averaged": averaged, "local": local}[becomes])


def test_dittos_shared_model_is_fedavgs(plain_model, sites, references):
    variables, averaged, _ = references
    state, own = deployed(ditto, plain_model, variables, sites, hyper=(0.7,))
    close(jax.vmap(lambda _: state.shared)(jnp.arange(N)), averaged)
    assert max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(averaged), strict=True)) > 1e-3


def test_what_stays_is_the_head_or_the_body(normed_model, sites):
    variables = jax.jit(normed_model.init)(KEY)

    def shared(algorithm):
        state = algorithm.init(variables, N)
        return {jax.tree_util.keystr(path[1:2], simple=True) for path, _ in jax.tree_util.tree_leaves_with_path(state.shared)}

    assert shared(algorithms.fedper(normed_model, SGD, WORK, HEAD)) == {"Dense_0", "BatchNorm_0"}
    assert shared(algorithms.fedper(normed_model, SGD, WORK, HEAD, norms=norms.LOCAL)) == {"Dense_0"}
    assert shared(algorithms.lg_fedavg(normed_model, SGD, WORK, HEAD)) == {"Dense_1"}
    silo = algorithms.silobn(normed_model, SGD, WORK).init(variables, N).shared
    assert jax.tree.leaves(silo.params["BatchNorm_0"]) and not jax.tree.leaves(silo.stats)


# Means of sites as a federated problem: a model of one parameter, whose loss at a site is the mean of (v - y)^2.

MEANS = np.array([-2.0, 0.5, 3.0])
COUNTS = np.array([4, 2, 3])
LEVEL = models.bridge(models.LinearCox(), jnp.zeros((1, 1)), models.squared_error)
VALUES = np.concatenate([m + np.linspace(-1, 1, n) for m, n in zip(MEANS, COUNTS, strict=True)])
ESTIMATION = Sites(jnp.ones((9, 1)), jnp.asarray(VALUES, jnp.float32), jnp.array([0, 4, 6]), jnp.asarray(COUNTS, jnp.int32))
ZERO = Variables({"Dense_0": {"kernel": jnp.zeros((1, 1))}}, {})
WHOLE = batches.updates(20, 4)


def settled(algorithm, rounds=60):
    """What the three sites deploy after many rounds in which all take part with equal weights."""

    def one(state, key):
        return algorithm.round(key, state, cohort_of(range(3)), ESTIMATION)[0], None

    state, _ = jax.lax.scan(one, algorithm.init(ZERO, 3), jax.random.split(KEY, rounds))
    return state, jax.vmap(lambda i: algorithm.model(state, i).params["Dense_0"]["kernel"][0, 0])(jnp.arange(3))


@pytest.mark.parametrize("build", [algorithms.ditto, algorithms.mr_mtl])
def test_ditto_and_mr_mtl_find_the_closed_form_of_mean_estimation(build):
    """(v - m)^2 + strength/2 (v - w)^2 is least at (2 m + strength w) / (2 + strength); both means w are that of the sites' means."""
    find = jax.jit(lambda strength: settled(build(LEVEL, SGD, WHOLE, strength))[1])
    for strength in (0.5, 4.0):
        expected = (2 * MEANS + strength * MEANS.mean()) / (2 + strength)
        np.testing.assert_allclose(find(strength), expected, atol=1e-3)


def test_ditto_stays_a_step_from_the_shared_model_where_rate_times_strength_is_one(plain_model, sites):
    """v - lr (g + (v - w) / lr) = w - lr g, whatever v was."""
    rate, variables = 0.1, jax.jit(plain_model.init)(KEY)  # SGD's rate
    before, _ = deployed(ditto, plain_model, variables, sites, COHORTS[:1], (1 / rate,))
    after, own = jax.device_get(deployed(ditto, plain_model, variables, sites, hyper=(1 / rate,)))
    for i in (1, 2, 3, 5):
        away = optax.tree.norm(jax.tree.map(lambda v, w, i=i: v[i] - w, own.params, before.shared.params))
        assert 0 < away <= rate * 3 * np.sqrt(2) * (1 + np.abs(sites.x).max() * 2)  # softmax slopes are at most sqrt 2 |(x, 1)|
    still = jax.tree.map(lambda v, w: v[0] - w, own.params, variables.params)  # site 0 made its steps in the first round
    assert optax.tree.norm(still) > 0 and int(after.round) == 2


def test_pfedme_is_algorithm_1():
    strength, inner, rate, beta = 3.0, 0.05, 0.02, 0.7
    algorithm = algorithms.pfedme(
        LEVEL, batches.updates(3, 4), strength=strength, inner_steps=2, inner_rate=inner, rate=rate, beta=beta)
    found = jax.jit(lambda: settled(algorithm, rounds=2)[1])()
    shared = 0.0
    for _ in range(2):
        local, own = [], []
        for mean in MEANS:
            w = theta = shared
            for _ in range(3):
                for _ in range(2):
                    theta -= inner * (2 * (theta - mean) + strength * (theta - w))
                w -= rate * strength * (w - theta)
            local.append(w)
            own.append(theta)
        shared = (1 - beta) * shared + beta * np.mean(local)
    np.testing.assert_allclose(found, own, rtol=1e-4)


def test_apfl_follows_algorithm_1_with_an_alpha_of_its_own():
    rate, alpha_rate = 0.05, 0.01
    algorithm = algorithms.apfl(LEVEL, rate, batches.updates(3, 4), 0.4, alpha_rate=alpha_rate)
    state, found = jax.jit(lambda: settled(algorithm, rounds=2))()
    shared, own, alpha = 0.0, np.zeros(3), np.full(3, 0.4)
    for _ in range(2):
        local = np.full(3, shared)
        for _ in range(3):
            slope = 2 * (alpha * own + (1 - alpha) * local - MEANS)
            own, alpha, local = own - rate * alpha * slope, np.clip(alpha - alpha_rate * (own - local) * slope, 0, 1), local - rate * 2 * (local - MEANS)
        shared = local.mean()
    np.testing.assert_allclose(state.clients[2], alpha, rtol=1e-5)
    np.testing.assert_allclose(found, alpha * own + (1 - alpha) * shared, rtol=1e-4)


# FedRep's own problem: sites whose labels are w_i . B x, with one subspace B for all and a head w_i for each.


class Bilinear(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(2, use_bias=False)(x)
        return nn.Dense(1, use_bias=False)(x)


def test_fedreps_subspace_contracts_where_a_shared_head_does_not_find_it():
    """Collins et al. 2021, section 5: the principal angle between the learned body and the true one falls to nothing."""
    rng, count, dimension, records = np.random.default_rng(0), 12, 8, 40
    truth = np.linalg.qr(rng.normal(size=(dimension, 2)))[0]
    x = rng.normal(size=(count * records, dimension))
    heads = rng.normal(size=(count, 2)) * 2
    y = np.einsum("rd,dk,rk->r", x, truth, np.repeat(heads, records, axis=0))
    sites = Sites(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32), jnp.arange(count) * records, jnp.full(count, records, jnp.int32))
    model = models.bridge(Bilinear(), jnp.zeros((1, dimension)), models.squared_error)
    work, everyone = batches.updates(12, records), cohort_of(range(count))

    def angles(algorithm, rounds):
        def one(state, key):
            state, _ = algorithm.round(key, state, everyone, sites)
            return state, state.shared.params["Dense_0"]["kernel"]

        start = algorithm.init(model.init(jax.random.key(3)), count)
        bodies = jax.jit(lambda keys: jax.lax.scan(one, start, keys)[1])(jax.random.split(KEY, rounds))
        outside = np.eye(dimension) - truth @ truth.T
        return [np.linalg.norm(outside @ np.linalg.qr(np.asarray(body))[0], 2) for body in bodies]

    optimizer = optax.sgd(0.05)
    alternating = angles(algorithms.fedrep(model, optimizer, work, HEAD, head_share=10 / 12), 60)
    averaged = angles(algorithms.fedavg(model, optimizer, work), 60)
    assert alternating[-1] < 0.05 and averaged[-1] > 0.3
    assert alternating[-1] < 0.3 * alternating[29] < 0.3 * alternating[4]


def test_fedreps_phases_follow_one_another_in_a_round(normed_model, sites):
    """Without a body phase the body stays as it came; without a head phase the head does; momentum starts with its phase."""
    variables = jax.jit(normed_model.init)(KEY)
    for share, moving in ((1.0, "Dense_1"), (0.0, "Dense_0")):
        _, own = deployed(fedrep_of_the_head, normed_model, variables, sites, COHORTS[:1], (share,))
        for name in ("Dense_0", "Dense_1"):
            still = np.array_equal(own.params[name]["kernel"][2], variables.params[name]["kernel"])
            assert still == (name != moving)


def test_fedala_that_learns_no_weights_shares_fedavgs_model(plain_model, sites, references):
    variables, averaged, _ = references
    state, _ = deployed(fedala_of_everything, plain_model, variables, sites, hyper=(0.0,))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y[0], atol=1e-6), state.shared, averaged)
    # nor does it where the first round finds all models alike, whatever the rate
    first, _ = deployed(fedala_of_everything, plain_model, variables, sites, COHORTS[:1], (1.0,))
    for leaf in jax.tree.leaves(first.clients.weights):
        np.testing.assert_array_equal(leaf, 1)


def test_fedalas_weights_descend_the_loss_between_a_sites_model_and_the_shared_one(plain_model, sites):
    """Two rounds of one site and another, full batches: what the weights are then, in NumPy."""
    algorithm = algorithms.fedala(plain_model, SGD, batches.epochs(1, 16), EVERYTHING, rate=0.7, first_passes=2)
    round, cohort = jax.jit(algorithm.round), cohort_of([2, 4])
    state, _ = round(KEY, algorithm.init(jax.jit(plain_model.init)(KEY), N), cohort, sites)
    after, _ = round(jax.random.fold_in(KEY, 9), state, cohort, sites)
    shared, own = (np.float64(tree.params["Dense_0"]["kernel"]) for tree in (state.shared, jax.tree.map(lambda leaf: leaf[2], state.clients.own)))
    shared_bias, own_bias = (np.float64(tree.params["Dense_0"]["bias"]) for tree in (state.shared, jax.tree.map(lambda leaf: leaf[2], state.clients.own)))
    rows = slice(int(sites.offset[2]), int(sites.offset[2] + sites.size[2]))
    x, y = np.float64(sites.x)[rows], np.eye(3)[np.asarray(sites.y)[rows]]
    w, b = np.ones_like(own), np.ones_like(own_bias)
    for _ in range(2):
        p = np.exp(x @ (own + (shared - own) * w) + own_bias + (shared_bias - own_bias) * b)
        slope = (p / p.sum(1, keepdims=True) - y) / len(y)
        w = np.clip(w - 0.7 * (x.T @ slope) * (shared - own), 0, 1)
        b = np.clip(b - 0.7 * slope.sum(0) * (shared_bias - own_bias), 0, 1)
    found = after.clients.weights["Dense_0"]
    np.testing.assert_allclose(found["kernel"][2], w, atol=1e-5)
    np.testing.assert_allclose(found["bias"][2], b, atol=1e-5)
    assert (w < 1).any()


def test_fedala_blends_only_its_top(normed_model, sites):
    variables = jax.jit(normed_model.init)(KEY)
    state, _ = deployed(lambda model: algorithms.fedala(model, SGD, WORK, HEAD), normed_model, variables, sites)
    weights = jax.device_get(state.clients.weights)
    assert weights["Dense_0"]["kernel"] is None and weights["Dense_1"]["kernel"].shape == (N, 6, 3)
    assert (weights["Dense_1"]["kernel"] < 1).any() and (weights["Dense_1"]["kernel"] >= 0).all()
