"""One contract for all algorithms: a row in ALGORITHMS is tested by everything here, but for lanes and devices (DEALT)."""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SIZES
from jax.sharding import NamedSharding, PartitionSpec

from fl_jax import aggregators, algorithms, batches, clients, clipping, core, gradients, measured, norms, sampling, uplink
from fl_jax.core import Engine
from fl_jax.types import Cohort, FederatedAlgorithm, Model, State

SHUFFLED = batches.epochs(2, 4)
BATCHES = measured.in_order(4)._replace(steps=SHUFFLED.steps)  # shuffling, which a few rows have, is a third of a program to compile
SGD = optax.sgd(0.1)
KEY = jax.random.key(7)
HEAD = algorithms.layers("Dense_1")
IDS = np.array([4, 0, 2, 5])
SAMPLER = sampling.fixed_size(len(IDS), len(SIZES), sampling.equal)
drawn = jax.jit(SAMPLER.draw)

ALGORITHMS: dict[str, Callable[[Model, Engine], FederatedAlgorithm]] = {
    "fedsgd": lambda model, engine: algorithms.fedsgd(model, 0.1, batches.epochs(1, 4), engine=engine),
    "fedavg": lambda model, engine: algorithms.fedavg(model, SGD, BATCHES, engine=engine),
    "fedprox": lambda model, engine: algorithms.fedprox(model, SGD, BATCHES, 0.5, engine=engine),
    "fedavgm": lambda model, engine: algorithms.fedavgm(model, SGD, BATCHES, engine=engine),
    "fedadam": lambda model, engine: algorithms.fedadam(model, SGD, BATCHES, server_learning_rate=0.05, engine=engine),
    "fedyogi": lambda model, engine: algorithms.fedyogi(model, SGD, BATCHES, server_learning_rate=0.05, engine=engine),
    "fedadagrad": lambda model, engine: algorithms.fedadagrad(model, SGD, BATCHES, server_learning_rate=0.05, engine=engine),
    "scaffold": lambda model, engine: algorithms.scaffold(model, 0.1, BATCHES, engine=engine),
    "feddyn": lambda model, engine: algorithms.feddyn(model, SGD, BATCHES, 0.1, engine=engine),
    "fednova": lambda model, engine: algorithms.fednova(model, 0.1, BATCHES, momentum=0.5, engine=engine),
    "mime_lite": lambda model, engine: algorithms.mime_lite(model, 0.1, BATCHES, engine=engine),
    "moon": lambda model, engine: algorithms.moon(
        model, SGD, BATCHES, "Dense_1", 1.0, norms=norms.LOCAL_STATISTICS, engine=engine),
    "fedprox_adaptive": lambda model, engine: algorithms.fedprox_adaptive(model, SGD, BATCHES, 0.5, engine=engine),
    "q_fedavg": lambda model, engine: algorithms.q_fedavg(model, 0.1, BATCHES, 1.0, norms=norms.LOCAL, engine=engine),
    "agnostic": lambda model, engine: algorithms.agnostic(model, SGD, BATCHES, 0.5, engine=engine),
    "quantized scaffold": lambda model, engine: algorithms.scaffold(
        model, 0.1, BATCHES, uplink=uplink.quantize(8), norms=norms.LOCAL, engine=engine),
    "fedbn": lambda model, engine: algorithms.fedbn(model, optax.sgd(0.05, 0.9), SHUFFLED, engine=engine),
    "silobn": lambda model, engine: algorithms.silobn(model, SGD, BATCHES, engine=engine),
    "fedper": lambda model, engine: algorithms.fedper(model, SGD, BATCHES, HEAD, engine=engine),
    "fedrep": lambda model, engine: algorithms.fedrep(model, optax.sgd(0.05, 0.9), BATCHES, HEAD, norms=norms.LOCAL, engine=engine),
    "lg_fedavg": lambda model, engine: algorithms.lg_fedavg(model, SGD, BATCHES, HEAD, engine=engine),
    "ditto": lambda model, engine: algorithms.ditto(model, SGD, BATCHES, 0.5, norms=norms.LOCAL_STATISTICS, engine=engine),
    "mr_mtl": lambda model, engine: algorithms.mr_mtl(model, SGD, BATCHES, 0.5, engine=engine),
    "pfedme": lambda model, engine: algorithms.pfedme(model, BATCHES, inner_steps=2, rate=0.05, beta=0.8, engine=engine),
    "apfl": lambda model, engine: algorithms.apfl(model, 0.1, BATCHES, alpha_rate=0.1, engine=engine),
    "fedala": lambda model, engine: algorithms.fedala(model, SGD, BATCHES, HEAD, engine=engine),
    "fedbabu": lambda model, engine: algorithms.fedbabu(model, SGD, BATCHES, HEAD, BATCHES, norms=norms.RECALIBRATED, engine=engine),
    "per_fedavg": lambda model, engine: algorithms.per_fedavg(model, SGD, BATCHES, 0.05, hessian_step=1e-3, engine=engine),
    "ifca": lambda model, engine: algorithms.ifca(model, SGD, BATCHES, 2, KEY, norms=norms.LOCAL, engine=engine),
    "local_only": lambda model, engine: algorithms.local_only(model, SGD, BATCHES, engine=engine),
    "centralized": lambda model, engine: algorithms.centralized(model, SGD, BATCHES, engine=engine),
    "private fedbn": lambda model, engine: algorithms.fedbn(
        model, SGD, BATCHES, aggregator=aggregators.private_mean(0.1, 1.0, 4), engine=engine),
    "adaptive private fedbn": lambda model, engine: algorithms.fedbn(
        model, SGD, BATCHES, aggregator=aggregators.private_mean(clipping.quantile(0.1, 1.0), 1.0, 4), engine=engine),
    "ftrl fedbn": lambda model, engine: algorithms.fedbn(
        model, SGD, BATCHES, aggregator=aggregators.private_ftrl(0.1, 1.0, 4, aggregators.tree(2)), engine=engine),
    "distributed private fedbn": lambda model, engine: algorithms.fedbn(
        model, SGD, BATCHES, aggregator=aggregators.distributed_private_mean(0.1, 1.0, 4, 2), engine=engine),
    "locally private fedprox": lambda model, engine: algorithms.fedprox(
        model, SGD, BATCHES, 0.5, uplink=uplink.local_dp(0.1, 1.0), norms=norms.LOCAL_STATISTICS, engine=engine),
    "sparse fedbn": lambda model, engine: algorithms.fedbn(model, SGD, BATCHES, uplink=uplink.top_k(0.2), engine=engine),
    "quantized fedavgm": lambda model, engine: algorithms.fedavgm(model, SGD, BATCHES, uplink=uplink.quantize(4), engine=engine),
    "median": lambda model, engine: algorithms.fedavg(model, SGD, SHUFFLED, aggregator=aggregators.median(), engine=engine),
}
VARIED = {"fedbn", "median"}  # what stays at sites, and what is stacked: driven in more ways than the others
MAPPED = VARIED | {"scaffold", "fedrep", "ditto", "ifca", "ftrl fedbn", "quantized fedavgm"}  # one of each kind: it compiles for long
DEALT = MAPPED | {  # one of each client, personal part, aggregator and uplink: the others are made of the same pieces
    "feddyn", "fednova", "moon", "q_fedavg", "agnostic", "pfedme", "apfl", "fedala", "per_fedavg", "local_only", "distributed private fedbn",
    "locally private fedprox", "sparse fedbn"}
