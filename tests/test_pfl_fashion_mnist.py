"""PFLlib's comparison on Fashion-MNIST: how images are dealt, which arms run with which settings, what counts and is claimed."""

import dataclasses
import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from experiments import pfl_fashion_mnist
from experiments.common import cli, mnist
from experiments.pfl_fashion_mnist_protocol import (
    ARMS,
    CENTRAL,
    DITTO,
    FEDAVG,
    FEDPER,
    FEDREP,
    HEAD,
    LOCAL,
    ON_GPU,
    PFEDME,
    PUBLISHED,
    TUNED,
    Config,
    arm_of,
    claims,
    federation,
    network,
    stated,
    unmeasured,
)
from experiments.pfl_fashion_mnist_report import PRIOR, Measured, overview, reading
from fl_jax import algorithms, sampling, training
from fl_jax.data import FederatedDataset, Records, Source
from fl_jax.errors import FlJaxError
from fl_jax.results import MetricRow, claims_table, frame, load_run, read_claims

pytestmark = pytest.mark.usefixtures("one_device")

SMALL = Config(share=1.0, rounds=4, evaluate_every=2, seeds=2, clients=4, alpha=1.0, batch_size=5, rate=0.005)
PUBLISHED_FORM = cli.parse(Config, ON_GPU)


class Small(nn.Module):
    """Two dense layers, whose last has the name of the published network's."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x.reshape(x.shape[0], -1))))


def images(split):
    """Three classes, each with a bright third; 200 images for training and 80 for testing, numbered in their last two pixels."""
    first, count = {"train": (0, 200), "test": (200, 80)}[split]
    rng = np.random.default_rng(first)
    y = rng.permutation(np.arange(count) % 3).astype(np.int32)
    bright = np.arange(28) * 3 // 28 == y[:, None]
    x = (rng.integers(0, 220, (count, 28, 28, 1)) + 35 * bright[:, :, None, None]).astype(np.uint8)
    number = first + np.arange(count)
    x[:, 27, 26, 0], x[:, 27, 27, 0] = number // 200, number % 200
    return Source("thirds", x, y, tuple("abc"), (), ())


def numbers(records):
    """The number of every image."""
    return records.x[:, 27, 26, 0].astype(int) * 200 + records.x[:, 27, 27, 0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The study on the small images: its configuration and what it left behind."""
    known, compile_arms = [], training.compile_arms

    def once(*given):
        known.extend(known or [compile_arms(*given)])
        return known[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pfl_fashion_mnist, "network", lambda: mnist.classifier(Small(), pixels=mnist.centred_pixels))
        patch.setattr(training, "compile_arms", once)
        arms = (FEDAVG, TUNED, LOCAL, DITTO)
        config = dataclasses.replace(SMALL, arms=arms, ditto_strength=0.0, out=tmp_path_factory.mktemp("study") / "run")
        pfl_fashion_mnist.run(config, images)
        before = (config.out / "metrics.csv").read_bytes()
        pfl_fashion_mnist.run(dataclasses.replace(config, resume=True), images)
        assert (config.out / "metrics.csv").read_bytes() == before
    return config, load_run(config.out)


def test_the_network_is_the_published_one_and_its_head_the_last_layer():
    model = network()
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0)).params)
    assert sum(leaf.size for leaf in shapes.values()) == 582_026
    heads = {path: leaf.shape for path, leaf in shapes.items() if HEAD(("params", *path), object)}
    assert heads == {("Dense_1", "kernel"): (512, 10), ("Dense_1", "bias"): (10,)}
    x = np.arange(256, dtype=np.uint8)
    np.testing.assert_allclose(mnist.centred_pixels(x), (x / 255 - 0.5) / 0.5, atol=1e-6)  # torchvision's Normalize((.5,), (.5,))


