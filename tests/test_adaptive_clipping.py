"""The study of adaptive clipping: what a user pays, what chooses the rates and what runs with them, that claims are the rows'."""

import dataclasses
import json
from functools import partial

import dp_accounting
import numpy as np
import optax
import pytest
from dp_accounting import rdp

from experiments import adaptive_clipping
from experiments.adaptive_clipping import Config, Rates, measure, partition
from experiments.adaptive_clipping_protocol import CLIENT, FIXED, MEDIAN, PLAIN, SERVER, bounds, claims
from experiments.common import mnist, rate_grid
from fl_jax import aggregators, algorithms, batches, models, sampling, training
from fl_jax.data import Source
from fl_jax.errors import FlJaxError
from fl_jax.privacy import Accountant
from fl_jax.results import Direction, load_run, read_claims, select

pytestmark = pytest.mark.usefixtures("one_device")

CLASSES = 3
SIMPLE = models.LogisticRegression(10)
SMALL = Config(
    users=24, rate=0.25, capacity=4.0, batch_size=5, hidden=8, rounds=5, evaluate_every=5, epsilon=8.0, delta=1e-2,
    clips=(0.05, 0.2, 5.0), count_noise=0.5, client_rates=(0.02, 0.1), plain_rates=(0.1, 1.0), server_rates=(0.1, 1.0),
    validation=0.25, seeds=2, tuning_seeds=2, settled=2)


