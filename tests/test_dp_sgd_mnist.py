"""DP-SGD on MNIST: how steps and epsilon are counted, what a step pays, and the study on small images that stand in for MNIST."""

import dataclasses
import json
import math
from functools import partial

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import pld, rdp

from experiments import dp_sgd_mnist, dp_sgd_mnist_protocol
from experiments.common.mnist import classifier
from experiments.dp_sgd_mnist import algorithm_of, one_place, work_of
from experiments.dp_sgd_mnist_protocol import (
    EARLY,
    PROBLEMS,
    RECORDS,
    Config,
    Setting,
    claims,
    old_conversion,
    problems,
    renyi,
    rounds_of,
    steps_of,
    todays_conversion,
)
from fl_jax import models
from fl_jax.core import site_keys
from fl_jax.data import Source
from fl_jax.errors import FlJaxError
from fl_jax.privacy import PrivacyLedger, Unit, open_ledger, record_costs
from fl_jax.results import Direction, load_run, read_claims

pytestmark = pytest.mark.usefixtures("one_device")

SIDE, CLASSES, TRAIN, TEST = 8, 4, 1280, 200
PATTERNS = np.random.default_rng(5).integers(0, 60, (CLASSES, SIDE, SIDE, 1), dtype=np.uint8)
PRIVATE = [problem for problem in PROBLEMS if problem.published.old is not None]
CLIP = 2.7
STEPS = {"strict": 3_515, "default": 14_062, "loose": 10_546, "plain": 4_687, "strict_plain": 3_515}
BY_FIELD = {problem.field: problem for problem in PROBLEMS}


def images(split):
    """Noisy images of four patterns."""
    rng, number = np.random.default_rng({"train": 0, "test": 1}[split]), {"train": TRAIN, "test": TEST}[split]
    y = rng.integers(0, CLASSES, number).astype(np.int32)
    x = PATTERNS[y] + rng.integers(0, 128, (number, SIDE, SIDE, 1), dtype=np.uint8)
    return Source("patterns", x, y, tuple("abcd"), (), (f"{number} images.",))


def small_model():
    return classifier(models.LogisticRegression(CLASSES), (SIDE, SIDE, 1))