SENDS_LESS = {"sparse fedbn", "quantized fedavgm", "quantized scaffold", "ifca"}


def cohort_of(ids, weight=None, steps=None) -> Cohort:
    ids = jnp.asarray(ids, jnp.int32)
    weight = jnp.asarray(SIZES[np.minimum(ids, len(SIZES) - 1)] if weight is None else weight, jnp.float32)
    return Cohort(ids, weight, jnp.full(ids.shape, sampling.ALL_STEPS, jnp.int32) if steps is None else jnp.asarray(steps, jnp.int32))


def close(a, b, tolerance=2e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module", params=ALGORITHMS)
def name(request) -> str:
    """Each algorithm in turn; of this scope, so that pytest finishes with one before it begins the next and compiles nothing twice."""
    return request.param


@pytest.fixture(scope="module")
def built(normed_model, sites):
    """(name, lanes, devices) -> (algorithm, its initial state, its jitted round), each compiled once."""
    variables = normed_model.init(jax.random.key(0))

    @cache
    def build(name: str, lanes: int = 1, devices: int = 1):
        mesh = core.client_mesh(devices) if devices > 1 else None
        algorithm = ALGORITHMS[name](normed_model, Engine(lanes, mesh))
        state = algorithm.init(variables, len(SIZES))
        if mesh is not None:  # where a round leaves it: elsewhere, the first round would be a program of its own
            state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
        return algorithm, state, jax.jit(algorithm.round)

    return build


def two_rounds(round, state: State, cohort: Cohort, sites) -> State:
    state, _ = round(jax.random.fold_in(KEY, 0), state, cohort, sites)
    return round(jax.random.fold_in(KEY, 1), state, cohort, sites)[0]


def test_a_round_keeps_the_states_structure_and_compiles_once(built, sites, name):
    _, state, round = built(name)
    after, metrics = round(KEY, state, cohort_of(IDS), sites)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    compiled = round._cache_size()
    after, _ = round(jax.random.key(8), after, cohort_of([1, 3, 6, 0], [2, 0, 1, 1], [1, 2, 3, 4]), sites)
    assert round._cache_size() == compiled
    assert int(after.round) == 2 and int(metrics.server["participants"]) == len(IDS)
    assert np.isfinite(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(after)])).all()


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name in DEALT])
def test_results_do_not_depend_on_lanes_or_devices(built, sites, name):
    _, state, round = built(name)
    expected = two_rounds(round, state, cohort_of(IDS), sites)
    engines = [(2, 2)]
    if name in VARIED:  # also more lanes or devices than sites
        engines += [(6, 1), (1, 8)]
    for lanes, devices in engines:
        _, state, many = built(name, lanes, devices)
        # float32 rounds differently in every program, and BatchNorm over a few records enlarges it
        close(two_rounds(many, state, cohort_of(IDS), sites), expected, 1e-4)
        assert many._cache_size() == 1