def test_training_and_test_images_are_merged_dealt_whole_and_split_at_each_client():
    config = dataclasses.replace(SMALL, share=0.75)
    dataset, other, again = (federation(config, images, seed) for seed in (0, 1, 0))
    train, test = numbers(dataset.train), numbers(dataset.test)
    dealt = np.concatenate([train, test])
    assert len(dealt) == len({*dealt}) == 210 and len(dataset.validation.y) == 0
    for part in (train, test):  # of the official training and of the official test images
        assert 0.5 < np.mean(part < 200) / (200 / 280) < 1.5
    known = np.concatenate([images("train").y, images("test").y])
    np.testing.assert_array_equal(known[train], dataset.train.y)
    sizes = dataset.train.sizes + dataset.test.sizes
    assert sizes.min() >= config.least(210) == 20 and dataset.num_sites == 4
    np.testing.assert_allclose(dataset.test.sizes / sizes, 0.25, atol=0.5 / sizes.min() + 1e-9)
    np.testing.assert_array_equal(dataset.train.x, again.train.x)
    assert {*dealt} != {*numbers(other.train), *numbers(other.test)}


def test_every_client_has_a_batch_for_testing_unless_there_are_too_few_images():
    assert Config().least(70_000) == 40 and Config().least(800) == 20


def test_the_arms_have_the_settings(monkeypatch):
    calls = {}

    def noted(name):
        def build(*given, **options):
            calls[name] = (given, options)
            return original[name](*given, **options)

        return build

    original = {name: getattr(algorithms, name) for name in ("ditto", "pfedme", "fedper", "fedrep", "fedavg_tuned")}
    for name in original:
        monkeypatch.setattr(algorithms, name, noted(name))
    config, model = Config(lanes=3), network()
    built = {name: arm_of(name, config, model).build(()) for name in ARMS}
    assert {*built} == {*config.arms}
    steps = {name: int(calls[name][0][2].steps(np.int32(95))) for name in ("ditto", "fedper", "fedrep", "fedavg_tuned")}
    assert steps == {"ditto": 10, "fedper": 10, "fedrep": 20, "fedavg_tuned": 10}
    assert int(calls["fedavg_tuned"][0][3].steps(np.int32(95))) == 10 and calls["ditto"][0][3] == 0.1
    given = calls["pfedme"][1]
    assert (given["strength"], given["inner_steps"], given["inner_rate"], given["rate"]) == (15.0, 5, 0.01, 0.005)
    assert int(calls["pfedme"][0][1].steps(np.int32(95))) == 10 and "beta" not in given  # 1 is its default
    for (given, options), head in ((calls["fedper"], 3), (calls["fedrep"], 3)):
        assert given[head] is HEAD and options["engine"].lanes == 3
    gradient = {"w": np.ones(1, np.float32)}
    sgd = calls["ditto"][0][1]
    np.testing.assert_allclose(sgd.update(gradient, sgd.init(gradient))[0]["w"], -0.005)


@pytest.mark.slow
def test_what_is_written_is_what_the_rows_say(finished):
    config, run = finished
    rows = run.metrics[(run.metrics["metric"] == "accuracy") & (run.metrics["split"] == "test")]
    assert {*rows["arm"]} == {*config.arms} and {*rows["round"]} == {2, 4}
    together = rows[rows["site"] == "all"].pivot_table(index=["arm", "seed"], values="value", aggfunc="max")["value"]
    verdicts = {verdict.claim.claim: verdict for verdict in read_claims(run.path / "claims.json")}
    assert [*verdicts] == [claim.claim for claim in claims(config)]
    verdict = verdicts["Ditto minus FedAvg"]
    assert verdict.measured == pytest.approx((together[DITTO] - together[FEDAVG]).mean()) and verdict.seeds == 2
    assert 0.34 < together[FEDAVG].mean() < 0.95  # neither chance nor perfection would tell the arms apart
    for arm in config.arms:
        assert run.summary["arms"][arm]["best"] == pytest.approx(together[arm].to_list())
    for claim in unmeasured(config):
        verdict = verdicts[claim.claim]
        assert verdict.holds is None and verdict.measured is None and "--rounds 2000 --share 1" in verdict.cause
    assert len(unmeasured(config)) == 3
    assert {path.stem for path in (run.path / "figures").glob("*.png")} == {"accuracy_over_rounds", "accuracy_of_clients"}
    assert not any("nan" in sentence for sentence in run.summary["reading"])


