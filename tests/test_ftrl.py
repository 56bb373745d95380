"""DP-FTRL against explicit matrices: what its noise is in the running sum, what one client moves, and who may say what that costs."""

import math
from functools import cache
from itertools import combinations, pairwise

import dp_accounting as dp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SIZES
from jax_privacy.matrix_factorization import sensitivity
from tqdm import tqdm

from fl_jax import aggregators, algorithms, arms, batches, clipping, mechanism, models, privacy, programs, sampling
from fl_jax.aggregators import strategies
from fl_jax.data import FederatedDataset, Records, stack
from fl_jax.errors import FlJaxError
from fl_jax.metrics import CLASSIFICATION
from fl_jax.privacy import Accountant, Cost, NeighboringRelation, PrivacyLedger, Unit
from fl_jax.types import Sampling

KEY = jax.random.key(5)
ROUNDS, COORDINATES = 22, 60_000
N = len(SIZES)


def tree_matrices(rounds: int, period: int) -> tuple[np.ndarray, np.ndarray]:
    """B and C of trees with restarts: the nodes of a running sum are the dyadic intervals of the binary digits of its length."""
    nodes, sums = {}, []
    for t in range(1, rounds + 1):
        parts = []
        for first in range(0, t, period):
            start, length = first, min(t - first, period)
            for digit in reversed(range(length.bit_length())):
                if length >> digit & 1:
                    parts.append((start, start + 2**digit))
                    start += 2**digit
        sums.append([nodes.setdefault(part, len(nodes)) for part in parts])
    b, c = np.zeros((rounds, len(nodes))), np.zeros((len(nodes), rounds))
    for t, row in enumerate(sums):
        b[t, row] = 1
    for (start, end), node in nodes.items():
        c[node, start:end] = 1
    return b, c


def banded_matrices(rounds: int, separation: int, bands: int, tuned: int) -> tuple[np.ndarray, np.ndarray]:
    """B and C of the banded Toeplitz matrix, materialised."""
    coefficients = strategies._coefficients(tuned, bands)
    assert len(coefficients) == bands and bands <= separation
    c = sum(np.diag(np.full(rounds - k, value), -k) for k, value in enumerate(coefficients))
    return np.tril(np.ones((rounds, rounds))) @ np.linalg.inv(c), c


@cache
def case(name: str):
    """(strategy, B, C)."""
    return {
        "tree of 8": lambda: (aggregators.tree(8), *tree_matrices(ROUNDS, 8)),
        "tree of 5, clients further apart": lambda: (aggregators.tree(5, 7), *tree_matrices(ROUNDS, 5)),
        "tree of 1": lambda: (aggregators.tree(1), *tree_matrices(ROUNDS, 1)),
        "banded": lambda: (aggregators.banded(ROUNDS, 6), *banded_matrices(ROUNDS, 6, 6, ROUNDS)),
        "banded beyond its rounds, clients further apart": lambda: (aggregators.banded(9, 6, 3), *banded_matrices(ROUNDS, 6, 3, 9)),
        "independent": lambda: (aggregators.banded(ROUNDS, 4, 1), *banded_matrices(ROUNDS, 4, 1, ROUNDS)),
    }[name]()


CASES = ["tree of 8", "tree of 5, clients further apart", "tree of 1", "banded", "banded beyond its rounds, clients further apart",
         "independent"]


def noise_of(strategy, rounds=ROUNDS, coordinates=COORDINATES):
    """float64[rounds, coordinates]: what each round's sum gets."""
    like = {"a": jnp.zeros(coordinates // 3), "b": [jnp.zeros((2, coordinates // 3))]}

    def one(state, key):
        noise, state = strategy.noise(key, state, like)
        return state, jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(noise)])

    return np.float64(jax.jit(lambda: jax.lax.scan(one, strategy.init(like), jax.random.split(KEY, rounds))[1])())


@pytest.mark.parametrize("name", CASES)
def test_the_running_sum_has_the_factorisations_noise(name):
    """Covariance B B^T: with 60,000 coordinates an entry's standard error is at most .6 % of the largest."""
    strategy, b, c = case(name)
    np.testing.assert_allclose(b @ c, np.tril(np.ones((ROUNDS, ROUNDS))), atol=1e-5)
    noise = np.cumsum(noise_of(strategy), axis=0)
    expected = b @ b.T
    found = noise @ noise.T / COORDINATES
    np.testing.assert_allclose(np.sqrt(np.diag(found)), np.sqrt(np.diag(expected)), rtol=0.02)
    np.testing.assert_allclose(found, expected, atol=0.025 * expected.max())
    for row in noise[[0, -1]]:
        assert abs(np.corrcoef(row[1:], row[:-1])[0, 1]) < 0.02  # coordinates are independent