def test_steps_are_counted_as_published_and_are_whole_rounds():
    config = Config()
    for problem in PROBLEMS:
        setting = problem.setting(config)
        assert rounds_of(setting, config) * setting.steps_per_round == steps_of(setting, config) == STEPS[problem.field]
    quick = Config.quick_defaults()
    (only,) = problems(quick)
    setting = only.setting(quick)
    assert only.field == "default" and rounds_of(setting, quick) * setting.steps_per_round == 2 * (60_000 // 256)
    with pytest.raises(FlJaxError, match="3515 steps, which are not whole rounds of 100: give a divisor"):
        rounds_of(dataclasses.replace(config.strict, steps_per_round=100), config)


def test_both_conversions_of_one_gaussian_are_its_closed_forms():
    """Without sampling the divergence of order a is a / (2 z^2): the old epsilon is least at a = 1 + z sqrt(2 log(1 / delta))."""
    noise, delta = 4.0, 1e-5
    orders = np.linspace(1.01, 60, 20_000)
    divergences = orders / (2 * noise**2)
    least = 1 / (2 * noise**2) + math.sqrt(2 * math.log(1 / delta)) / noise
    assert old_conversion(orders, divergences, delta) == pytest.approx(least, rel=1e-5)
    assert todays_conversion(orders, divergences, delta) < least
    finite = np.where(orders < 25, divergences, np.inf)
    assert old_conversion(np.append(orders, 1.0), np.append(finite, 0.0), delta) == pytest.approx(least, rel=1e-5)


def test_divergences_are_those_of_poisson_sampled_gaussians():
    """At whole orders the divergence of one step is a binomial sum (Mironov, Talwar & Zhang 2019, section 3.3)."""
    noise, rate, steps = 1.1, 256 / RECORDS, 14_062
    orders, divergences = renyi(noise, rate, steps)
    for order in (3, 8, 20):
        terms = [math.comb(order, k) * (1 - rate) ** (order - k) * rate**k * math.exp(k * (k - 1) / (2 * noise**2))
                 for k in range(order + 1)]
        expected = steps * math.log(math.fsum(terms)) / (order - 1)
        assert divergences[orders == order] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("problem", PRIVATE, ids=lambda problem: problem.field)
def test_epsilon_of_the_published_steps_is_the_published_one(problem):
    """The old conversion gives what the README prints; the ledger of the study's own algorithm what dp-accounting makes of it."""
    config = Config()
    setting = problem.setting(config)
    spectrum = renyi(setting.noise, config.batch / RECORDS, STEPS[problem.field])
    old, today = old_conversion(*spectrum, config.delta), todays_conversion(*spectrum, config.delta)
    assert (round(old, 2), round(today, 3)) == problem.published[1:3]
    ledger = ledger_of(problem, config, RECORDS, rounds_of(setting, config))
    assert ledger.name == "image" and ledger.unit is Unit.RECORD
    # the coins that a capacity cuts have 1e-15 a step of delta; 1e-3 is what the claim leaves
    assert today <= ledger.epsilon(config.delta) < today * (1 + 1e-6)


def ledger_of(problem, config, num_records, rounds) -> PrivacyLedger:
    (cost,) = record_costs(algorithm_of(problem, config, small_model(), num_records), {"0": num_records})
    return open_ledger(cost, name="image").spend(cost, rounds)


@pytest.mark.parametrize("epochs", EARLY)
def test_early_epsilons_are_published_too(epochs):
    setting = BY_FIELD["default"].setting(Config())
    old = old_conversion(*renyi(setting.noise, 256 / RECORDS, epochs * (RECORDS // 256)), 1e-5)
    assert round(old, 2) == EARLY[epochs].old


def test_a_private_step_has_room_for_every_sample_and_a_plain_one_for_nearly_all():
    config = Config()
    private, plain = (work_of(BY_FIELD[field], config, RECORDS) for field in ("strict", "strict_plain"))
    assert float(private.expected(private.order(jax.random.key(0), jnp.int32(RECORDS)))) == pytest.approx(256)
    assert 380 < private.size < 400 and 300 < plain.size < 320  # 256 and 8.5 or 3.2 standard deviations of 16
    event = algorithm_of(BY_FIELD["strict"], config, small_model(), RECORDS).record_event(RECORDS)
    step = dp_accounting.TruncatedSubsampledGaussianDpEvent(RECORDS, 256 / RECORDS, private.size, 1.3)
    assert event == dp_accounting.SelfComposedDpEvent(step, config.strict.steps_per_round)
    without = algorithm_of(BY_FIELD["strict_plain"], config, small_model(), RECORDS).record_event(RECORDS)
    assert without == dp_accounting.SelfComposedDpEvent(dp_accounting.NonPrivateDpEvent(), config.strict_plain.steps_per_round)


def test_a_round_is_steps_of_dp_sgd_on_poisson_samples():
    """Restated in NumPy for logistic regression: the same samples, each image clipped, the sum divided by what is expected."""
    setting = Setting(1.3, 0.25, CLIP, 1, 5, 1, 1)
    config = dataclasses.replace(Config(), strict=setting)
    problem, dataset, model = BY_FIELD["strict"], one_place(images), small_model()
    algorithm = algorithm_of(problem, config, model, TRAIN)
    quiet = algorithm_of(problem, dataclasses.replace(config, strict=dataclasses.replace(setting, noise=1e-9)), model, TRAIN)
    sites, key, start = dataset.device().train, jax.random.key(3), model.init(jax.random.key(1))
    cohort = dp_sgd_mnist._always(sites).draw(key, jnp.int32(0), sites)
    (noisy, _), (clean, metrics) = (jax.jit(one.round)(key, one.init(start, 1), cohort, sites) for one in (algorithm, quiet))

    work = work_of(problem, config, TRAIN)
    order = work.order(site_keys(jax.random.split(key)[0], jnp.int32(0))[0], jnp.int32(TRAIN))
    kernel, bias = (np.asarray(start.params["Dense_0"][name], np.float64) for name in ("kernel", "bias"))
    clipped = []
    for t in range(5):
        index, mask = (np.asarray(value) for value in work.draw(order, jnp.int32(t)))
        rows = index[mask > 0]
        assert 150 < len(rows) < 370 and len({*rows.tolist()}) == len(rows)
        x = np.asarray(dataset.train.x)[rows].reshape(len(rows), -1) / 255
        logits = x @ kernel + bias
        error = np.exp(logits - logits.max(1, keepdims=True))
        error = error / error.sum(1, keepdims=True) - np.eye(CLASSES)[np.asarray(dataset.train.y)[rows]]
        norms = np.linalg.norm(error, axis=1) * np.sqrt((x**2).sum(1) + 1)
        factors = np.minimum(1, CLIP / norms)[:, None]
        clipped.append((len(rows), (norms > CLIP).mean()))
        kernel -= 0.25 * x.T @ (factors * error) / 256
        bias -= 0.25 * (factors * error).sum(0) / 256
    np.testing.assert_allclose(clean.shared.params["Dense_0"]["kernel"], kernel, atol=2e-6)
    np.testing.assert_allclose(clean.shared.params["Dense_0"]["bias"], bias, atol=2e-6)
    counts, shares = np.array(clipped).T
    assert 0.02 < shares.min() and shares.max() < 0.98
    assert float(metrics.clients["records_clipped"][0]) == pytest.approx(shares @ counts / counts.sum(), abs=1e-6)
    # a step's noise is 1.3 clips / 256 times the rate; five of them, whose gradients it moves a little, make it sqrt(5) of that
    moved = np.asarray(noisy.shared.params["Dense_0"]["kernel"] - clean.shared.params["Dense_0"]["kernel"])
    assert moved.std() == pytest.approx(0.25 * 1.3 * CLIP / 256 * math.sqrt(5), rel=0.25)  # 256 normals: 4.4 % a standard error


def test_the_full_form_claims_what_is_published():
    found = claims(Config())
    assert len(found) == 10 and len({claim.claim for claim in found}) == 10
    assert all(claim.direction is Direction.WITHIN and not claim.quick and claim.expected for claim in found)
    accuracies = [claim for claim in found if "accuracy" in claim.claim]
    assert [claim.published for claim in accuracies] == [0.950, 0.966, 0.970, 0.990]
    for claim in accuracies:
        assert claim.admits(claim.published + 0.0049) and not claim.admits(claim.published + 0.0051)
        assert claim.admits(claim.published - 0.0049) and not claim.admits(claim.published - 0.0051)
    old, today = ([claim.published for claim in found if text in claim.claim] for text in ("old conv", "today's conv"))
    assert old == [1.19, 3.01, 7.10] and today == [0.954, 2.597, 6.319]


def test_what_is_not_as_published_has_no_published_claim():
    config = Config()
    left_out = dataclasses.replace(config, loose=dataclasses.replace(config.loose, epochs=0))
    assert len(claims(left_out)) == 7 and len(problems(left_out)) == 4
    longer = dataclasses.replace(config, default=dataclasses.replace(config.default, noise=1.2))
    assert not any("noise 1.1" in claim.claim for claim in claims(longer)) and len(claims(longer)) == 7
    assert len(claims(dataclasses.replace(config, delta=1e-6))) == 4 and claims(dataclasses.replace(config, batch=250)) == []
    in_other_rounds = dataclasses.replace(config.strict, steps_per_round=95, seeds=2)
    assert claims(dataclasses.replace(config, strict=in_other_rounds))[0].published == 0.950


def test_the_quick_form_has_bars_that_can_fail():
    accuracy, today, old = claims(Config.quick_defaults())
    assert accuracy.quick and today.quick and old.quick
    assert accuracy.admits(EARLY[2].accuracy) and not accuracy.admits(EARLY[1].accuracy)  # one epoch is not enough ...
    assert not accuracy.admits(0.96)  # ... and training without noise and clip would be above it
    assert old.published == 1.11 and not old.admits(1.03)
    accountant = rdp.RdpAccountant()
    accountant.compose(dp_accounting.PoissonSampledDpEvent(256 / RECORDS, dp_accounting.GaussianDpEvent(1.1)), 468)
    assert today.published == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9) and today.published < old.published


SMALL = Config(
    microbatch=32, strict=Setting(1.3, 0.25, 3.0, 4, 10, 1, 2), default=Setting(1.1, 0.15, 2.0, 2, 5, 2, 2),
    loose=Setting(0.7, 0.5, 2.0, 0, 1, 1, 1),
    plain=Setting(None, 0.5, 1.0, 4, 10, 2, 2), strict_plain=Setting(None, 0.25, 1.5, 4, 10, 2, 2))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The study on the small images, with logistic regression in the place of the network: configuration and folder."""
    config = dataclasses.replace(SMALL, out=tmp_path_factory.mktemp("study") / "run")
    with pytest.MonkeyPatch.context() as patch:
        small = tuple(problem._replace(of=problem.setting(config)) for problem in PROBLEMS)
        patch.setattr(dp_sgd_mnist_protocol, "PROBLEMS", small)
        patch.setattr(dp_sgd_mnist, "classifier", small_model)
        dp_sgd_mnist.run(config, images)
        yield config, load_run(config.out)


def rows_of(run, name, metric, split, site="all"):
    rows = run.metrics
    return rows[(rows["arm"] == name) & (rows["metric"] == metric) & (rows["split"] == split) & (rows["site"] == site)]


@pytest.mark.slow
def test_all_settings_that_are_not_left_out_are_trained_for_their_steps(study):
    config, run = study
    assert {*run.metrics["arm"]} == {BY_FIELD[field].name(config) for field in ("strict", "default", "plain", "strict_plain")}
    for field, steps in {"strict": 20, "default": 10, "plain": 20, "strict_plain": 20}.items():
        made = rows_of(run, BY_FIELD[field].name(config), "steps", "round").groupby("seed")["value"].sum()
        assert made.tolist() == [steps] * 2 == [steps_of(BY_FIELD[field].setting(config), config, TRAIN)] * 2
    seeds = rows_of(run, BY_FIELD["strict"].name(config), "loss", "round").pivot(index="round", columns="seed", values="value")
    assert (seeds[0] != seeds[1]).all()


@pytest.mark.slow
def test_claims_are_judged_by_the_rows_and_by_the_ledger_of_the_run(study):
    config, run = study
    verdicts = {verdict.claim.claim: verdict for verdict in read_claims(run.path / "claims.json")}
    assert len(verdicts) == 7
    for field in ("strict", "default"):
        name, setting = BY_FIELD[field].name(config), BY_FIELD[field].setting(config)
        last = rows_of(run, name, "accuracy", "test")
        last = last[last["round"] == last["round"].max()]["value"]
        assert verdicts[f"{name}: test accuracy"].measured == pytest.approx(last.mean()) and len(last) == 2
        step = dp_accounting.PoissonSampledDpEvent(256 / TRAIN, dp_accounting.GaussianDpEvent(setting.noise))
        accountants = rdp.RdpAccountant(), pld.PLDAccountant()
        for accountant in accountants:
            accountant.compose(step, {"strict": 20, "default": 10}[field])
        by_rdp, by_pld = (accountant.get_epsilon(config.delta) for accountant in accountants)
        orders, divergences = np.asarray(accountants[0].orders), np.asarray(accountants[0].rdp)
        by_hand = min(r + math.log(1e5) / (a - 1) for a, r in zip(orders, divergences, strict=True) if a > 1)
        today, old = (verdicts[f"{name}: ε, {which} conversion"] for which in ("today's", "old"))
        assert today.measured == pytest.approx(by_rdp, rel=1e-6) and old.measured == pytest.approx(by_hand, rel=1e-9)
        assert by_pld < today.measured < old.measured and not today.holds
        rows = rows_of(run, name, "epsilon_record_rdp", "round", "worst").sort_values("round")
        assert rows["value"].iloc[-1] == pytest.approx(by_rdp, rel=1e-6) and rows["value"].is_monotonic_increasing
        assert rows_of(run, name, "epsilon_record_pld", "round", "worst")["value"].max() == pytest.approx(by_pld, rel=1e-3)
        summary = json.loads((run.path / "summary.json").read_text())["problems"][field]
        assert summary["epsilon_pld"] == pytest.approx([by_pld] * 2, rel=1e-3)
        assert summary["steps"] == [{"strict": 20, "default": 10}[field]] * 2
        shares = rows_of(run, name, "records_clipped", "round").groupby("seed")["value"].mean()
        assert summary["share_clipped"] == pytest.approx(shares.tolist()) and 0 < min(shares) < 1


@pytest.mark.slow
def test_plain_settings_promise_nothing_and_learn(study):
    config, run = study
    rows = run.metrics
    for field in ("plain", "strict_plain"):
        name = BY_FIELD[field].name(config)
        assert not rows[(rows["arm"] == name) & rows["metric"].str.contains("epsilon|clip")].size
        last = rows_of(run, name, "accuracy", "test")
        assert last[last["round"] == 2]["value"].min() > 0.6  # of four classes
    names = [verdict.claim.claim for verdict in read_claims(run.path / "claims.json")]
    assert names[6:] == ["no privacy, rate .5, 4 epochs: test accuracy"]


@pytest.mark.slow
def test_the_report_has_figures_and_says_what_epsilon_is_not_about(study):
    _, run = study
    for name in ("accuracy_over_epochs", "accuracy_over_epsilon"):
        assert (run.path / "figures" / f"{name}.png").stat().st_size > 20_000
    reading = " ".join(json.loads((run.path / "summary.json").read_text())["reading"])
    assert "Poisson" in reading and "Initial weights are not published" in reading and "by the old conversion" in reading


@pytest.mark.parametrize(("change", "words"), [
    (lambda: Setting(0.0, 0.1, 1.0, 1, 1, 1, 1), "noise must be above 0"),
    (lambda: Setting(1.0, 0.1, 1.0, 1, 0, 1, 1), "steps_per_round must be 1 or more"),
    (partial(Config, delta=1.0), "delta must lie between 0 and 1"),
    (partial(Config, batch=0), "batch and microbatch must be 1 or more"),
])
def test_a_setting_that_makes_no_sense_is_one_sentence(change, words):
    with pytest.raises(FlJaxError, match=words):
        change()


@pytest.mark.slow
def test_the_quick_form_reaches_its_bars(quick_form):
    verdicts = read_claims(quick_form("dp_sgd_mnist", "mnist") / "claims.json")
    assert len(verdicts) == 3 and not any(verdict.broken for verdict in verdicts), verdicts