def test_results_do_not_depend_on_the_cohorts_order_or_padding(built, sites, name):
    _, state, round = built(name)
    expected = two_rounds(round, state, cohort_of([4, 0, 2, 6], [10, 7, 12, 9]), sites)
    same(expected, two_rounds(round, state, cohort_of([6, 2, 0, 4], [5, 12, 7, 10]), sites))
    same(expected, two_rounds(round, state, cohort_of([2, 4, 1, 0], [12, 10, 0, 7]), sites))  # a drop-out
    if name in VARIED:  # also a cohort of another length
        same(expected, two_rounds(round, state, cohort_of([4, 0, 2]), sites))
        same(expected, two_rounds(round, state, cohort_of([6, 0, 6, 2, 4, 1], [5, 7, 9, 12, 10, 0]), sites))


def test_an_empty_round_changes_nothing_unless_the_aggregator_must_act(built, sites, name):
    algorithm, state, round = built(name)
    after, metrics = round(KEY, state, cohort_of(IDS, [0, 0, 0, 0]), sites)
    assert int(metrics.server["participants"]) == 0
    same(after.clients, state.clients)
    if algorithm.client_event == aggregators.mean().event or name.startswith(("distributed", "locally")):  # or noise of those who come
        same(after._replace(round=0), state._replace(round=0))
    else:
        moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(after.shared), jax.tree.leaves(state.shared))]
        assert min(moved) > 0  # noise on every leaf: that nobody came is private too


def test_a_site_that_is_not_finite_is_left_out_and_counted(built, sites, name):
    _, state, round = built(name)
    poisoned = sites._replace(x=sites.x.at[int(sites.offset[2])].set(jnp.nan))
    after, metrics = round(KEY, state, cohort_of(IDS), poisoned)
    assert list(np.asarray(metrics.clients["nonfinite"])) == [0, 0, 1, 0]
    assert int(metrics.server["participants"]) == 3
    expected, _ = round(KEY, state, cohort_of(IDS, np.where(IDS == 2, 0, SIZES[IDS])), sites)
    same(after, expected)


