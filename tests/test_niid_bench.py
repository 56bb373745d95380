"""NIID-Bench: which images are dealt how, the arms' settings, what counts and is claimed, a small run of two cells."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import niid_bench
from experiments.common import cli, mnist
from experiments.niid_bench_protocol import (
    ARMS,
    CENTRAL,
    FEDAVG,
    FEDNOVA,
    FEDPROX,
    IMAGES,
    LOCAL,
    ON_GPU,
    PARTITIONS,
    PUBLISHED,
    SCAFFOLD,
    Cell,
    Config,
    Given,
    arm_of,
    claims,
    federation,
    label,
    stated,
    unmeasured,
)
from experiments.niid_bench_report import Measured
from fl_jax import algorithms, batches
from fl_jax.core import Engine
from fl_jax.data import Source
from fl_jax.errors import FlJaxError
from fl_jax.results import MetricRow, claims_table, frame, load_run, read_claims

pytestmark = pytest.mark.usefixtures("one_device")

SMALL = Config(share=0.5, rounds=2, clients=4, epochs=2, batch_size=8, rate=0.05, seeds=2, arms=(FEDAVG, SCAFFOLD, LOCAL, CENTRAL))
CELL = Cell("fashion_mnist", "dirichlet")
PUBLISHED_FORM = cli.parse(Config, ON_GPU)


def images(split):
    """Two classes, each with a bright half; numbered in their last two pixels."""
    first, count = {"train": (0, 240), "test": (240, 80)}[split]
    rng = np.random.default_rng(first)
    y = rng.permutation(np.arange(count) % 2).astype(np.int32)
    x = rng.integers(0, 150, (count, 28, 28, 1)) + 60 * ((np.arange(28) < 14) == (y[:, None] == 1))[:, None, :, None]
    number = first + np.arange(count)
    x[:, 27, 26, 0], x[:, 27, 27, 0] = number // 200, number % 200
    return Source("halves", x.astype(np.uint8), y, ("left", "right"), (), ())


def numbers(records):
    """The number of every image."""
    return records.x[:, 27, 26, 0].astype(int) * 200 + records.x[:, 27, 27, 0]


class Small(nn.Module):
    """A network that compiles in no time."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(4)(x.reshape(x.shape[0], -1))))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The study on the small images, two cells of it."""
    config = dataclasses.replace(SMALL, table=True, out=tmp_path_factory.mktemp("niid") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(niid_bench, "network", lambda classes: mnist.classifier(Small()))
        patch.setattr(niid_bench, "IMAGES", dict.fromkeys(IMAGES, images))
        patch.setattr("experiments.niid_bench_protocol.PUBLISHED", dict(list(PUBLISHED.items())[2:]))
        niid_bench.run(config)
        return config, load_run(config.out), [claim.claim for claim in claims(config)]


@pytest.mark.parametrize("partition", PARTITIONS)
def test_every_partition_deals_the_training_images_and_leaves_the_test_set_whole(partition):
    config = dataclasses.replace(SMALL, share=0.25, partition=partition, classes=1)
    dataset, other = (federation(config, config.cells[0], seed, images) for seed in (0, 1))
    train, test = numbers(dataset.train), numbers(dataset.test)
    assert len({*train}) == len(train) == 60 and train.max() < 240 and dataset.num_sites == 4
    assert sorted(test) == [*range(240, 320)] and np.ptp(dataset.test.sizes) == 0
    assert [*train] != [*numbers(other.train)]
    assert (numbers(federation(dataclasses.replace(config, share=1.0), config.cells[0], 0, images).train) < 240).sum() == 240


def test_the_clients_sgd_and_scaffolds_correction_behind_the_momentum():
    of = Given(Config(rate=0.1, momentum=0.5, weight_decay=0.01), mnist.classifier(Small()), batches.epochs(1, 8), Engine())
    params, gradient, term = {"w": jnp.array([2.0])}, {"w": jnp.array([1.0])}, {"w": jnp.array([0.3])}
    plain, corrected = of.sgd(), of.corrected_sgd()
    states = plain.init(params), corrected.init(params)
    trace = 0.0
    for _ in range(3):
        trace = 0.5 * trace + 1.0 + 0.01 * 2.0
        step, first = plain.update(gradient, states[0], params)
        moved, second = corrected.update(gradient, states[1], params, term=term)
        states = first, second
        np.testing.assert_allclose(step["w"], -0.1 * trace, rtol=1e-6)
        np.testing.assert_allclose(moved["w"], -0.1 * (trace + 0.3), rtol=1e-6)  # not through the momentum


def test_the_arms_have_the_settings(monkeypatch):
    calls = {}

    def noted(name):
        def build(*given, **options):
            calls[name] = (given, options)
            return original[name](*given, **options)

        return build

    original = {name: getattr(algorithms, name) for name in ("fedavg", "scaffold", "fedprox", "fednova")}
    for name in original:
        monkeypatch.setattr(algorithms, name, noted(name))
    config, model = Config(lanes=2), mnist.classifier(Small())
    built = {name: arm_of(name, config, model, CELL).build(()) for name in ARMS}
    assert {*built} == {*config.arms} and calls["fedprox"][0][3] == 0.01
    assert all(int(given[2].steps(np.int32(640))) == 100 for given, _ in calls.values())  # 10 epochs of 10 batches
    assert calls["fednova"][0][1] == calls["scaffold"][0][1] == 0.01 and calls["fednova"][1]["momentum"] == 0.9
    assert all(options["engine"].lanes == 2 for _, options in calls.values())


@pytest.mark.slow
def test_what_is_written_is_what_the_rows_say(finished):
    config, run, stated_claims = finished
    rows = run.metrics[(run.metrics["metric"] == "accuracy") & (run.metrics["split"] == "test") & (run.metrics["site"] == "all")]
    best = rows.groupby(["arm", "seed"])["value"].max()
    cells = {"Fashion-MNIST, IID", "Fashion-MNIST, Dir(0.5)"}
    assert {*run.summary["cells"]} == cells and {*rows["arm"]} == {f"{arm}, {cell}" for arm in config.arms for cell in cells}
    for cell in cells:
        for arm in config.arms:
            assert run.summary["cells"][cell]["arms"][arm]["best"] == pytest.approx(best[f"{arm}, {cell}"].to_list())
    verdicts = read_claims(run.path / "claims.json")
    assert [verdict.claim.claim for verdict in verdicts] == stated_claims and len(verdicts) == 8
    assert all(verdict.holds is None and "--rounds 50 --share 1" in verdict.cause for verdict in verdicts)
    assert len([*(run.path / "figures").glob("accuracy_*.png")]) == len([*(run.path / "figures").glob("labels_*.png")]) == 2
    assert not any("nan" in sentence for sentence in run.summary["reading"])


def measured():
    """Three arms in one cell, two seeds; FedAvg is best in its first round in seed 0."""
    of = {FEDAVG: [(0.8, 0.7), (0.5, 0.6)], SCAFFOLD: [(0.7, 0.9), (0.6, 0.7)], LOCAL: [(0.3, 0.4), (0.4, 0.5)]}
    rows = [MetricRow(f"{arm}, {label(Config(), CELL)}", seed, r, "test", site, "accuracy", value) for arm, seeds in of.items()
            for seed, rounds in enumerate(seeds) for r, value in enumerate(rounds, start=1) for site in ("all", "worst")]
    return Measured(dataclasses.replace(Config(), arms=(FEDAVG, SCAFFOLD, LOCAL)), {CELL: []}, frame(rows))


def test_the_best_round_counts_and_claims_measure_what_they_say():
    found = measured()
    np.testing.assert_allclose(found.values(CELL, FEDAVG), [0.8, 0.6])
    np.testing.assert_allclose(found.last(CELL, FEDAVG), [0.7, 0.6])
    np.testing.assert_array_equal(found.best.rounds(found.name(CELL, FEDAVG)), [1, 2])
    laws = {claim.claim.split(", ")[0]: law(found) for claim, law in stated(found.config)}
    np.testing.assert_allclose(laws["SCAFFOLD minus FedAvg"], [0.1, 0.1])
    np.testing.assert_allclose(laws["FedAvg minus local only"], [0.4, 0.1])
    np.testing.assert_allclose(laws["SCAFFOLD"], [0.9, 0.7])


def test_claims_are_the_published_ones_in_the_published_form_and_else_not_run():
    full, quick = Config(), Config.quick_defaults()
    assert PUBLISHED_FORM.is_published and not full.is_published and not unmeasured(quick) and not unmeasured(PUBLISHED_FORM)
    for changes in ({"rounds": 49}, {"share": 0.9}, {"momentum": 0.0}, {"epochs": 5}, {"clients": 5}):
        assert not dataclasses.replace(PUBLISHED_FORM, **changes).is_published
    long = {claim.claim: claim for claim, _ in stated(PUBLISHED_FORM)}
    assert {claim.claim for claim in unmeasured(full)} == {*long} and len(long) == 16
    claim = long["SCAFFOLD, MNIST, Dir(0.5), 50 rounds"]
    assert claim.published == 0.9907 and claim.admits(0.981) and not claim.admits(0.980)
    wide = long["FedProx, MNIST, 2 classes, 50 rounds"]
    assert wide.published == 0.9685 and wide.admits(0.939) and not wide.admits(0.938)
    assert all(claim.quick for claim in claims(quick)) and len(claims(quick)) == 4
    assert len([*stated(full)]) == 6 and not [*stated(dataclasses.replace(full, alpha=0.1))]  # bars are of one setting
    assert {FEDPROX, FEDNOVA} <= {*full.arms}


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"share": 0.0}, "share must be above 0"), ({"momentum": 1.0}, "momentum must be at least 0 and below 1"),
    ({"arms": (SCAFFOLD,)}, "FedAvg among them"), ({"arms": (FEDAVG, "FedDyn")}, "arms must be some of"), ({"epochs": 0}, "epochs must be 1 or more")])
def test_mistakes_are_one_sentence(changes, sentence):
    with pytest.raises(FlJaxError, match=sentence):
        dataclasses.replace(SMALL, **changes)


@pytest.mark.slow
def test_the_quick_form_holds(quick_form):
    verdicts = read_claims(quick_form("niid_bench", "mnist") / "claims.json")
    assert len(verdicts) == 4 and all(verdict.holds for verdict in verdicts), claims_table(verdicts).text(120)
