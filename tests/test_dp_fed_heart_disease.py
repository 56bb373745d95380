"""The study of differential privacy on Fed-Heart-Disease: Opacus' noise and steps restated, true epsilons, choices without test records,
claims from rows."""

import dataclasses
import itertools
import json
import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from dp_accounting import pld
from scipy import integrate, optimize, special, stats

from experiments import dp_fed_heart_disease as study
from experiments.common import rate_grid
from experiments.dp_fed_heart_disease_protocol import (
    AS_MANY_STEPS,
    AS_RUN,
    FEDERATED,
    OVER_DELTAS,
    PUBLISHED,
    RUNS,
    WITHOUT,
    Config,
    Plan,
    as_many_steps,
    at_published_rate,
    chosen,
    claims,
    labelled,
)
from experiments.fed_heart_disease import logistic_regression
from experiments.flamby import opacus
from fl_jax import batches, clients, data, gradients, training
from fl_jax.data import standardize
from fl_jax.errors import FlJaxError
from fl_jax.results import load_run, read_claims
from fl_jax.types import Batch, Cohort, Site, Sites

FEATURES, SIZES = 3, {"a": (23, 9), "b": (14, 7), "c": (6, 5)}  # training and test records
MODEL = logistic_regression(FEATURES)
SMALL = Config(
    quick=True, epsilons=(1.0, 10.0), sampling_rates=(0.25,), steps=(20,), rates=(0.01, 0.3), tuning_seeds=2)


def federation(validation=0.0, seed=0, poison=False):
    """Three sites whose label follows the first feature; poisoned, the test labels are turned round."""
    rng = np.random.default_rng(0)
    site = np.repeat(np.arange(3), [sum(sizes) for sizes in SIZES.values()])
    test = np.concatenate([np.arange(sum(sizes)) >= sizes[0] for sizes in SIZES.values()])
    x = rng.normal(size=(len(site), FEATURES))
    y = (x[:, 0] + rng.normal(size=len(site)) > 0).astype(np.int32)
    y = np.where(test & poison, 1 - y, y)
    dataset = data.from_arrays(
        x, y, site, test=test, validation=validation, seed=seed, site_names=tuple(SIZES), name="tiny", num_classes=2,
        feature_names=["f", "g", "h"])
    return standardize.standardize_features(dataset, standardize.site_statistics)


@pytest.mark.parametrize("noise, rate", [(0.38, 0.02), (2.03, 0.125), (17.5, 0.02)])
def test_the_divergences_are_the_moments_of_the_likelihood_ratio(noise, rate):
    found = opacus.renyi(noise, rate)
    whole = opacus.ORDERS == np.round(opacus.ORDERS)
    # the integral is exact to rounding; the smallest divergences are 1e-6, of a logarithm of 1 and a little
    for order in (2, 5, 63):
        powers = np.arange(order + 1)
        terms = (special.gammaln(order + 1) - special.gammaln(powers + 1) - special.gammaln(order - powers + 1)
                 + powers * math.log(rate) + (order - powers) * math.log1p(-rate) + (powers**2 - powers) / (2 * noise**2))
        exact = special.logsumexp(terms) / (order - 1)
        np.testing.assert_allclose(found[opacus.ORDERS == order], exact, rtol=1e-6)
    for order in (1.1, 2.5):
        def moment(x, order=order):
            ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * x - 1) / (2 * noise**2))
            return math.exp(order * ratio + stats.norm.logpdf(x, scale=noise))

        area = integrate.quad(moment, -12 * noise, order + 12 * noise, points=[0, 1, order], epsabs=1e-14, epsrel=1e-13, limit=200)[0]
        np.testing.assert_allclose(found[opacus.ORDERS == order], math.log(area) / (order - 1), rtol=1e-5)
    assert (np.diff(found) > 0).all() and whole.sum() == 61


@pytest.mark.parametrize("target, delta, size", [(0.1, 1e-4, 30), (1.0, 0.01, 85), (50.0, 1e-3, 199)])
def test_the_noise_is_the_first_of_the_bisection_that_is_near_enough(target, delta, size):
    noise, rate = opacus.noise_multiplier(target, delta, size, 4, 15), 1 / math.ceil(size / 4)
    steps = int(15 / rate)
    assert target - opacus.TOLERANCE <= opacus.epsilon(noise, rate, steps, delta) < target
    whole = noise * 2.0**20 / 10  # a point of the bisection of [0, 20 * 2^k]
    assert whole == int(whole)
    coarser = [step * math.ceil(noise / step) for step in (20 / 2**k for k in range(-4, 20)) if step * math.ceil(noise / step) > noise]
    assert all(target - opacus.epsilon(other, rate, steps, delta) > opacus.TOLERANCE for other in coarser)


