"""Studies of FLamby's protocol: where models start, how records are shared out, what arms do, and the published runs one by
one."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import fed_heart_disease, fed_tcga_brca
from experiments.flamby import study as flamby
from experiments.flamby.data import initial_params, stacked, torch_linear, variants_of_epochs, variants_of_rounds
from experiments.flamby.protocol import NOT_PASSED_ON, POOLED, Rates, centralized, local_only
from fl_jax import data, training
from fl_jax.data.standardize import pooled_statistics, standardize_features
from fl_jax.errors import FlJaxError
from fl_jax.results import load_run, read_claims
from fl_jax.types import Survival

pytestmark = pytest.mark.usefixtures("one_device")

FEATURES, SITES = 5, ("a", "b", "c")
SIZES = {"a": (12, 6), "b": (9, 8), "c": (7, 5)}  # training and test records
RATE = 0.05
RATES = Rates(RATE, RATE, 0.1, (RATE, 0.02), (RATE, 0.02), (RATE, 0.2), RATE, 0.01)


def federation(unseen=(), survival=False):
    """Three small sites that differ in their means."""
    rng = np.random.default_rng(0)
    site = np.repeat(np.arange(3), [sum(SIZES[name]) for name in SITES])
    test = np.concatenate([np.arange(sum(SIZES[name])) >= SIZES[name][0] for name in SITES])
    deviation = rng.normal(size=(len(site), FEATURES))
    x = (deviation + site[:, None]).astype(np.float32)
    risk = deviation @ rng.normal(size=FEATURES) + rng.normal(size=len(x))
    y = (risk > np.median(risk)).astype(np.int32)
    label = {"label": y, "num_classes": 0} if survival else {"num_classes": 2}
    outcome = Survival(np.exp(3 - risk / 4).astype(np.float32), rng.random(len(x)) < 0.7) if survival else y
    names = [f"f{k}" for k in range(FEATURES)]
    return data.from_arrays(
        x, outcome, site, test=test, validation=0.0, unseen=unseen, site_names=SITES, name="tiny", feature_names=names, **label)


PUBLISHED = {arm: (0.5, 0.6) for arm in ("FedAvg", "FedAdam", "FedYogi", "FedAdagrad", NOT_PASSED_ON, POOLED, "local a")}
HEART = dataclasses.replace(
    fed_heart_disease.PROTOCOL, load=federation, rates=RATES, published=PUBLISHED,
    load_pooled=lambda unseen: standardize_features(federation(unseen), pooled_statistics))
BRCA = dataclasses.replace(
    fed_tcga_brca.PROTOCOL, load=lambda unseen: federation(unseen, survival=True), rates=RATES, published=PUBLISHED)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The study with all of its arms on the small sites: its configuration and what it left behind."""
    config = fed_heart_disease.Config(
        seeds=2, rounds=2, updates=3, epochs=1, evaluate_every=1, out=tmp_path_factory.mktemp("study") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fed_heart_disease, "PROTOCOL", HEART)
        fed_heart_disease.run(config)
    return config, load_run(config.out)


def test_models_start_where_pytorch_starts():
    """Against torch 2.13, torch.manual_seed(seed) and torch.nn.Linear(n, 1)."""
    weight, bias = torch_linear(42, 39)
    np.testing.assert_allclose(weight[[0, 1, -1]], [0.12242414, 0.13290763, 0.01750516], atol=1e-7)
    np.testing.assert_allclose(bias, [-0.05050012], atol=1e-7)
    weight, bias = torch_linear(45, 13)
    np.testing.assert_allclose([*weight[[0, 1, -1]], *bias], [-0.17365026, 0.25589895, -0.04347088, -0.14569807], atol=1e-7)