def test_rounds_scan_and_seeds_map(built, sites, name):
    _, state, round = built(name)

    def run(key):
        def body(state, key):
            first, second = jax.random.split(key)
            return round(first, state, drawn(second, state.round, sites), sites)  # as it was traced before

        return jax.lax.scan(body, state, jax.random.split(key, 2))

    keys = jax.random.split(KEY, 2)
    _, metrics = jax.eval_shape(jax.vmap(run), keys)
    assert metrics.clients["steps"].shape == (2, 2, len(IDS))
    if name in MAPPED:
        mapped, _ = jax.jit(jax.vmap(run))(keys)
        alone = state
        for key in jax.random.split(keys[1], 2):
            first, second = jax.random.split(key)
            alone, _ = round(first, alone, drawn(second, alone.round, sites), sites)
        close(jax.tree.map(lambda leaf: leaf[1], mapped), alone)


def test_what_a_site_deploys_and_what_travels(built, normed_model, sites, name):
    algorithm, state, _ = built(name)
    deployed = algorithm.model(state, jnp.int32(3))
    assert jax.tree.structure(deployed) == jax.tree.structure(normed_model.init(KEY))
    for look in (algorithm.deploy, algorithm.welcome):  # a site's own records, and a newcomer's
        shapes = jax.eval_shape(look, KEY, state, jnp.int32(3), sites)
        jax.tree.map(lambda shape, leaf: np.testing.assert_equal(shape.shape, leaf.shape), shapes, deployed)
    down, up = algorithm.payload(state)
    assert down == sum(4 * leaf.size for leaf in jax.tree.leaves(state.shared))
    assert up < down if name in SENDS_LESS else up == down


@pytest.fixture(scope="module")
def averaged(plain_model, sites):
    """What two rounds of FedAvg make of the plain model with equal weights."""
    algorithm = algorithms.fedavg(plain_model, SGD, BATCHES)
    state = algorithm.init(plain_model.init(KEY), len(SIZES))
    return two_rounds(jax.jit(algorithm.round), state, cohort_of(IDS, np.ones(4)), sites).shared


@pytest.mark.parametrize("change", [
    lambda model: algorithms.fedprox(model, SGD, BATCHES, 0.0),
    lambda model: algorithms.fedavgm(model, SGD, BATCHES, momentum=0.0),
    lambda model: algorithms.fedbn(model, SGD, BATCHES),
    lambda model: algorithms.fedavg(model, SGD, BATCHES, server=optax.sgd(1.0)),
    lambda model: algorithms.fedavg(model, SGD, BATCHES, aggregator=aggregators.private_mean(1e9, 0.0, 4)),
    lambda model: algorithms.fedavg(model, SGD, BATCHES, aggregator=aggregators.private_mean(clipping.quantile(1e9, 1.0), 0.0, 4)),
    lambda model: algorithms.fedavg(model, SGD, BATCHES, aggregator=aggregators.private_ftrl(1e9, 0.0, 4, aggregators.tree(2))),
    lambda model: algorithms.fedavg(model, SGD, BATCHES, aggregator=aggregators.distributed_private_mean(1e9, 0.0, 4, 4)),
    lambda model: algorithms.fedavg(model, SGD, BATCHES, uplink=uplink.local_dp(1e9, 0.0)),
], ids=["FedProx(0)", "FedAvgM(0)", "FedBN without norms", "FedOpt(sgd 1)", "DP(noise 0, clip huge)", "adaptive DP(noise 0, clip huge)",
        "DP-FTRL(noise 0, clip huge)", "distributed DP(noise 0, clip huge)", "local DP(noise 0, clip huge)"])
def test_special_cases_are_fedavg(plain_model, sites, averaged, change):
    algorithm = change(plain_model)
    state = two_rounds(jax.jit(algorithm.round), algorithm.init(plain_model.init(KEY), len(SIZES)), cohort_of(IDS, np.ones(4)), sites)
    close(state.shared, averaged, 1e-6)


@pytest.mark.parametrize("algorithm", [
    lambda model: algorithms.fedavg(model, optax.sgd(0.3), batches.epochs(1, 64)), lambda model: algorithms.fedsgd(model, 0.3, batches.epochs(1, 5)),
], ids=["FedAvg, one full batch", "FedSGD in batches of 5"])
def test_one_full_batch_step_of_everybody_is_centralized_gradient_descent(plain_model, sites, algorithm):
    variables = plain_model.init(KEY)
    everyone = sampling.everyone().draw(KEY, 0, sites)
    built = algorithm(plain_model)
    after, _ = jax.jit(built.round)(KEY, built.init(variables, len(SIZES)), everyone, sites)
    kernel, bias = (np.float64(variables.params["Dense_0"][name]) for name in ("kernel", "bias"))
    kernel_gradient, bias_gradient = softmax_regression_gradient(kernel, bias, np.float64(sites.x), np.asarray(sites.y))
    np.testing.assert_allclose(after.shared.params["Dense_0"]["kernel"], kernel - 0.3 * kernel_gradient, atol=1e-6)
    np.testing.assert_allclose(after.shared.params["Dense_0"]["bias"], bias - 0.3 * bias_gradient, atol=1e-6)


