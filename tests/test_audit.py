"""Audits: published reference values; every planted fault is caught, and a faultless mechanism is not accused."""

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from fl_jax import aggregators, audit, batches, core, gradients, models, sampling
from fl_jax.errors import FlJaxError
from fl_jax.types import Batch, Client, Sites, Variables

KEY = jax.random.key(0)
DELTA = 1e-5
NOISE, CLIP = 1.0, 0.5
QUANTILES = stats.norm.ppf((np.arange(10_000) + 0.5) / 10_000)


@pytest.mark.parametrize("shift, epsilon", [(1, 1.13346), (2, 2.31195), (4, 4.39557)])
def test_one_run_bounds_are_the_published_ones(shift, epsilon):
    assert audit.one_run_bound(audit.Scores(QUANTILES + shift, QUANTILES), 1e-6) == pytest.approx(epsilon, rel=1e-4)


def test_a_gaussian_bound_comes_close_to_the_mechanism_from_below():
    """Of a Gaussian of multiplier 1 with many runs; and it is below in nearly all of a hundred repeats with few."""
    truth = dp_accounting.get_epsilon_gaussian(1.0, DELTA)
    assert 0.85 * truth < audit.gaussian_bound(audit.Scores(QUANTILES + 1, QUANTILES), DELTA) < truth
    rng = np.random.default_rng(0)
    found = [audit.gaussian_bound(audit.Scores(1 + rng.normal(size=200), rng.normal(size=200)), DELTA) for _ in range(100)]
    assert np.mean(np.array(found) <= truth) >= 0.95


def test_a_counting_bound_assumes_nothing_and_cannot_show_much():
    truth = dp_accounting.get_epsilon_gaussian(1.0, DELTA)
    apart = audit.Scores(QUANTILES + 100, QUANTILES)
    assert 0 < audit.counting_bound(audit.Scores(QUANTILES + 1, QUANTILES), DELTA) < truth
    assert np.log(10_000 / 30) < audit.counting_bound(apart, DELTA) < np.log(10_000)


def test_bounds_do_not_accuse_a_faultless_mechanism():
    """Randomized response at epsilon .5, told apart as well as can be: of many runs, and of the canaries of one."""
    rng, truth = np.random.default_rng(1), 0.5
    honest = np.exp(truth) / (1 + np.exp(truth))

    def blur():  # which tells nothing, and makes every run a threshold of its own
        return rng.uniform(0, 0.5, 400)

    for bound, count in ((audit.counting_bound, 400), (audit.one_run_bound, 400)):
        found = [bound(audit.Scores((rng.random(count) < honest) + blur(), (rng.random(count) >= honest) + blur()), DELTA) for _ in range(60)]
        assert np.mean(np.array(found) <= truth) >= 0.95


def test_true_positives_at_a_low_rate_of_false_ones():
    scores = audit.Scores(QUANTILES + 2, QUANTILES)
    found = audit.true_positive_rate(scores, 0.01)
    assert found.mean == pytest.approx(stats.norm.sf(stats.norm.isf(0.01) - 2), abs=2e-3) and found.low < found.mean < found.high
    assert audit.true_positive_rate(audit.Scores(np.array([1.0, 2.0]), np.array([1.0, 2.0])), 0.1).mean == 0  # of two, none may be accused
    assert audit.area_under_curve(scores) == pytest.approx(stats.norm.cdf(2 / np.sqrt(2)), abs=1e-3)


@pytest.mark.parametrize("call, words", [
    (lambda: audit.gaussian_bound(audit.Scores(np.array([np.nan]), np.ones(2)), DELTA), "1 of 1 scores inside are NaN"),
    (lambda: audit.one_run_bound(audit.Scores(np.array([]), np.ones(2)), DELTA), "vector of scores inside"),
    (lambda: audit.counting_bound(audit.Scores(np.ones(2), np.ones(2)), 1.0), "delta must lie between"),
    (lambda: audit.gaussian_bound(audit.Scores(np.ones(2), np.ones(2)), DELTA, 1.0), "confidence is a probability"),
    (lambda: audit.true_positive_rate(audit.Scores(np.ones(2), np.ones(2)), 0.0), "false positive rate"),
    (lambda: audit.repeated(lambda key, present: 0.0, KEY, 1), "at least 2 runs"),
    (lambda: audit.infer_label(jnp.zeros((3, 1))), "kernel"),
    (lambda: audit.by_likelihood_ratio(np.ones((4, 3)), np.ones((4, 3), bool)), "in or out of only 0 models"),
])
def test_mistakes_are_named(call, words):
    with pytest.raises(FlJaxError, match=words):
        call()


# A federation for canaries: a linear model whose last feature only the canary has, and clients that send what they are told.

FEATURES, RECORDS = 3, 12