@pytest.mark.slow
def test_ditto_without_a_pull_is_training_alone_and_fine_tuning_comes_after_the_rounds(finished):
    _, run = finished
    rows = run.metrics.set_index(["arm", "seed", "round", "split", "site", "metric"]).sort_index()["value"]
    test = rows[rows.index.get_level_values("split") == "test"]
    np.testing.assert_array_equal(test[DITTO], test[LOCAL])
    assert not np.array_equal(test[FEDAVG], test[TUNED])
    np.testing.assert_array_equal(rows[FEDAVG].xs("loss", level="metric"), rows[TUNED].xs("loss", level="metric"))
    assert (rows[LOCAL].xs("bytes_up", level="metric") == 0).all() and (rows[FEDAVG].xs("bytes_up", level="metric") > 0).all()


def test_centralized_training_makes_the_steps_of_all_clients_and_everybody_takes_part():
    dataset, key = federation(SMALL, images, 0), jax.random.key(0)
    splits = dataset.device()
    arms = {name: arm_of(name, SMALL, network()) for name in (FEDAVG, CENTRAL)}
    cohorts = {name: arm.sampling(splits.train).draw(key, np.int32(0), splits.train) for name, arm in arms.items()}
    assert int(cohorts[CENTRAL].steps[0]) == sum(-(-size // 5) for size in dataset.train.sizes) and len(cohorts[CENTRAL].ids) == 1
    assert cohorts[FEDAVG].ids.tolist() == [0, 1, 2, 3] and cohorts[FEDAVG].steps.tolist() == [sampling.ALL_STEPS] * 4
    np.testing.assert_array_equal(cohorts[FEDAVG].weight, dataset.train.sizes)
    pooled = arms[CENTRAL].view(splits)
    assert pooled.train.size.tolist() == [len(dataset.train.y)] and pooled.test.size.tolist() == dataset.test.sizes.tolist()


def hand_made():
    """Two arms beside FedAvg, two seeds of two clients, three measurements; seed 0 is best in round 2 with FedAvg, 3 Ditto."""
    config = Config(rounds=3, evaluate_every=1, seeds=2, clients=2, arms=(FEDAVG, DITTO, LOCAL))
    of = {
        FEDAVG: [[(0.5, 0.3), (0.6, 0.4), (0.6, 0.2)], [(0.7, 0.5), (0.2, 0.2), (0.7, 0.5)]],
        DITTO: [[(0.5, 0.3), (0.7, 0.7), (0.9, 0.7)], [(0.9, 0.4), (0.2, 0.2), (0.3, 0.3)]],
        LOCAL: [[(0.8, 0.8)] * 3, [(0.7, 0.5)] * 3]}
    rows = []
    for arm, seeds in of.items():
        for seed, rounds in enumerate(seeds):
            for r, (first, second) in enumerate(rounds, start=1):
                # client 1 has three times as many test images
                found = {"client 1": first, "client 2": second, "all": (3 * first + second) / 4, "worst": min(first, second),
                         "std": abs(first - second) / 2, "mean": (first + second) / 2}
                rows += [MetricRow(arm, seed, r, "test", site, "accuracy", value) for site, value in found.items()]
    # of client 1 and 2: 4 + 2 for training, 6 + 2 for testing
    labels = np.array([0, 0, 1, 1, 1, 2]), np.array([0, 0, 0, 1, 1, 1, 1, 2])
    x = np.zeros((8, 1), np.float32)
    dataset = FederatedDataset(
        "small", Records(x[:6], labels[0], np.array([0, 4, 6])), Records(x[:0], labels[0][:0], np.zeros(3, int)),
        Records(x, labels[1], np.array([0, 6, 8])), Records(x[:0], labels[0][:0], np.zeros(1, int)), ("client 1", "client 2"),
        num_classes=3)
    return config, Measured(config, [dataset, dataset], frame(rows))


def test_the_best_measurement_of_each_run_counts():
    _, measured = hand_made()
    np.testing.assert_array_equal(measured.rounds(FEDAVG), [2, 1])
    np.testing.assert_array_equal(measured.rounds(DITTO), [3, 1])
    np.testing.assert_allclose(measured.values(FEDAVG), [0.55, 0.65])
    np.testing.assert_allclose(measured.values(DITTO), [0.85, 0.775])
    np.testing.assert_allclose(measured.values(DITTO, "worst"), [0.7, 0.4])
    np.testing.assert_allclose(measured.last(DITTO), [0.85, 0.3])
    np.testing.assert_allclose(measured.clients(DITTO), [[0.9, 0.7], [0.9, 0.4]])
    np.testing.assert_allclose(measured.difference(DITTO), [0.3, 0.125])
    assert measured.gain(DITTO).mean == pytest.approx(0.2125) and measured.gain(LOCAL, DITTO).mean == pytest.approx(-0.0875)
    assert measured.losers(DITTO) == 0.25 and measured.losers(LOCAL) == 0  # as good is not worse


def test_what_a_clients_classes_alone_tell():
    _, measured = hand_made()
    # client 1 trains on 0, 0, 1, 1, of which the first counts, and tests on three of 0; client 2 trains on 1, 2 and tests on 1, 2
    np.testing.assert_allclose(measured.prior, [[0.5, 0.5]] * 2)
    np.testing.assert_allclose(measured.prior_together, [0.5, 0.5])
    text = overview(measured).text(200)
    assert PRIOR in text and ".812 ± " in text
    sentences = [*reading(measured)]
    assert "At least 9 points above FedAvg: Ditto in every seed." in sentences
    assert any(sentence.startswith("Guessing a client's most frequent class") and "is right in .500" in sentence
               for sentence in sentences)


def test_claims_are_the_published_ones_in_the_published_form_and_else_not_run():
    full, quick = Config(), Config.quick_defaults()
    assert PUBLISHED_FORM.is_published and not full.is_published and not unmeasured(quick) and not unmeasured(PUBLISHED_FORM)
    assert not any(dataclasses.replace(PUBLISHED_FORM, **less).is_published for less in ({"share": 0.5}, {"rounds": 1999}))
    long = {claim.claim: claim for claim, _ in stated(PUBLISHED_FORM)}
    assert {claim.claim for claim in unmeasured(full)} == {*long} and len(long) == 9
    assert not long["FedAvg, 2,000 rounds"].admits(0.838) and long["FedAvg, 2,000 rounds"].admits(0.839)
    assert not long["FedAvg, 2,000 rounds"].admits(0.879)
    for arm in (DITTO, FEDPER, FEDREP, PFEDME):
        assert long[f"{arm}, 2,000 rounds"].published == PUBLISHED[arm]
        assert long[f"{arm}, 2,000 rounds"].admits(0.9651) and not long[f"{arm}, 2,000 rounds"].admits(0.9649)
        gap = long[f"{arm} minus FedAvg, 2,000 rounds"]
        assert gap.admits(0.0901) and not gap.admits(0.0899)
    assert all(claim.quick for claim in claims(quick)) and not any(claim.quick for claim in claims(full))
    assert {*map(str, claims(full))} > {str(claim) for claim in unmeasured(full)}
    without = dataclasses.replace(full, arms=(FEDAVG, FEDPER))
    assert not any(arm in claim.claim for claim in claims(without) for arm in (DITTO, FEDREP, PFEDME))


def test_claims_measure_what_they_say():
    config, measured = hand_made()
    found = {claim.claim: law(measured) for claim, law in stated(dataclasses.replace(config, rounds=Config().rounds, share=Config().share))}
    np.testing.assert_allclose(found["Ditto minus FedAvg"], [0.3, 0.125])
    np.testing.assert_allclose(found["Ditto"], [0.85, 0.775])
    np.testing.assert_allclose(found["FedAvg"], [0.55, 0.65])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"share": 0.0}, "share must be above 0 and at most 1"), ({"test": 0.95}, "test must be above 0 and at most 0.9"),
     ({"arms": (DITTO,)}, "FedAvg among them"), ({"arms": (FEDAVG, FEDAVG)}, "each once"),
     ({"arms": (FEDAVG, "Dittto")}, "arms must be some of"), ({"lanes": 0}, "lanes must be 1 or more")])
def test_mistakes_are_one_sentence(changes, sentence):
    with pytest.raises(FlJaxError, match=sentence):
        dataclasses.replace(SMALL, **changes)


@pytest.mark.slow
def test_the_quick_form_holds(quick_form):
    folder = quick_form("pfl_fashion_mnist", "fashion_mnist")
    verdicts = read_claims(folder / "claims.json")
    assert len(verdicts) == 2 and all(verdict.claim.quick for verdict in verdicts)
    assert all(verdict.holds for verdict in verdicts), claims_table(verdicts).text(120)
    assert json.loads((folder / "summary.json").read_text())["arms"][FEDPER]["best"]