def test_denominators_are_opacus_own():
    work = opacus.passes(5, 4)
    # at a few multiples of 4, such as 196, n * (1 / (n / 4)) is 4 less a rounding error, and Opacus has 3; FLamby's 172 is none of them
    sizes = np.array([172, *(n for n in range(5, 400) if n % 4)])
    ours = jax.vmap(lambda n: work.expected(batches.order(jax.random.key(0), n)))(jnp.asarray(sizes))
    np.testing.assert_array_equal(ours, [int(n * (1 / math.ceil(n / 4))) for n in sizes.tolist()])


def gaussian_epsilon(mu, delta):
    """Epsilon of one Gaussian of sensitivity mu deviations (Balle & Wang 2018, Theorem 8)."""
    def excess(epsilon):
        upper = stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)
        return upper - delta
    return optimize.brentq(excess, 0, 50)


def test_the_true_epsilon_counts_all_steps_and_claims_no_amplification_of_passes():
    noise = opacus.noise_multiplier(0.1, 1e-4, 30, 4, 15)
    spent = opacus.spent(noise, 30, 4, 1500, 1e-4)
    assert spent.rdp == pytest.approx(opacus.epsilon(noise, 1 / 8, 1500, 1e-4), rel=0.01)  # other orders
    # 1,500 small steps come near one Gaussian: q sqrt(T (exp(1 / z^2) - 1)) (Bu et al. 2020, Corollary 5.4)
    limit = gaussian_epsilon(math.sqrt(1500 * math.expm1(1 / noise**2)) / 8, 1e-4)
    assert spent.pld == pytest.approx(limit, rel=0.02) and spent.pld > 2.8 * 0.1
    assert spent.passes == pytest.approx(gaussian_epsilon(2 * math.sqrt(math.ceil(1500 / 8)) / noise, 1e-4), rel=1e-6)


def a_batch(rows=4, present=4):
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(rows, FEATURES)).astype(np.float32), np.array([0, 1, 1, 0], np.int32)[:rows]
    return Batch(x, y, np.arange(rows) < present, np.float32(3))


def test_one_generator_draws_alike_everywhere_anew_in_each_step_and_is_not_private():
    params, stats_ = jax.jit(MODEL.init)(jax.random.key(0))
    seed = jax.random.key(7)

    @jax.jit
    def steps(own, noise):
        gradient = opacus.one_generator(MODEL, noise, seed)
        state, found = gradient.init(params), []
        for _ in range(2):
            leaves, state, _, _ = gradient.compute(own, state, params, stats_, a_batch(present=0))
            found.append(jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(leaves)]))
        return jnp.stack(found), state.drawn

    one, drawn = steps(jax.random.key(1), 2.0)
    other, _ = steps(jax.random.key(2), 6.0)
    np.testing.assert_allclose(3 * one, other, rtol=1e-5)
    assert drawn == 2 and float(jnp.abs(one[0] - one[1]).min()) > 1e-4
    assert opacus.one_generator(MODEL, 2.0, seed).event == dp_accounting.NonPrivateDpEvent()
    private = jax.jit(gradients.private(MODEL, opacus.CLIP, 2.0).compute)
    own = private(jax.random.key(1), (), params, stats_, a_batch(present=0))[0]
    assert np.abs(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(own)]) - one[0]).min() > 1e-4


def test_each_site_has_its_own_hyper_parameter():
    work, plain = batches.updates(2, 4), gradients.plain(MODEL)

    def build(rate):
        return clients.local_training(MODEL, plain, optax.sgd(rate), work)

    rates = jnp.array([0.1, 0.5, 2.0])
    shared, kept = build(0.1).init(jax.jit(MODEL.init)(jax.random.key(0)))

    def message(client, id):
        carry = client.begin(jax.random.key(1), shared, kept, Site(jnp.int32(id), jnp.int32(8), jnp.int32(2), lambda index: index))
        for t in range(2):
            carry = client.step(jax.random.key(t), carry, shared, a_batch())
        return client.end(carry, shared, kept)[0]

    together = opacus.by_site(build, rates)
    of_site, alone = jax.jit(lambda id: message(together, id)), jax.jit(lambda rate, id: message(build(rate), id))
    for id, rate in enumerate(rates):
        jax.tree.map(np.testing.assert_array_equal, of_site(id), alone(rate, id))
    assert together.event(8) == dp_accounting.NonPrivateDpEvent()