def linear_sites():
    """Two sites of 6 records, whose last feature is 0, and the canary, which has nothing else, at site 0."""
    x = np.random.default_rng(5).normal(size=(RECORDS, FEATURES)).astype(np.float32)
    x[:, -1] = 0
    sites = Sites(jnp.asarray(x), jnp.asarray(x.sum(1)), jnp.array([0, 6], jnp.int32), jnp.array([6, 6], jnp.int32))
    return audit.with_records(sites, 0, 100 * np.eye(FEATURES, dtype=np.float32)[-1:], np.ones(1, np.float32))


def test_canaries_are_planted_and_left_out():
    sites = linear_sites()
    assert sites.size.tolist() == [7, 6] and sites.offset.tolist() == [0, 7]
    np.testing.assert_array_equal(sites.x[6], [0, 0, 100])
    included = np.ones(13, bool)
    included[[1, 6, 8]] = False
    only = jax.jit(audit.only)
    sites, left = jax.device_get((sites, only(sites, included)))
    assert left.size.tolist() == [5, 5]
    for site, rows in ((0, [0, 2, 3, 4, 5]), (1, [7, 9, 10, 11, 12])):
        start = int(left.offset[site])
        np.testing.assert_array_equal(left.x[start:start + 5], sites.x[rows])
    everything = only(sites, np.ones(13, bool))
    np.testing.assert_array_equal(everything.x, sites.x)
    with pytest.raises(FlJaxError, match="no site 2"):
        audit.with_records(sites, 2, sites.x[:1], sites.y[:1])


def client_scores(mechanisms, *, num_runs=400, rounds=4):
    """For each (clip, noise) of `mechanisms` [k, 2], all in one program: scores of runs with and without one canary among three
    clients, whose message is ten times the claimed clip."""
    canary = {"w": 10 * CLIP * jnp.eye(8)[:1]}
    shared = Variables({"w": jnp.zeros(8)}, {})

    def nothing(carry, shared, kept):
        return jax.tree.map(jnp.zeros_like, shared), kept, {}

    idle = Client(lambda v: (v, ()), lambda key, shared, kept, site: (), lambda key, carry, shared, batch: carry, nothing,
                  lambda shared, kept: shared, batches.updates(1, 1))
    client = audit.with_clients(idle, Variables(canary, {}), first=2)
    sites = Sites(jnp.zeros((3, 1)), jnp.zeros(3), jnp.arange(3), jnp.ones(3, jnp.int32))

    def score(key, present, mechanism):
        algorithm = core.federate(client, aggregators.private_mean(mechanism[0], mechanism[1], 3), optax.sgd(1.0))
        return audit.watched(
            algorithm, sampling.everyone(sampling.equal), algorithm.init(shared, 3), sites, rounds, audit.moved({"w": jnp.eye(8)[:1]}), key,
            among=lambda cohort: audit.absent(cohort, 2, present[None]))[0]

    def run(key, present):
        return jax.vmap(lambda each: score(key, present, each))(mechanisms)

    found = audit.repeated(run, jax.random.key(11), num_runs)
    return [audit.Scores(*sides) for sides in zip(found.inside.T, found.outside.T, strict=True)]


def test_a_private_mean_is_not_accused_and_each_of_its_faults_is():
    """Four rounds of multiplier 1 are one of 1/2."""
    claimed = dp_accounting.get_epsilon_gaussian(NOISE / 2, DELTA)
    # as it should be; then noise left out, halved, and not clipped
    mechanisms = np.array([(CLIP, NOISE), (CLIP, 0), (CLIP, NOISE / 2), (1e6, NOISE * CLIP / 1e6)], np.float32)
    faultless, *faulty = client_scores(mechanisms)
    assert 0.5 * claimed < audit.gaussian_bound(faultless, DELTA) < claimed
    for found in faulty:
        assert audit.gaussian_bound(found, DELTA) > 1.1 * claimed


def test_the_control_stays_below_the_claim_in_nearly_all_repeats():
    (scores,) = client_scores(np.array([(CLIP, NOISE)], np.float32), num_runs=4_000)
    claimed = dp_accounting.get_epsilon_gaussian(NOISE / 2, DELTA)
    parts = zip(np.split(scores.inside, 40), np.split(scores.outside, 40), strict=True)
    assert np.mean([audit.gaussian_bound(audit.Scores(*part), DELTA) <= claimed for part in parts]) >= 0.95
    assert audit.gaussian_bound(scores, DELTA) <= claimed