def test_records_are_shared_out_to_all_without_one_together_and_alone():
    rounds = variants_of_rounds(HEART.load, True)
    whole, without_b = rounds[0].splits, rounds[2].splits
    assert [v.left_out for v in rounds] == ["", *SITES]
    assert whole.train.size.tolist() == [12, 9, 7] and whole.unseen.size.tolist() == [0]
    assert without_b.train.size.tolist() == [12, 0, 7] and without_b.unseen.size.tolist() == [17]
    assert without_b.test.size.tolist() == [6, 0, 5]
    np.testing.assert_array_equal(without_b.train.x[without_b.train.offset[2] :], whole.train.x[whole.train.offset[2] :])

    epochs = {(v.arm, v.left_out): v.splits for v in variants_of_epochs(rounds, HEART.load_pooled, SITES)}
    pooled, alone = epochs[POOLED, ""], epochs["local b", ""]
    assert alone.train.size.tolist() == [0, 9, 0] and pooled.train.size.tolist() == [28, 0, 0]
    np.testing.assert_allclose(pooled.train.x.mean(0), 0, atol=1e-6)  # one scale for all in training, but not in the test
    np.testing.assert_array_equal(pooled.test.x, whole.test.x)
    assert epochs[POOLED, "a"].train.size.tolist() == [16, 0, 0] and epochs[POOLED, "a"].unseen.size.tolist() == [18]

    both = stacked([whole, without_b])
    assert both.train.x.shape == (2, 28, FEATURES) and both.unseen.x.shape == (2, 17, FEATURES)
    np.testing.assert_array_equal(both.train.x[1, 19:], 0)


@pytest.mark.slow
def test_every_arm_site_and_left_out_site_is_in_the_rows_once(study):
    rows = study[1].metrics
    assert not rows.duplicated(["arm", "seed", "round", "split", "site", "metric"]).any()
    matched = [local_only(RATE), centralized(RATE)]
    local = [f"local {name}" for name in SITES]
    federated = [*RATES.of_sites()]
    assert {*rows["arm"]} == {*federated, NOT_PASSED_ON, *matched, POOLED, "pooled, own scales", *local}
    last = rows[(rows["metric"] == "accuracy") & (rows["split"] == "test") & rows["site"].isin(SITES)]
    assert last["value"].notna().all() and set(last["seed"]) == {42, 43}
    unseen = rows[(rows["metric"] == "accuracy") & (rows["split"] == "unseen")]
    assert unseen["value"].notna().all() and set(unseen["site"]) == {*SITES}
    assert {*unseen["arm"]} == {*federated, centralized(RATE), POOLED}
    curve = unseen[(unseen["arm"] == "FedAvg") & (unseen["seed"] == 42)]
    assert sorted(zip(curve["site"], curve["round"])) == [(name, r) for name in SITES for r in (1, 2)]


@pytest.mark.slow
def test_the_study_judges_its_claims_and_draws_its_figures(study):
    config, run = study
    verdicts = read_claims(run.path / "claims.json")
    assert [v.claim for v in verdicts] == HEART.claims(config) and [v.seeds for v in verdicts] == [2, 2] * 3
    rows = run.metrics
    mean = rows[(rows["arm"] == "FedAdam") & (rows["round"] == 2) & (rows["split"] == "test") & (rows["site"] == "mean")]
    assert verdicts[0].measured == pytest.approx(mean[mean["metric"] == "accuracy"]["value"].mean())
    assert {path.stem for path in (run.path / "figures").glob("*.png")} == {"published", "over_rounds", "per_site", "left_out"}
    assert json.loads((run.path / "summary.json").read_text())["published"]["FedAvg"] == [0.5, 0.6]


def fit_alone(dataset, protocol, config, arm, seed):
    """An arm on a data set as it is, without variants."""
    model = protocol.model(FEATURES)
    (chosen,) = [one for one in flamby.federated_arms(protocol, model, config) if one.name == arm]
    study = training.Study(
        model, data.stack([dataset]), dataset.site_names, dataset.unseen_names, config.rounds, config.rounds,
        metrics=protocol.metrics)
    runs = training.seeds_of([seed], stacked=True)._replace(hyper=initial_params(model, [seed], FEATURES))
    return training.fit(study, [chosen], [seed], runs)[arm]