def images(split):
    """Each class has a bright third, 240 images for training and 90 for testing."""
    rng = np.random.default_rng({"train": 0, "test": 1}[split])
    y = rng.permutation(np.arange({"train": 240, "test": 90}[split]) % CLASSES).astype(np.int32)
    bright = np.arange(28) * CLASSES // 28 == y[:, None]
    x = rng.integers(0, 40, (len(y), 28, 28, 1)) + 60 * bright[:, :, None, None]
    return Source("thirds", x.astype(np.uint8), y, tuple("abc"), (), ())


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled():
    """One device instead of eight, and a model of one layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaptive_clipping.models, "TwoNN", lambda hidden: SIMPLE)
        yield


@pytest.fixture(scope="module")
def run_study():
    """(configuration) -> runs the study on the small images, with programs that are compiled once: its choices are the same."""
    known, compile_arms = {}, training.compile_arms

    def remembered(study, arms, runs, bar):
        key = " ".join(arm.name for arm in arms)
        if key not in known:
            known[key] = compile_arms(study, arms, runs, bar)
        return known[key]

    def run(config):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "compile_arms", remembered)
            adaptive_clipping.run(config, images)

    return run


@pytest.fixture(scope="module")
def finished(run_study, tmp_path_factory):
    """The study on the small images: its configuration and run folder."""
    config = dataclasses.replace(SMALL, out=tmp_path_factory.mktemp("study") / "run")
    run_study(config)
    return config, load_run(config.out)


@pytest.fixture(scope="module")
def given():
    """The rows of rates that are given: two small clips whose product with their rates is the same, and a large one."""
    config = dataclasses.replace(SMALL, clips=(1e-4, 1e-3, 2.0), client_rates=(0.1,), chosen=(100.0, 10.0, 0.3, 0.5, 0.7))
    model = mnist.classifier(SIMPLE)
    rates, tried = adaptive_clipping.tune(config, model, images)
    assert tried == {} and rates == Rates(0.1, dict(zip([*bounds(config), PLAIN], config.chosen, strict=True)))
    return config, model, *measure(config, model, rates, images)


def values(metrics, arm, metric="accuracy", split="test", site="all", rounds=(5,)):
    """float64[S], seeds ascending: the mean over these rounds."""
    rows = select(metrics, metric, split, site, [arm])
    return rows[rows["round"].isin(rounds)].groupby("seed")["value"].mean().to_numpy()


def test_a_user_pays_the_budget_by_an_independent_account():
    config = Config()
    for noise in (config.noise, (config.adaptive.multiplier(config.noise) ** -2 + (2 * 5.0) ** -2) ** -0.5):
        accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(noise)), 100)
        assert 1.99 < accountant.get_epsilon(1e-5) <= 2.0  # a capacity of 200 cuts a sample less than once in 10^20
    assert config.adaptive.multiplier(config.noise) > config.noise > 1
    assert config.cohort == 100 and config.rounds == 100 and config.count_noise * config.cohort == 5  # m / 20


@pytest.mark.slow
def test_every_bound_pays_the_same(finished, given):
    config, run = finished
    for name in bounds(config):
        paid = values(run.metrics, name, "epsilon_client_rdp", "round")
        np.testing.assert_allclose(paid, config.epsilon, rtol=1e-3)
        assert (paid <= config.epsilon).all()
    assert "epsilon_client_rdp" not in {*run.metrics[run.metrics["arm"] == PLAIN]["metric"]}
    _, _, _, ledgers = given
    assert ledgers[FIXED] == ledgers[MEDIAN]
    assert ledgers[MEDIAN].epsilon(config.delta, Accountant.PLD) <= ledgers[MEDIAN].epsilon(config.delta)


@pytest.mark.slow
def test_the_claims_are_the_numbers_of_the_rows(finished):
    config, run = finished
    verdicts = {verdict.claim.claim: verdict for verdict in read_claims(run.path / "claims.json")}
    assert [*verdicts] == [claim.claim for claim in claims(config)] and len(verdicts) == 6
    fixed = {name: values(run.metrics, name) for name in bounds(config)[:-1]}
    order = sorted(fixed, key=lambda name: fixed[name].mean())
    median = values(run.metrics, MEDIAN)
    by_validation = run.summary["chosen_fixed"]
    assert run.summary["arms"][by_validation]["grid"] and by_validation in fixed
    of_grids = {name: max(np.mean(point["validation"]) for point in run.summary["arms"][name]["grid"]) for name in fixed}
    assert of_grids[by_validation] == max(of_grids.values())
    paid = np.stack([values(run.metrics, name, "epsilon_client_rdp", "round") for name in bounds(config)])
    expected = {
        "median bound minus the best fixed clip": median - fixed[order[-1]],
        "median bound minus the fixed clip that validation images choose": median - fixed[by_validation],
        "median bound minus the worst fixed clip": median - fixed[order[0]],
        "largest epsilon of a user, of 8 at delta 0.01": paid.max(0), "least epsilon of a user, of 8 at delta 0.01": paid.min(0),
        "share of updates cut by the median bound after round 2": values(
            run.metrics, MEDIAN, "clipped", "round", rounds=(3, 4, 5)),
    }
    assert {*expected} == {*verdicts}
    for text, measured in expected.items():
        assert verdicts[text].measured == pytest.approx(measured.mean(), abs=1e-9) and verdicts[text].seeds == 2
        assert verdicts[text].holds == verdicts[text].claim.admits(measured.mean())


@pytest.mark.slow
def test_rates_are_the_best_on_validation_images(finished):
    config, run = finished
    arms = run.summary["arms"]

    def grid(name, axes):
        return {tuple(point.values()): values(run.metrics, f"{name}{rate_grid.suffix(point)}", split="validation").mean()
                for point in rate_grid.points(axes)}

    plain = grid(f"grid of {PLAIN}", {CLIENT: config.client_rates, SERVER: config.plain_rates})
    assert (run.summary["client_rate"], arms[PLAIN]["server_rate"]) == max(plain, key=plain.__getitem__)
    for name in bounds(config):
        scores = grid(f"grid of {name}", {SERVER: config.server_rates})
        assert len(scores) == len(config.server_rates) and (arms[name]["server_rate"],) == max(scores, key=scores.__getitem__)
        assert [np.mean(point["validation"]) for point in arms[name]["grid"]] == pytest.approx([*scores.values()])


@pytest.mark.slow
def test_tuning_measures_no_test_image_and_the_results_no_validation_image(finished):
    _, run = finished
    rows = run.metrics[run.metrics["metric"] == "accuracy"]
    of_grid = rows["arm"].str.startswith("grid of ")
    assert rows[of_grid & (rows["split"] == "test")]["value"].isna().all() and of_grid.any()
    assert rows[~of_grid & (rows["split"] == "validation")]["value"].isna().all()
    assert {*rows[of_grid]["seed"]} == {1000, 1001} and {*rows[~of_grid]["seed"]} == {0, 1}
    assert not rows.duplicated(["arm", "seed", "round", "split", "site"]).any()


@pytest.mark.slow
def test_each_row_has_its_own_clip_and_rate(given):
    config, _, metrics, _ = given
    for name, clip in zip(bounds(config)[:-1], config.clips, strict=True):
        np.testing.assert_allclose(select(metrics, "clip", "round", "all", [name])["value"], clip, rtol=1e-6)
    moved = select(metrics, "clip", "round", "all", [MEDIAN]).pivot(index="round", columns="seed", values="value")
    np.testing.assert_allclose(moved.loc[1], config.initial)
    assert (moved.nunique() == config.rounds).all() and not np.allclose(moved[0], moved[1])
    # where every update is cut, only the product of clip and rate counts
    one, other = bounds(config)[:2]
    for name in (one, other):
        assert (select(metrics, "clipped", "round", "all", [name])["value"] == 1).all()
    np.testing.assert_allclose(
        *(values(metrics, name, "update_norm", "round", rounds=range(1, 6)) for name in (one, other)), rtol=1e-4)
    np.testing.assert_allclose(values(metrics, one), values(metrics, other), atol=0.02)  # of 90 images
    assert not np.allclose(*(values(metrics, name, "update_norm", "round") for name in (one, bounds(config)[2])), rtol=0.1)


@pytest.mark.slow
def test_the_arms_are_dp_fedavg_with_server_momentum_and_fedavgm(given):
    """Restated with numbers where the study has rows of a program."""
    config, model, metrics, _ = given
    federations = [mnist.to_measure(images, partial(partition, config), seed) for seed in range(2)]
    work, server = batches.epochs(1, 5), partial(optax.sgd, momentum=0.9)
    private = aggregators.private_mean(2.0, config.noise, 6.0)
    arms = [
        training.Arm(name, lambda _, rate=rate, mean=mean: algorithms.fedavg(
            model, optax.sgd(0.1), work, server=server(rate), aggregator=mean), poisson)
        for name, rate, mean in (("clip", 0.3, private), ("plain", 0.7, aggregators.mean()))]
    fits = training.fit(
        adaptive_clipping.study_of(config, model, federations), arms, [0, 1], training.seeds_of([0, 1], stacked=True))
    for name, own in (("clip", bounds(config)[2]), ("plain", PLAIN)):
        for metric in ("update_norm", "participants", "loss"):
            rows = (select(found, metric, "round", "all", [arm])["value"]
                    for found, arm in ((fits[name].rows, name), (metrics, own)))
            np.testing.assert_allclose(*rows, rtol=2e-3)


def poisson(sites):
    return sampling.poisson(0.25, 24)


def test_users_have_digits_of_their_own_unless_dealt_by_chance():
    labels = np.arange(6000) % 10
    for skew in (True, False):
        owner = partition(dataclasses.replace(Config(), users=100, skew=skew), np.random.default_rng(0), labels)
        counts = np.stack([np.bincount(labels[owner == user], minlength=10) for user in range(100)])
        assert (counts.sum(1) == 60).all()
        # the expected sum of squared shares: (1 + .5) / (1 + 5) with Dir(.5, ...), 1 / 10 by chance, and the noise of 60 draws
        concentration = ((counts / 60) ** 2).sum(1).mean()
        assert concentration == pytest.approx(0.25 + 0.75 / 60 if skew else 0.1 + 0.9 / 60, abs=0.03)


def test_the_claims_of_the_full_and_the_quick_form():
    full, quick = claims(Config()), claims(Config.quick_defaults())
    assert len(full) == 6 and not any(claim.quick for claim in full)
    strict, by_validation = full[:2]
    for claim in strict, by_validation:
        assert claim.direction is Direction.AT_LEAST and claim.admits(-0.0099) and not claim.admits(-0.0101)
    assert full[3].admits(2.0) and not full[3].admits(2.0001) and full[4].admits(1.99) and not full[4].admits(1.9899)
    assert full[5].admits(0.45) and not full[5].admits(0.56)
    assert [claim.quick for claim in quick] == [True, True, False, False, True]
    assert not quick[0].admits(-0.06) and not quick[1].admits(0.02) and not quick[4].admits(0.61)
    config = Config.quick_defaults()
    for rate in config.chosen[:-1]:
        assert any(np.isclose(rate, known) for known in Config().server_rates)
    assert {*config.clips} < {*Config().clips} and config.client_rates[0] in Config().client_rates
    assert config.chosen[-1] in Config().plain_rates


@pytest.mark.slow
def test_what_is_left_behind_is_complete_and_a_finished_study_is_resumed_as_it_is(finished, run_study):
    config, run = finished
    assert {path.stem for path in (run.path / "figures").glob("*.png")} == {
        "accuracy_by_clip", "bound_over_rounds", "accuracy_over_rounds"}
    assert not any("nan" in sentence for sentence in run.summary["reading"])
    rows, verdicts = (run.path / "metrics.csv").read_bytes(), (run.path / "claims.json").read_text()
    run_study(dataclasses.replace(config, resume=True))
    assert (run.path / "metrics.csv").read_bytes() == rows and (run.path / "claims.json").read_text() == verdicts


def test_settings_that_make_no_sense_are_one_sentence():
    for changes, words in (
        ({"settled": 5}, "settled must be a round before the last"), ({"clips": (1.0, 0.1)}, "clips must be two or more"),
        ({"chosen": (1.0,)}, "chosen must have 5 server rates"), ({"validation": 1.0}, "validation must be between"),
        ({"seeds": 0}, "seeds must be 1 or more")):
        with pytest.raises(FlJaxError, match=words):
            dataclasses.replace(SMALL, **changes)


@pytest.mark.slow
def test_the_quick_form_holds(quick_form):
    folder = quick_form("adaptive_clipping", "mnist")
    verdicts = read_claims(folder / "claims.json")
    assert len(verdicts) == 5 and all(verdict.holds for verdict in verdicts), verdicts
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["arms"][PLAIN]["test"]["mean"] > 0.95  # ten classes, without privacy