def softmax_regression_gradient(kernel, bias, x, y):
    logits = x @ kernel + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    return x.T @ p / len(y), p.mean(0)


@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_fedavg_and_fedprox_equal_a_plain_numpy_restatement(plain_model, sites, mu):
    """float64 NumPy, which shares only the index of each batch with the engine."""
    algorithm = algorithms.fedprox(plain_model, SGD, SHUFFLED, mu, engine=Engine(lanes=3))
    state = algorithm.init(plain_model.init(jax.random.key(1)), len(SIZES))
    caps = np.array([sampling.ALL_STEPS, 1, 3, sampling.ALL_STEPS])  # two stragglers
    global_kernel, global_bias = (np.float64(state.shared.params["Dense_0"][name]) for name in ("kernel", "bias"))
    round, ordered, batch = jax.jit(algorithm.round), jax.jit(SHUFFLED.order), jax.jit(SHUFFLED.draw)
    for r in range(3):
        key = jax.random.fold_in(KEY, r)
        state, _ = round(key, state, cohort_of(IDS, steps=caps), sites)
        kernels, biases = [], []
        for id, cap in zip(IDS, caps):
            n, offset = int(sites.size[id]), int(sites.offset[id])
            order = ordered(core.site_keys(jax.random.split(key)[0], jnp.int32(id))[0], jnp.int32(n))
            kernel, bias = global_kernel.copy(), global_bias.copy()
            for t in range(min(int(SHUFFLED.steps(jnp.int32(n))), cap)):
                index, mask = batch(order, jnp.int32(t))
                rows = offset + np.asarray(index)[np.asarray(mask) > 0]
                gradient = softmax_regression_gradient(kernel, bias, np.float64(sites.x)[rows], np.asarray(sites.y)[rows])
                kernel, bias = (w - 0.1 * (g + mu * (w - w0)) for w, g, w0 in zip((kernel, bias), gradient, (global_kernel, global_bias)))
            kernels.append(kernel)
            biases.append(bias)
        global_kernel = np.average(kernels, axis=0, weights=SIZES[IDS])
        global_bias = np.average(biases, axis=0, weights=SIZES[IDS])
    np.testing.assert_allclose(state.shared.params["Dense_0"]["kernel"], global_kernel, atol=1e-5)
    np.testing.assert_allclose(state.shared.params["Dense_0"]["bias"], global_bias, atol=1e-5)


@pytest.mark.parametrize("name, second_moment", [
    ("fedadam", lambda v, g: 0.99 * v + 0.01 * g**2), ("fedyogi", lambda v, g: v - 0.01 * g**2 * np.sign(v - g**2)),
    ("fedadagrad", lambda v, g: v + g**2)])
def test_adaptive_servers_follow_algorithm_2_and_average_statistics(built, sites, name, second_moment):
    _, state, round = built(name)
    _, averaging, average = built("fedavg")
    b1 = 0.0 if name == "fedadagrad" else 0.9
    m, v, w = 0.0, 1e-6, np.float64(state.shared.params["Dense_1"]["kernel"])
    for r in range(2):
        averaged, _ = average(jax.random.fold_in(KEY, r), averaging._replace(shared=state.shared), cohort_of(IDS), sites)
        g = np.float64(state.shared.params["Dense_1"]["kernel"]) - averaged.shared.params["Dense_1"]["kernel"]
        state, _ = round(jax.random.fold_in(KEY, r), state, cohort_of(IDS), sites)
        m, v = b1 * m + (1 - b1) * g, second_moment(v, g)
        w = w - 0.05 * m / (np.sqrt(v) + 1e-3)
        np.testing.assert_allclose(state.shared.params["Dense_1"]["kernel"], w, rtol=1e-3, atol=1e-5)
        close(state.shared.stats, averaged.shared.stats, 1e-6)