@pytest.mark.slow
def test_leaving_a_site_out_is_training_without_it(study):
    config, run = study
    alone = fit_alone(HEART.load(("c",)), HEART, config, "FedAdagrad", 43).rows
    (expected,) = alone[(alone["split"] == "unseen") & (alone["metric"] == "auroc")]["value"]
    found = run.metrics[(run.metrics["arm"] == "FedAdagrad") & (run.metrics["split"] == "unseen") & (run.metrics["site"] == "c")]
    (value,) = found[(found["metric"] == "auroc") & (found["round"] == config.rounds) & (found["seed"] == 43)]["value"]
    assert value == pytest.approx(expected, abs=1e-6)


def test_fedadams_first_step_is_flambys():
    """From m = .1 d and v = .001 d^2 without bias correction, where d is what FedAvg would do: a step of the same size
    everywhere."""
    config = fed_heart_disease.Config(seeds=1, rounds=1, updates=3, matched=False)
    start = initial_params(HEART.model(FEATURES), [42], FEATURES)
    averaged, adapted = (fit_alone(federation(), HEART, config, arm, 42).state.shared.params for arm in ("FedAvg", "FedAdam"))
    for before, mean, after in zip(*map(jax.tree.leaves, (start, averaged, adapted)), strict=True):
        change = np.asarray(mean - before, np.float64)
        step = 0.02 * 0.1 * change / (np.sqrt(0.001) * np.abs(change) + 1e-8)
        np.testing.assert_allclose(after, before + step, atol=1e-6)


@pytest.mark.slow
def test_survival_goes_the_same_way(tmp_path, monkeypatch):
    monkeypatch.setattr(fed_tcga_brca, "PROTOCOL", dataclasses.replace(BRCA, bars={"FedAdam": 0.02}))
    monkeypatch.setattr(flamby, "federated_arms", lambda *args, all_arms=flamby.federated_arms: [
        arm for arm in all_arms(*args) if arm.name in ("FedAvg", "FedAdam", "cyclic", NOT_PASSED_ON)])
    config = fed_tcga_brca.Config(seeds=1, rounds=1, updates=2, epochs=1, matched=False, leave_out=False, out=tmp_path / "run")
    fed_tcga_brca.run(config)
    run = load_run(config.out)
    tests = run.metrics[(run.metrics["split"] == "test") & (run.metrics["metric"] == "c_index")]
    assert tests["value"].between(0, 1).all() and set(tests["site"]) == {*SITES, "all", "mean", "worst", "std"}
    verdicts = read_claims(run.path / "claims.json")
    assert [v.claim.expected for v in verdicts] == [False, True]
    assert not (run.path / "figures" / "left_out.png").exists()


def test_a_study_of_nothing_is_one_sentence():
    with pytest.raises(FlJaxError, match="seeds must be 1 or more, and is 0"):
        fed_heart_disease.Config(seeds=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, arms", [(fed_heart_disease, {"FedAvg": 0.01, "FedAdam": 0.01}), (fed_tcga_brca, {"FedAdagrad": 0.03})],
    ids=["heart disease", "TCGA-BRCA"])
def test_the_published_runs_come_out_one_by_one(published_data, module, arms):
    """A run that starts where a published one starts ends where that ended, though its batches come in another order."""
    protocol, config = module.PROTOCOL, dataclasses.replace(module.Config(), seeds=5, leave_out=False)
    load = getattr(data, protocol.name)
    folder = published_data(protocol.name)
    protocol = dataclasses.replace(protocol, load=lambda unseen: load(unseen=unseen, data_dir=folder))
    dataset = protocol.load(())
    model = protocol.model(dataset.train.x.shape[1])
    chosen = [arm for arm in flamby.federated_arms(protocol, model, config) if arm.name in arms]
    fits = flamby.train(protocol, model, variants_of_rounds(protocol.load, False), chosen, dataset, config, config.rounds)
    for arm, fit in zip(chosen, fits, strict=True):
        rows = fit.rows[(fit.rows["site"] == "mean") & (fit.rows["metric"] == protocol.metric)]
        found = rows[rows["round"] == config.rounds].sort_values("seed")["value"].to_numpy()
        assert jnp.abs(found - np.asarray(protocol.published[arm.name])).max() < arms[arm.name], found