def test_a_round_without_noise_is_clipped_sums_over_opacus_denominators():
    sizes, rate = np.array([7, 4]), 0.5
    rng = np.random.default_rng(1)
    x, y = (4 * rng.normal(size=(11, FEATURES))).astype(np.float32), rng.integers(0, 2, 11)
    sites = Sites(jnp.asarray(x), jnp.asarray(y), jnp.array([0, 7]), jnp.asarray(sizes))
    algorithm = opacus.fedavg(MODEL, rate, opacus.passes(2, 4), jnp.zeros(2))
    state = algorithm.init(jax.jit(MODEL.init)(jax.random.key(0)), 2)
    params = algorithm.model(state, jnp.int32(0)).params
    cohort = Cohort(jnp.arange(2), jnp.asarray(sizes, jnp.float32), jnp.full(2, 1_000))
    state, _ = jax.jit(algorithm.round)(jax.random.key(2), state, cohort, sites)

    def flat(tree):
        return np.concatenate([np.asarray(tree["kernel"]).ravel(), np.asarray(tree["bias"])])

    def step(weights, rows, expected):
        inputs = np.hstack([x[rows], np.ones((len(rows), 1))])
        each = (1 / (1 + np.exp(-inputs @ weights)) - y[rows])[:, None] * inputs
        each *= np.minimum(1, opacus.CLIP / np.linalg.norm(each, axis=1))[:, None]
        return weights - rate * each.sum(0) / expected

    # the second site has one batch of four, twice; of the first site's orders, four then three, one must be what was run
    start, found = flat(params), flat(algorithm.model(state, jnp.int32(0)).params)
    second = step(step(start, np.arange(7, 11), 4), np.arange(7, 11), 4)
    heads = [list(head) for head in itertools.combinations(range(7), 4)]
    orders = [step(step(start, head, 3), [k for k in range(7) if k not in head], 3) for head in heads]
    distances = [np.abs((7 * first + 4 * second) / 11 - found).max() for first in orders]
    assert min(distances) < 1e-6 and np.median(distances) > 1e-3  # a few orders give the same


def test_noise_that_is_run_with_stays_within_its_budget():
    for plan, budget in ((AS_MANY_STEPS, 10.0), (Plan(0.25, 20), 1.0)):
        noise = study.calibrated(Config(), plan, budget)
        event = dp_accounting.PoissonSampledDpEvent(plan.sampling_rate, dp_accounting.GaussianDpEvent(float(noise)))
        spent = pld.PLDAccountant().compose(event, 15 * plan.steps).get_epsilon(0.001)
        assert noise.dtype == np.float32 and 0.998 * budget <= spent <= 1.0001 * budget  # the grid of privacy losses


@pytest.mark.slow
def test_the_quick_form_holds_by_the_numbers_of_its_rows_and_ledgers(quick_form):
    config, run = Config.quick_defaults(), load_run(quick_form("dp_fed_heart_disease", "fed_heart_disease"))
    verdicts = {verdict.claim.claim: verdict for verdict in read_claims(run.path / "claims.json")}
    assert [*verdicts] == [claim.claim for claim in claims(config)] and all(verdict.holds for verdict in verdicts.values())

    def accuracy(arm, site):
        rows = run.metrics[(run.metrics["arm"] == arm) & (run.metrics["split"] == "test") & (run.metrics["site"] == site)]
        return rows.sort_values("seed")["value"].to_numpy()

    lost = accuracy(f"{AS_RUN}{labelled(0.1, 0.0001)}", "mean") - accuracy(at_published_rate(FEDERATED), "mean")
    assert verdicts["label 0.1 at 0.0001: accuracy minus that without DP"].measured == pytest.approx(lost.mean(), abs=1e-9)
    gained = accuracy(chosen(FEDERATED, 10.0), "all") - accuracy(chosen(FEDERATED, 1.0), "all")
    assert verdicts["accuracy at epsilon 10 minus epsilon 1"].measured == pytest.approx(gained.mean(), abs=1e-9)
    spent = run.metrics[(run.metrics["metric"] == "epsilon_record_pld") & (run.metrics["site"] == "worst")]
    for budget in config.epsilons:
        for arm in (chosen(FEDERATED, budget), as_many_steps(budget)):
            own = spent[spent["arm"] == arm]["value"].unique()
            assert len(own) == 1 and 0.99 * budget <= own[0] <= budget
            assert verdicts[f"ledger / budget, {arm}"].measured == pytest.approx(own[0] / budget, rel=1e-6)
    assert not any(arm.startswith(AS_RUN) for arm in spent["arm"])
    ledgers = json.loads((run.path / "summary.json").read_text())["ledgers"]
    assert {*ledgers} == {arm(e) for e in config.epsilons for arm in (lambda e: chosen(FEDERATED, e), as_many_steps)}