def test_one_run_of_many_canary_clients_bounds_the_claim_from_below():
    count, size = 300, 4_000
    canaries = jax.jit(lambda key: {"w": CLIP * audit.directions(key, jnp.zeros(size), count)})(jax.random.key(3))

    def run(key, present):
        def shown(noise):
            aggregator = aggregators.private_mean(CLIP, noise, count)
            lifted = jax.vmap(lambda w, message: aggregator.lift(key, (), w, message))(present.astype(jnp.float32), canaries)
            mean, _, _ = aggregator.combine(key, (), jax.tree.map(lambda leaf: leaf.sum(0), lifted))
            return audit.alignment(mean, canaries)

        return jax.vmap(shown)(jnp.array([NOISE, 1e-3])).T

    found = audit.one_run(run, KEY, count)
    sides = zip(found.inside.T, found.outside.T, strict=True)
    faultless, left_out = (audit.one_run_bound(audit.Scores(*side), DELTA) for side in sides)
    assert 0 < faultless < dp_accounting.get_epsilon_gaussian(NOISE, DELTA)
    assert left_out > 2 * faultless


# Membership and labels.


def test_a_memorizing_model_gives_its_members_away_and_a_constant_one_does_not():
    """Nearest centroids of few records in many dimensions: each record is close to a centroid that has it."""
    x = np.random.default_rng(1).normal(size=(40, 30)).astype(np.float32)
    y = np.arange(40) % 2

    def predict(variables, x):
        return x @ variables.params.T

    model = models.bridge(models.LogisticRegression(2), jnp.zeros((1, 30)), models.softmax_cross_entropy)._replace(predict=predict)

    def train(key, included):
        weight = included[:, None] * jax.nn.one_hot(y, 2)
        return Variables(weight.T @ x / 4, {})

    shadows = audit.shadow_models(train, KEY, 16, 40)
    members = np.asarray(shadows.members)
    assert (members.sum(0) == 8).all()
    found = jax.jit(lambda variables: audit.confidences(model, variables, x, y))(shadows.variables)
    by_loss, ratio = audit.by_loss(found, members), audit.by_likelihood_ratio(found, members)
    assert audit.area_under_curve(by_loss) > 0.7 and audit.area_under_curve(ratio) > audit.area_under_curve(by_loss)
    assert audit.true_positive_rate(ratio, 0.01).low > 0.05
    nothing = np.random.default_rng(0).normal(size=(16, 4_000))
    members = np.tile(members, (1, 100))
    assert abs(audit.area_under_curve(audit.by_likelihood_ratio(nothing, members)) - 0.5) < 0.02
    assert audit.true_positive_rate(audit.by_likelihood_ratio(nothing, members), 0.01).high < 0.02


def test_likelihood_ratios_are_those_of_two_normals():
    rng = np.random.default_rng(0)
    members = rng.permuted(np.repeat([[True], [False]], 5, axis=0).repeat(7, axis=1), axis=0)
    values = rng.normal(size=members.shape) + members
    ratio = audit.by_likelihood_ratio(values, members)
    residual = {side: np.concatenate([values[members[:, r] == side, r] - values[members[:, r] == side, r].mean() for r in range(7)])
                for side in (True, False)}
    variance = {side: (residual[side] ** 2).sum() / (7 * 4) for side in residual}
    k, r = np.argwhere(members)[3]
    others = np.delete(np.arange(10), k)
    mean = {side: values[others][members[others, r] == side, r].mean() for side in residual}
    expected = stats.norm.logpdf(values[k, r], mean[True], variance[True] ** 0.5) - stats.norm.logpdf(values[k, r], mean[False], variance[False] ** 0.5)
    assert ratio.inside[3] == pytest.approx(expected)


def test_confidence_is_the_log_odds_of_the_label():
    model = models.bridge(models.LogisticRegression(3), jnp.zeros((1, 2)), models.softmax_cross_entropy)
    variables = jax.tree.map(lambda leaf: leaf[None], jax.jit(model.init)(KEY))
    x, y = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32), np.array([0, 1, 2, 0, 1])
    p = np.asarray(jax.nn.softmax(model.predict(jax.tree.map(lambda leaf: leaf[0], variables), x)))[np.arange(5), y]
    np.testing.assert_allclose(jax.jit(lambda: audit.confidences(model, variables, x, y))()[0], np.log(p / (1 - p)), rtol=1e-4)


def test_a_gradients_label_is_read_off_it():
    model = models.bridge(models.TwoNN(num_classes=5, hidden=8), jnp.zeros((1, 6)), models.softmax_cross_entropy)
    params = jax.jit(model.init)(KEY).params
    oracle = jax.jit(gradients.plain(model).compute)
    for label in range(5):
        x = np.random.default_rng(label).normal(size=(1, 6)).astype(np.float32)
        batch = Batch(x, np.array([label]), np.ones(1, np.float32))
        slope, *_ = oracle(KEY, (), params, {}, batch)
        assert audit.infer_label(slope["Dense_2"]["bias"]) == audit.infer_label(slope["Dense_2"]["kernel"]) == label
