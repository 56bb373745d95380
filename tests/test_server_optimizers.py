"""The study of server optimizers: what is chosen by what, which arms run with which rates, that claims are the rows' numbers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import server_optimizers
from experiments.common import mnist, rate_grid
from experiments.server_optimizers import METHODS, Config, measure, study_of
from experiments.server_optimizers_report import CLIENT, FEDAVG, IID, PLAIN, SERVER, Measured, claims, skewed
from fl_jax import algorithms, batches, models, sampling, training
from fl_jax.data import Records, Source, class_counts
from fl_jax.errors import FlJaxError
from fl_jax.results import load_run, read_claims, select

pytestmark = pytest.mark.usefixtures("one_device")

CLASSES = 3
SIMPLE = models.LogisticRegression(10)
SMALL = Config(
    clients=12, cohort=4, batch_size=5, hidden=16, rounds=3, evaluate_every=1, last=0.6, seeds=2, tuning_seeds=2, validation=0.25,
    client_rates=(0.01, 0.05), fedavg_rates=(0.5, 1.0), fedadam_rates=(0.01, 0.03), target=0.5, methods=(FEDAVG, "FedAdam"))
DIRICHLET = skewed(SMALL)
LAST = (2, 3)  # the rounds that count


def images(split, poison=False):
    """Each class has a bright third, 240 images for training and 90 for testing; or test images mostly of the last class."""
    rng = np.random.default_rng({"train": 0, "test": 1}[split])
    y = rng.permutation(np.arange({"train": 240, "test": 90}[split]) % CLASSES).astype(np.int32)
    if poison and split == "test":
        y = np.repeat(np.arange(CLASSES, dtype=np.int32), (10, 20, 60))
    bright = np.arange(28) * CLASSES // 28 == y[:, None]
    x = rng.integers(0, 40, (len(y), 28, 28, 1)) + 60 * bright[:, :, None, None]
    return Source("thirds", x.astype(np.uint8), y, tuple("abc"), (), ())


@pytest.fixture(scope="module", autouse=True)
def thirds():
    """The small images, a model that compiles in no time, and programs that are compiled once: rates and images are their arguments."""
    known, compile_arms = {}, training.compile_arms

    def remembered(study, arms, runs, bar):
        shapes = [leaf.shape for leaf in jax.tree.leaves((runs, study.splits))]
        key = f"{[arm.name for arm in arms]} {jax.tree.structure(runs)} {shapes}"
        if key not in known:
            known[key] = compile_arms(study, arms, runs, bar)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(mnist.IMAGES, "fashion_mnist", images)
        patch.setattr(training, "compile_arms", remembered)
        patch.setattr(server_optimizers.models, "TwoNN", lambda hidden: SIMPLE)
        yield


def finish(folder, **changes):
    """The study on the small images: its configuration and what it left behind."""
    config = dataclasses.replace(SMALL, out=folder, **changes)
    server_optimizers.run(config)
    return config, load_run(config.out)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("study") / "run")


@pytest.fixture(scope="module")
def plain():
    """FedAvg with server rate 1, the arm of plain averaging, and the rows of averaging without a server optimizer."""
    config = dataclasses.replace(SMALL, methods=(FEDAVG,))
    model = mnist.classifier(SIMPLE)
    chosen = {arm: {DIRICHLET: {CLIENT: 0.05, SERVER: 1.0}, IID: {CLIENT: 0.02, SERVER: 1.0}} for arm in (FEDAVG, PLAIN)}
    draws, metrics = measure(config, model, chosen)
    work = batches.epochs(1, SMALL.batch_size)
    averaging = training.Arm(
        "averaging", lambda rate: algorithms.fedavg(model, optax.sgd(rate), work), lambda sites: sampling.fixed_size(4, 12))
    seeds = [draw.seed for draw in draws]
    runs = training.seeds_of(seeds, stacked=True)._replace(
        hyper=jnp.array([{DIRICHLET: 0.05, IID: 0.02}[draw.partition] for draw in draws]))
    fit = training.fit(study_of(config, model, draws), [averaging], seeds, runs, variants=[f", {d.partition}" for d in draws])
    return draws, Measured(config, {DIRICHLET: {}, IID: {}}, chosen, draws, metrics), fit["averaging"].rows


def accuracy(run, arm, seed, rounds, split="test", site="all"):
    rows = run.metrics[(run.metrics["arm"] == arm) & (run.metrics["seed"] == seed) & (run.metrics["split"] == split)]
    rows = rows[(rows["site"] == site) & (rows["metric"] == "accuracy") & rows["round"].isin(rounds)]
    assert len(rows) == len(rounds)
    return rows["value"].mean()


@pytest.mark.slow
def test_the_claims_are_the_numbers_of_the_rows(finished):
    config, run = finished
    verdicts = {verdict.claim.claim: verdict for verdict in read_claims(run.path / "claims.json")}
    assert [*verdicts] == [claim.claim for claim in claims(config)] and len(verdicts) == 4

    def measured(arm, other, partition):
        return np.array([accuracy(run, f"{arm}, {partition}", seed, LAST) - accuracy(run, f"{other}, {partition}", seed, LAST)
                         for seed in range(2)])

    expected = {f"FedAdam minus FedAvg, {where}": measured("FedAdam", FEDAVG, where) for where in (DIRICHLET, IID)}
    expected[f"FedAvg minus plain averaging, {DIRICHLET}"] = measured(FEDAVG, PLAIN, DIRICHLET)
    expected[f"FedAdam's gain over FedAvg, {DIRICHLET} minus IID"] = (
        measured("FedAdam", FEDAVG, DIRICHLET) - measured("FedAdam", FEDAVG, IID))
    assert {*expected} == {*verdicts}
    for text, values in expected.items():
        verdict = verdicts[text]
        assert verdict.measured == pytest.approx(values.mean(), abs=1e-9) and verdict.seeds == 2
        assert verdict.holds == verdict.claim.admits(values.mean())


@pytest.mark.slow
def test_the_chosen_rates_are_the_best_on_validation_images_and_are_what_is_run(finished):
    _, run = finished
    for partition in (DIRICHLET, IID):
        arms = run.summary["partitions"][partition]
        for method in SMALL.methods:
            found = []
            for point in rate_grid.points(SMALL.axes(method)):
                name = f"grid of {method}, {partition}{rate_grid.suffix(point)}"
                found.append((np.mean([accuracy(run, name, seed, LAST, "validation") for seed in (1000, 1001)]), point))
            best = max(found, key=lambda pair: pair[0])
            assert arms[method]["rates"] == best[1] and arms[method]["validation"] == pytest.approx(best[0])
            assert len(arms[method]["grid"]) == 4
        plain = [(entry["validation"], entry[CLIENT]) for entry in arms[FEDAVG]["grid"] if entry[SERVER] == 1.0]
        assert arms[PLAIN]["rates"] == {CLIENT: max(plain, key=lambda pair: np.mean(pair[0]))[1], SERVER: 1.0}


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
def test_other_test_images_change_no_choice_and_a_finished_study_is_resumed_as_it_is(finished, tmp_path, monkeypatch):
    monkeypatch.setitem(mnist.IMAGES, "fashion_mnist", lambda split: images(split, poison=True))
    config, run = finish(tmp_path / "run", methods=(FEDAVG,))
    for partition in (DIRICHLET, IID):
        clean, poisoned = (of.summary["partitions"][partition] for of in (finished[1], run))
        assert clean[FEDAVG]["grid"] == poisoned[FEDAVG]["grid"]
        for arm in (FEDAVG, PLAIN):
            assert clean[arm]["rates"] == poisoned[arm]["rates"]
            assert clean[arm]["test"]["mean"] != poisoned[arm]["test"]["mean"]
    rows = (config.out / "metrics.csv").read_bytes()
    server_optimizers.run(dataclasses.replace(config, resume=True))
    assert (config.out / "metrics.csv").read_bytes() == rows


def test_fedavg_with_server_rate_1_is_plain_averaging(plain):
    _, measured, averaging = plain
    for partition in (DIRICHLET, IID):
        np.testing.assert_array_equal(measured.difference(partition, FEDAVG, PLAIN), 0)
        assert measured.gain(partition, FEDAVG, PLAIN).mean == 0
        rows = select(averaging, "accuracy", "test", "all", [f"averaging, {partition}"])
        restated = rows[rows["round"] > SMALL.counted_after].groupby("seed")["value"].mean()
        np.testing.assert_allclose(measured.values(partition, FEDAVG), restated, atol=0.02)  # of 90 images
    assert not np.array_equal(measured.values(DIRICHLET, FEDAVG), measured.values(IID, FEDAVG))


def test_the_worst_client_is_the_one_whose_mix_of_classes_fares_worst(plain):
    draws, measured, _ = plain
    for partition in (DIRICHLET, IID):
        of_classes = np.stack([measured.values(partition, FEDAVG, name) for name in "abc"], axis=1)
        np.testing.assert_allclose(of_classes.mean(1), measured.values(partition, FEDAVG), atol=1e-6)  # 30 test images of each
        for draw in draws:
            if draw.partition == partition:
                counts = class_counts(draw.dataset.train, CLASSES)
                least = min(np.average(of_classes[draw.seed], weights=row) for row in counts)
                assert measured.worst_client(partition, FEDAVG)[draw.seed] == pytest.approx(least)
    assert (measured.worst_client(DIRICHLET, FEDAVG) <= measured.values(DIRICHLET, FEDAVG) + 1e-9).all()


@pytest.mark.slow
def test_rounds_are_counted_to_the_target(finished):
    config, run = finished
    for partition in (DIRICHLET, IID):
        for arm, found in run.summary["partitions"][partition].items():
            for seed, reached in enumerate(found["rounds_to_target"]):
                values = [accuracy(run, f"{arm}, {partition}", seed, (r,)) for r in range(1, SMALL.rounds + 1)]
                first = next((r for r, value in enumerate(values, start=1) if value >= config.target), None)
                if first is None:
                    assert reached is None or np.isnan(reached)
                else:
                    assert max(first - 1, 1) <= reached <= first  # interpolated between the two measurements


def test_the_records_of_each_class_are_one_site():
    rng = np.random.default_rng(0)
    tables = [Records(np.arange(n, dtype=np.float32)[:, None], rng.integers(0, 3, n), np.array([0, n])) for n in (7, 4, 0)]
    sites = mnist.by_class(tables, 4)
    assert sites.x.shape == (3, 7, 1) and sites.size.dtype == jnp.int32
    for i, table in enumerate(tables):
        found = {}
        for label in range(4):
            offset, size = int(sites.offset[i, label]), int(sites.size[i, label])
            assert (sites.y[i, offset : offset + size] == label).all()
            found[label] = sorted(sites.x[i, offset : offset + size, 0].tolist())
        assert found == {label: table.x[table.y == label, 0].tolist() for label in range(4)}


@pytest.mark.slow
def test_what_is_left_behind_is_complete(finished):
    _, run = finished
    assert {path.stem for path in (run.path / "figures").glob("*.png")} == {
        f"{kind}_{where}" for kind in ("accuracy", "grid") for where in ("dir_0_1", "iid")}
    assert len(run.summary["reading"]) == 8 and not any("nan" in sentence for sentence in run.summary["reading"])
    checkpoints = {path.name for path in (run.path / "checkpoints").iterdir()}
    assert checkpoints == {*(f"grid_of_{method}" for method in SMALL.methods), *SMALL.methods, "FedAvg__server_rate_1"}


def test_grids_that_are_not_matched_are_one_sentence():
    with pytest.raises(FlJaxError, match="grid of the same size"):
        dataclasses.replace(SMALL, fedadam_rates=(0.1,))
    with pytest.raises(FlJaxError, match="must have 1, which is plain averaging"):
        dataclasses.replace(SMALL, fedavg_rates=(0.5, 2.0))
    with pytest.raises(FlJaxError, match="methods must be some of FedAvg, "):
        dataclasses.replace(SMALL, methods=("FedAdam",))
    with pytest.raises(FlJaxError, match="last must be between 0 and 1, and is 1"):
        dataclasses.replace(SMALL, last=1.0)


def test_every_method_has_a_claim_and_those_of_the_quick_form_are_marked():
    quick, full = claims(Config.quick_defaults()), claims(Config())
    assert {claim.claim.split()[0] for claim in full[:4]} == {*METHODS} - {FEDAVG}
    assert {claim.claim for claim in quick} < {claim.claim for claim in full[:4]}
    assert all(claim.quick for claim in quick) and not any(claim.quick for claim in full) and len(full) == 8


@pytest.mark.slow
def test_the_quick_form_holds(quick_form):
    folder = quick_form("server_optimizers", "fashion_mnist")
    verdicts = read_claims(folder / "claims.json")
    assert [verdict.holds for verdict in verdicts] == [True] * 3 and all(verdict.claim.quick for verdict in verdicts)
    summary = json.loads((folder / "summary.json").read_text())
    assert jax.tree.leaves(summary["partitions"][DIRICHLET]["FedAdam"]["rates"])