def test_fedbn_shares_everything_but_the_norm_layer(built, sites):
    _, state, round = built("fedbn")
    shared = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.shared)}
    kept = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.clients.leaves)}
    assert shared == {f".params['Dense_{i}']['{leaf}']" for i in (0, 1) for leaf in ("kernel", "bias")}
    assert kept == {".params['BatchNorm_0']['scale']", ".params['BatchNorm_0']['bias']", ".stats['BatchNorm_0']['mean']", ".stats['BatchNorm_0']['var']"}
    after, _ = round(KEY, state, cohort_of(IDS), sites)
    mean = np.asarray(after.clients.leaves.stats["BatchNorm_0"]["mean"])
    assert (mean[[1, 3]] == 0).all() and len(np.unique(mean[IDS], axis=0)) == len(IDS)  # who stayed away keeps what it had


def test_local_only_equals_training_each_site_by_itself(built, normed_model, sites):
    _, state, round = built("local_only")
    _, averaging, average = built("fedavg")
    after, _ = round(KEY, state, cohort_of(IDS), sites)
    alone, _ = average(KEY, averaging, cohort_of([4]), sites)
    close(jax.tree.map(lambda leaf: leaf[4], after.clients), alone.shared)
    assert not jax.tree.leaves(state.shared)


def test_the_centralized_arm_makes_the_federations_steps(plain_model, sites):
    sampler = sampling.with_dropouts(sampling.fixed_size(4, len(SIZES)), 0.4)
    pooled = sites._replace(offset=sites.offset[:1], size=jnp.sum(sites.size, keepdims=True))
    algorithm = algorithms.centralized(plain_model, SGD, algorithms.pooled_batches(BATCHES))
    federated = algorithms.fedavg(plain_model, SGD, BATCHES)
    matched = algorithms.matched_budget(sampler, BATCHES, sites)
    _, metrics = jax.jit(algorithm.round)(KEY, algorithm.init(plain_model.init(KEY), 1), matched.draw(KEY, 0, pooled), pooled)
    _, expected = jax.jit(federated.round)(KEY, federated.init(plain_model.init(KEY), len(SIZES)), sampler.draw(KEY, 0, sites), sites)
    assert float(metrics.server["steps"]) == float(expected.server["steps"]) > 0


def test_float_hyperparameters_are_axes_of_one_program(plain_model, sites):
    variables = plain_model.init(KEY)
    everyone = sampling.everyone().draw(KEY, 0, sites)

    def run(learning_rate, mu, server_learning_rate):
        algorithm = algorithms.fedprox(plain_model, optax.sgd(learning_rate), BATCHES, mu)
        adaptive = algorithms.fedadam(plain_model, optax.sgd(learning_rate), BATCHES, server_learning_rate=server_learning_rate)
        state, _ = algorithm.round(KEY, algorithm.init(variables, len(SIZES)), everyone, sites)
        return state.shared, adaptive.round(KEY, adaptive.init(variables, len(SIZES)), everyone, sites)[0].shared

    grid = jnp.array([[0.1, 0.0, 0.01], [0.05, 1.0, 0.1]])
    mapped = jax.jit(jax.vmap(run))(*grid.T)
    jitted = jax.jit(run)
    for i, point in enumerate(grid):
        close(jax.tree.map(lambda leaf, i=i: leaf[i], mapped), jitted(*point), 1e-5)
    assert jitted._cache_size() == 1


def test_a_private_mean_refuses_statistics(normed_model):
    algorithm = algorithms.fedavg(normed_model, SGD, BATCHES, aggregator=aggregators.private_mean(1.0, 1.0, 4))
    with pytest.raises(ValueError, match="norms.LOCAL"):
        algorithm.init(normed_model.init(KEY), 3)


def test_a_message_of_another_structure_is_refused(plain_model, sites):
    client = clients.local_training(plain_model, gradients.plain(plain_model), SGD, BATCHES)
    broken = client._replace(begin=lambda *a: jnp.float32(0), end=lambda carry, shared, kept: (shared.params, kept, {}))
    algorithm = core.federate(broken, aggregators.mean(), optax.sgd(1.0))
    with pytest.raises(TypeError, match="structure of what is shared"):
        jax.eval_shape(algorithm.round, KEY, algorithm.init(plain_model.init(KEY), len(SIZES)), cohort_of(IDS), sites)