def apart(rounds: int, separation: int):
    """All sets of rounds, as large as can be, in which a client that keeps the separation may take part."""
    most = -(-rounds // separation)
    for size in (most, most - 1):
        for chosen in combinations(range(rounds), size):
            if all(b - a >= separation for a, b in pairwise(chosen)):
                yield chosen


@pytest.mark.parametrize("name", CASES)
def test_one_client_moves_the_rows_by_the_sensitivity_for_each_participation(name):
    """Whatever it sends: its columns have no row in common, so that signs do not matter and squares add up."""
    strategy, _, c = case(name)
    assert np.linalg.norm(c, axis=0).max() == pytest.approx(strategy.sensitivity, rel=1e-5)
    worst = 0.0
    for chosen in apart(ROUNDS, strategy.separation) if strategy.separation > 1 else [range(ROUNDS)]:
        columns = c[:, list(chosen)]
        gram = columns.T @ columns
        assert np.abs(gram - np.diag(np.diag(gram))).max() < 1e-6
        worst = max(worst, np.trace(gram))
    most = -(-ROUNDS // strategy.separation)
    assert worst <= most * strategy.sensitivity**2 * (1 + 1e-5)
    bound = sensitivity.get_min_sep_sensitivity_upper_bound(jnp.asarray(c), strategy.separation)  # jax_privacy's, of another algorithm
    assert bound <= math.sqrt(most) * strategy.sensitivity * (1 + 1e-4)


@pytest.mark.parametrize("name", ["tree of 8", "banded"])
def test_clients_that_come_more_often_move_it_further(name):
    strategy, _, c = case(name)
    assert np.linalg.norm(c[:, [0, 1]].sum(1)) > 1.2 * math.sqrt(2) * strategy.sensitivity


def test_at_equal_privacy_correlated_noise_is_smaller():
    """Root mean square of the noise in the running sums of 64 rounds, clients 8 rounds apart: banded < tree < independent."""
    rounds = 64
    rms = {}
    compared = {"banded": aggregators.banded(rounds, 8), "tree": aggregators.tree(8), "independent": aggregators.banded(rounds, 8, 1)}
    for name, strategy in compared.items():
        sums = np.cumsum(noise_of(strategy, rounds, 6_000), axis=0) * strategy.sensitivity
        rms[name] = np.sqrt(np.mean(sums**2))
    assert rms["independent"] == pytest.approx(math.sqrt((rounds + 1) / 2), rel=0.03)
    assert rms["banded"] == pytest.approx(2.664, rel=0.03)  # of jax_privacy's per_query_error
    assert rms["banded"] < 0.7 * rms["tree"] < 0.7 * rms["independent"]


def test_the_aggregator_adds_that_noise_in_clips_over_the_fixed_denominator():
    clip, z, cohort = 0.5, 1.3, 20
    strategy, b, _ = case("tree of 8")
    private = aggregators.private_ftrl(clip, z, cohort, strategy)
    shared = {"a": jnp.zeros(COORDINATES)}
    message = {"a": jnp.full(COORDINATES, 1.0)}

    def one(state, key):
        summand = private.lift(key, state, jnp.float32(1), message)
        mean, state, metrics = private.combine(key, state, jax.tree.map(lambda leaf: 4 * leaf, summand))  # four came
        return state, (mean["a"], metrics)

    means, metrics = jax.device_get(jax.jit(lambda: jax.lax.scan(one, private.init(shared, 99), jax.random.split(KEY, ROUNDS))[1])())
    sums = np.cumsum(np.float64(means), axis=0)
    signal = 4 * clip / math.sqrt(COORDINATES) / cohort * np.arange(1, ROUNDS + 1)
    stated = z * clip * strategy.sensitivity * np.sqrt((b**2).sum(1)) / cohort
    np.testing.assert_allclose(sums.std(axis=1), stated, rtol=0.02)
    np.testing.assert_allclose(sums.mean(axis=1), signal, atol=5 * stated.max() / math.sqrt(COORDINATES))
    np.testing.assert_allclose(metrics["signal_norm"], 4 * clip / cohort, rtol=1e-4)
    assert (metrics["clipped"] == 1).all() and (metrics["clip"] == clip).all() and private.acts_when_empty


def test_without_noise_it_is_the_private_mean():
    message = {"a": jnp.arange(4.0)}
    silent = aggregators.private_ftrl(1.5, 0.0, 2, aggregators.tree(4))
    assert silent.event == dp.NonPrivateDpEvent()
    reference = aggregators.private_mean(1.5, 0.0, 2)

    @jax.jit
    def means():
        return [one.combine(KEY, state, one.lift(KEY, state, jnp.float32(7), message))[0]["a"]
                for one in (silent, reference) for state in [one.init(message, 3)]]

    np.testing.assert_array_equal(*means())


def algorithm_of(model, strategy):
    return algorithms.fedsgd(model, 0.1, batches.epochs(1, 4), aggregator=aggregators.private_ftrl(1.0, 2.0, 1, strategy))


SAMPLERS = {
    "everyone": sampling.everyone(sampling.equal),
    "fixed size": sampling.fixed_size(1, N, sampling.equal),
    "not far enough": sampling.separated(1, N, 3),
    "drop-outs of everyone": sampling.with_dropouts(sampling.everyone(), 0.5),
    "one that keeps the event": Sampling(sampling.everyone().draw, lambda event: event),
    "Poisson": sampling.poisson(0.2, N),
    "Poisson, cut": sampling.poisson(0.2, N, capacity=3),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("strategy", [aggregators.tree(4), aggregators.banded(9, 4, 3)], ids=["tree", "banded"])
def test_a_sampler_that_does_not_keep_clients_apart_costs_infinitely_much(plain_model, name, strategy):
    cost = privacy.client_cost(algorithm_of(plain_model, strategy), SAMPLERS[name])
    assert "once in 4 rounds, which this sampling does not promise" in cost.label or "oisson" in name
    for relation in NeighboringRelation:
        for accountant in Accountant:
            ledger = PrivacyLedger(Unit.CLIENT, relation)
            assert ledger.spend(cost, 1).epsilon(1e-5, accountant) == math.inf
            assert ledger.spend(cost, 40).spend(Cost(dp.GaussianDpEvent(9.0), Unit.CLIENT)).epsilon(0.5, accountant) == math.inf


@pytest.mark.parametrize("sampler", [
    sampling.separated(1, N, 4), sampling.separated(1, N, 6), sampling.with_dropouts(sampling.separated(1, N, 4), 0.3),
    sampling.with_stragglers(sampling.separated(1, N, 5), 0.3, batches.epochs(1, 4), 5),
])
def test_a_sampler_that_keeps_them_apart_makes_it_one_gaussian_a_period(plain_model, sampler):
    algorithm = algorithm_of(plain_model, aggregators.tree(4))
    assert algorithm.client_period == 4
    cost = privacy.client_cost(algorithm, sampler)
    assert cost.event == dp.GaussianDpEvent(2.0)
    ledger = privacy.open_ledger(cost)
    for rounds, times in ((1, 1), (4, 1), (5, 2), (9, 3)):  # the most often that a client can have taken part
        gaussians = ledger.spend(Cost(dp.GaussianDpEvent(2.0), Unit.CLIENT), times)
        assert ledger.spend(cost, rounds).epsilon(1e-5) == gaussians.epsilon(1e-5) > 0


def test_other_events_stay_what_they_are():
    event = dp.ComposedDpEvent((dp.UnsupportedDpEvent(), dp.GaussianDpEvent(1.0)))
    for one in (event, dp.GaussianDpEvent(1.0), dp.NonPrivateDpEvent()):
        assert mechanism.kept_apart(one, 100) == one
    assert sampling.separated(1, N, 3).amplify(dp.GaussianDpEvent(1.0)) == dp.GaussianDpEvent(1.0)
    assert mechanism.once_in(1, dp.GaussianDpEvent(1.0)) == dp.GaussianDpEvent(1.0)  # a period of one round is any round


def test_a_federated_run_has_the_trees_noise_in_its_model(plain_model, sites):
    """Clients that send nothing (a learning rate of 0): the model is the running sum of the noise, also over a restart."""
    strategy = aggregators.tree(2)
    algorithm = algorithms.fedavg(
        plain_model, optax.sgd(0.0), batches.epochs(1, 4), aggregator=aggregators.private_ftrl(0.5, 2.0, 3, strategy))
    sampler = sampling.separated(3, N, 2, sampling.equal)
    state = algorithm.init(jax.jit(plain_model.init)(KEY), N)
    start = state.shared

    @jax.jit
    @jax.vmap
    def run(key):
        def one(state, key):
            first, second = jax.random.split(key)
            state, _ = algorithm.round(first, state, sampler.draw(second, state.round, sites), sites)
            return state, optax.tree.sub(state.shared.params, start.params)["Dense_0"]["kernel"]

        return jax.lax.scan(one, state, jax.random.split(key, 5))[1]

    moved = np.asarray(run(jax.random.split(KEY, 1_000)))  # [runs, rounds, 4, 3]
    b, _ = tree_matrices(5, 2)
    stated = 2.0 * 0.5 * math.sqrt(2) / 3 * np.sqrt((b**2).sum(1))
    np.testing.assert_allclose(moved.std(axis=(0, 2, 3)), stated, rtol=0.03)


def test_a_compiled_study_keeps_clients_apart_over_its_blocks_of_rounds():
    """Three clients whose turns are three rounds apart, in blocks of 2 rounds, and two runs."""
    rng = np.random.default_rng(0)

    def records(*sizes):
        n = sum(sizes)
        return Records(rng.normal(size=(n, 3)).astype(np.float32), rng.integers(0, 2, n).astype(np.int32), np.cumsum([0, *sizes]))

    data = FederatedDataset(
        "small", records(4, 4, 4), records(1, 1, 1), records(1, 1, 1), records(2), ("a", "b", "c"), ("d",), num_classes=2)
    model = models.bridge(models.LogisticRegression(2), jnp.zeros((1, 3)), models.softmax_cross_entropy)
    study = arms.Study(
        model, stack([data]), data.site_names, data.unseen_names, rounds=8, evaluate_every=2, chunk=4,
        metrics={"accuracy": CLASSIFICATION["accuracy"]})
    arm = arms.Arm("FTRL", lambda _: algorithm_of(model, aggregators.tree(3)), lambda sites: sampling.separated(1, 3, 3))
    runs = arms.seeds_of([0, 1], stacked=False)
    (program,), _ = programs.compile_arms(study, [arm], runs, tqdm(disable=True))
    state, ids = program.initial, []
    for _ in range(4):
        state, block = program.blocks[2](runs, study.splits, state)
        ids.append(np.asarray(block.ids)[..., 0])
    np.testing.assert_array_equal(np.concatenate(ids, axis=1), [[0, 1, 2, 0, 1, 2, 0, 1]] * 2)
    np.testing.assert_array_equal(state.aggregator.leaves, [2, 2])


def test_strategies_are_built_while_a_program_is_traced():
    @jax.jit
    def run(key):
        strategy = aggregators.banded(11, 3)
        return strategy.noise(key, strategy.init({"a": jnp.zeros(3)}), {"a": jnp.zeros(3)})[0]["a"]

    strategy = aggregators.banded(11, 3)
    like = {"a": jnp.zeros(3)}
    built_before = jax.jit(lambda key: strategy.noise(key, strategy.init(like), like)[0]["a"])
    np.testing.assert_allclose(run(KEY), built_before(KEY), rtol=1e-6)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: aggregators.tree(0), "period must be a whole number above 0"),
    (lambda: aggregators.tree(8, 7), "8 rounds apart or more, and the separation is 7"),
    (lambda: aggregators.banded(10, 3, 4), "4 rounds apart or more, and the separation is 3"),
    (lambda: aggregators.banded(0, 3), "rounds must be a whole number"),
    (lambda: aggregators.private_ftrl(clipping.quantile(1.0, 1.0), 1.0, 4, aggregators.tree(2)), "The clip is fixed here"),
    (lambda: aggregators.distributed_private_mean(clipping.constant(1.0), 1.0, 4, 2), "The clip is fixed here"),
    (lambda: aggregators.private_ftrl(0.0, 1.0, 4, aggregators.tree(2)), "clip must be above 0"),
    (lambda: aggregators.private_ftrl(1.0, -1.0, 4, aggregators.tree(2)), "noise_multiplier"),
    (lambda: aggregators.private_ftrl(1.0, 1.0, 0, aggregators.tree(2)), "expected_cohort"),
])
def test_mechanisms_that_mean_nothing_are_refused(make, words):
    with pytest.raises(FlJaxError, match=words):
        make()