@pytest.mark.slow
def test_choices_are_the_best_on_validation_records_and_blind_to_test_records(monkeypatch):
    seen, known, compile_arms, validation_scores = [], {}, training.compile_arms, rate_grid.validation_scores

    def remembered(study, arms, runs, bar):
        names = tuple(arm.name for arm in arms)
        if names not in known:  # records are arguments of the programs
            known[names] = compile_arms(study, arms, runs, bar)
        return known[names]

    def watched(axes, rows, arm, metric, *, site):
        scores = validation_scores(axes, rows, arm, metric, site=site)
        kept = rows[(rows["split"] == "validation") & (rows["site"] == site)]
        assert not (rows["split"] == "test").any() or rows[rows["split"] == "test"]["value"].isna().all()
        seen.append((arm, kept, scores))
        return scores

    monkeypatch.setattr(training, "compile_arms", remembered)
    about = {1.0: 12.0, 10.0: 1.5}  # what it finds takes seconds
    monkeypatch.setattr(study, "calibrated", lambda config, plan, epsilon: np.float32(about[epsilon]))
    monkeypatch.setattr(study.sweep, "run_mesh", lambda: None)  # a program for many devices takes longer to compile
    monkeypatch.setattr(rate_grid, "validation_scores", watched)
    found = study.choose(SMALL, federation)
    again = study.choose(SMALL, lambda validation, seed: federation(validation, seed, poison=True))
    assert found == again and {*found} == {
        *(chosen(arm) for arm in ("FedAvg", "local only", "pooled")), *(chosen(FEDERATED, e) for e in SMALL.epsilons)}
    for arm, kept, _ in seen[:3]:
        means = kept.groupby("arm")["value"].mean()
        assert found[chosen(arm)].score == pytest.approx(means.max())
        assert found[chosen(arm)].rate == float(means.idxmax().rpartition(" ")[2])
    for epsilon in SMALL.epsilons:
        means = seen[3][1].groupby("arm")["value"].mean()
        means = means[means.index.str.contains(f"epsilon {epsilon:g},")]
        assert len(means) == 2 and found[chosen(FEDERATED, epsilon)].score == pytest.approx(means.max())
        assert found[chosen(FEDERATED, epsilon)].rate == float(means.idxmax().rpartition(" ")[2])


def test_settings_that_mean_nothing_are_refused():
    for changes, words in (
        ({"labels": (2.0,)}, "published no result"), ({"steps": (1,)}, "equally many"), ({"epsilons": (3.0, 1.0)}, "ascend"),
        ({"seeds": 0}, "1 or more"),
    ):
        with pytest.raises(FlJaxError, match=words):
            dataclasses.replace(Config(), **changes)


def test_the_published_numbers_are_those_of_the_file(raw_files):
    rows = pd.read_csv(raw_files("flamby_results") / "results_fed_heart_disease.csv")
    wide = rows.fillna({"e": 0, "d": 0}).pivot(index="seed", columns=["e", "d"], values="perf")
    assert wide.shape == (RUNS, 1 + len(PUBLISHED))
    without = wide[0, 0]
    assert pytest.approx((without.mean(), without.std()), abs=6e-5) == WITHOUT
    for label, published in PUBLISHED.items():
        difference = wide[label] - without
        assert pytest.approx((wide[label].mean(), difference.mean(), difference.std()), abs=6e-5) == published
    for epsilon, published in OVER_DELTAS.items():
        difference = wide[epsilon].mean(axis=1) - without
        assert pytest.approx((difference.mean(), difference.std()), abs=6e-5) == published
