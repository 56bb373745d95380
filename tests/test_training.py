"""The host loop: what a study's rows say, and that a run that was stopped, killed or damaged ends as one that was not.

Everything trains one federation: a large site, one that has a single class, one of a single record, and one that is not seen. Its
programs are compiled once, and once more into a cache for the processes that are killed.
"""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest

from fl_jax import algorithms, batches, models, sampling, training
from fl_jax.data import FederatedDataset, Records, pooled_train, stack
from fl_jax.errors import FlJaxError
from fl_jax.metrics import CLASSIFICATION, Metric
from fl_jax.results import COLUMNS, RunFolder, load_metrics
from fl_jax.results.rows import OVER_SITES
from fl_jax.sweep import run_mesh
from fl_jax.types import Sampling

SITES, UNSEEN = ("large", "one class", "one record"), ("new",)
ROUNDS, EVERY, EVALUATED = 5, 2, [2, 4, 5]  # the last block is shorter
LABELS, KEYS, RATES = (10, 11, 12), (0, 1, 0), (0.1, 0.1, 0.5)  # three runs, which two devices share
WORK = batches.epochs(2, 8)  # a batch is larger than two of the sites
CONFIG = {"rounds": ROUNDS, "optimizer": {"learning_rate": list(RATES)}}
MODEL = models.bridge(models.LogisticRegression(2), jnp.zeros((1, 3)), models.softmax_cross_entropy)
traced = []


def records(sizes, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(sum(sizes), 3)).astype(np.float32)
    y = (x[:, 0] + 0.5 * rng.normal(size=len(x)) > 0).astype(np.int32)
    if len(sizes) > 1:
        y[sizes[0] : sizes[0] + sizes[1]] = 1
    return Records(x, y, np.cumsum([0, *sizes]))


def counted(predictions):
    """The accuracy, and how often it was traced."""
    traced.append(1)
    return CLASSIFICATION["accuracy"].measure(predictions)


def study(**changes):
    data = FederatedDataset(
        "small", records((20, 5, 1), 0), records((6, 3, 0), 1), records((9, 4, 0), 2), records((7,), 3), SITES, UNSEEN, num_classes=2)
    metrics = {**CLASSIFICATION, "counted": Metric(counted)}
    made = training.Study(MODEL, stack([data]), SITES, UNSEEN, ROUNDS, EVERY, chunk=8, metrics=metrics, mesh=run_mesh(2))
    return made._replace(**changes)


def storms(sites):
    """Everybody takes part, or, in two rounds of five, nobody can."""
    everyone = sampling.everyone()

    def draw(key, t, sites):
        cohort = everyone.draw(key, t, sites)
        return cohort._replace(weight=cohort.weight * (jax.random.uniform(key) >= 0.4))

    return Sampling(draw, everyone.amplify)


FEDAVG = training.Arm("FedAvg", lambda rate: algorithms.fedavg(MODEL, optax.sgd(rate, 0.9), WORK), storms)
CENTRALIZED = training.Arm(
    "centralized", lambda rate: algorithms.centralized(MODEL, optax.sgd(rate), algorithms.pooled_batches(WORK)),
    lambda sites: algorithms.matched_budget(sampling.everyone(), WORK, sites), pooled_train)
BOTH = [FEDAVG, CENTRALIZED]


def runs(rates=RATES):
    return training.seeds_of(KEYS, stacked=False)._replace(hyper=jnp.array(rates))


def fit(arms, folder=None, *, of=None, rates=RATES, labels=LABELS, **options):
    if folder is not None:
        folder = RunFolder.create(folder, CONFIG, resume=True)
    return training.fit(of or study(), arms, labels, runs(rates), folder=folder, resume=folder is not None, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run of both arms: its folder, what came of it, and how often a metric was traced."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    before = len(traced)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "compile_arms", lambda *arguments: compiled.append(compile_arms(*arguments)) or compiled[-1])
        fits = fit(BOTH, folder)
    return folder, fits, len(traced) - before


compiled, compile_arms = [], training.compile_arms


@pytest.fixture
def again(whole, monkeypatch):
    """Lets `fit` use the programs of `whole` again: learning rates and records are their arguments."""

    def chosen(study, arms, runs, bar):
        programs, measure = compiled[0]
        return [program for program in programs if program.name in {arm.name for arm in arms}], measure

    monkeypatch.setattr(training, "compile_arms", chosen)
    return whole


def assert_ended_like(whole, folder, fits, arms=BOTH):
    """Bit for bit: the rows of these arms on the disk and in memory, and their last states."""
    expected = (whole[0] / "metrics.csv").read_bytes().splitlines(keepends=True)
    expected = [line for line in expected if line.split(b",")[0].decode() in ("arm", *(arm.name for arm in arms))]
    assert (folder / "metrics.csv").read_bytes().splitlines(keepends=True) == expected
    for arm in arms:
        pd.testing.assert_frame_equal(fits[arm.name].rows, whole[1][arm.name].rows, check_exact=True)
        for a, b in zip(jax.tree.leaves(fits[arm.name].state), jax.tree.leaves(whole[1][arm.name].state), strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype


def after_append(monkeypatch, count, action):
    """Calls action as soon as the rows of the count-th block are on the disk, and before their checkpoint is."""
    append, calls = RunFolder.append_metrics, []

    def appended(self, rows):
        append(self, rows)
        calls.append(1)
        if len(calls) == count:
            action()

    monkeypatch.setattr(RunFolder, "append_metrics", appended)


def stop(monkeypatch, folder, blocks, arms=BOTH, **options):
    """Trains until Ctrl-C comes in a block."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as stopped:
        after_append(patch, blocks, lambda: signal.raise_signal(signal.SIGINT))
        fit(arms, folder, **options)
    return str(stopped.value)


def select(rows, **wanted):
    for column, value in wanted.items():
        rows = rows[rows[column] == value]
    return rows


def test_rows_are_complete_in_order_and_those_on_the_disk(whole):
    folder, fits, _ = whole
    rows = load_metrics(folder)
    assert list(rows.columns) == list(COLUMNS)
    pd.testing.assert_frame_equal(rows, pd.concat([fit.rows for fit in fits.values()], ignore_index=True), check_exact=True)
    for arm in ("FedAvg", "centralized"):
        own = select(rows, arm=arm)
        assert set(own["split"]) == {"round", "validation", "test", "unseen"} and set(own["seed"]) == set(LABELS)
        for split, sites in (("validation", (*SITES, *OVER_SITES)), ("test", (*SITES, *OVER_SITES)), ("unseen", UNSEEN)):
            found = select(own, split=split)
            expected = {(*key, name) for key in zip(EVALUATED * 3, sorted(LABELS * 3)) for name in CLASSIFICATION}
            assert set(zip(found["round"], found["seed"], found["metric"])) >= expected
            assert set(found["site"]) == set(sites)
        assert not own.duplicated(["seed", "round", "split", "site", "metric"]).any()
        assert sorted(select(own, split="round", metric="loss", seed=10)["round"]) == [1, 2, 3, 4, 5]
    assert fits["FedAvg"].norms == "no BatchNorm"  # of a logistic regression
    assert fits["FedAvg"].payload == (32, 32)  # 3 x 2 weights and 2 biases
    assert int(fits["FedAvg"].state.round[0]) == ROUNDS


def test_training_helps(whole):
    losses = select(whole[1]["centralized"].rows, split="round", metric="loss").pivot(index="round", columns="seed", values="value")
    assert (losses.loc[5] < losses.loc[1]).all()


def test_a_metric_that_a_site_cannot_have_is_missing_with_its_reason_and_left_out_of_means(whole):
    rows = select(whole[1]["FedAvg"].rows, split="test", seed=11, round=5, metric="auroc").set_index("site")
    assert np.isnan(rows["value"][["one class", "one record"]]).all()
    assert rows["note"]["one class"] == "one class only" and rows["note"]["one record"] == "no test records"
    assert rows["value"]["mean"] == rows["value"]["worst"] == rows["value"]["large"] and rows["note"]["mean"] == ""
    accuracy = select(whole[1]["FedAvg"].rows, split="test", seed=11, round=5, metric="accuracy").set_index("site")["value"]
    assert accuracy["mean"] == pytest.approx((accuracy["large"] + accuracy["one class"]) / 2)


def test_a_round_in_which_nobody_takes_part_is_counted_and_its_loss_is_missing(whole):
    rows = select(whole[1]["FedAvg"].rows, split="round", seed=10).pivot(index="round", columns="metric", values="value")
    notes = select(whole[1]["FedAvg"].rows, split="round", seed=10, metric="loss").set_index("round")["note"]
    empty = rows["participants"] == 0
    assert 0 < empty.sum() < ROUNDS
    assert rows["loss"].isna().equals(empty) and set(notes[empty]) == {"nobody took part"} and set(notes[~empty]) == {""}
    assert (rows["bytes_up"] == np.where(empty, 0, 3 * 32)).all() and (rows["update_norm"] > 0).equals(~empty)


def test_a_run_is_itself_alone_in_one_block_on_one_device_with_its_learning_rate_as_a_constant(whole):
    arm = FEDAVG._replace(build=lambda _: FEDAVG.build(RATES[2]))
    before = len(traced)
    alone = training.fit(study(mesh=None, evaluate_every=ROUNDS), [arm], LABELS[2:], training.seeds_of(KEYS[2:], stacked=False))["FedAvg"]
    assert len(traced) - before == whole[2] > 0  # of both arms, whose metrics are one program
    names = ["split", "round", "site", "metric"]
    both = [select(found, seed=12).set_index(names).sort_index() for found in (alone.rows, whole[1]["FedAvg"].rows)]
    pd.testing.assert_frame_equal(both[0], both[1].loc[both[0].index], rtol=1e-5, atol=1e-6)
    assert set(both[0].reset_index()["round"]) == {1, 2, 3, 4, 5}
    other = [select(whole[1]["FedAvg"].rows, seed=seed, split="test", site="large", metric="loss")["value"].to_numpy() for seed in (10, 12)]
    assert np.abs(other[0] - other[1]).min() > 1e-3  # the same seed at another rate


@pytest.mark.parametrize("blocks, words", [
    (1, "stopped after round 2 of 5 of FedAvg"), (3, "stopped after round 5 of 5 of FedAvg"), (5, "stopped after round 4 of 5 of centralized")])
def test_ctrl_c_leaves_a_run_that_resumes_exactly(again, monkeypatch, tmp_path, capsys, blocks, words):
    handler = signal.getsignal(signal.SIGINT)
    assert f"{words}; it is saved in {tmp_path} and can be resumed" in stop(monkeypatch, tmp_path, blocks)
    assert "press Ctrl-C again" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler
    assert_ended_like(again, tmp_path, fit(BOTH, tmp_path))


def test_a_second_ctrl_c_stops_at_once_and_the_run_still_resumes_exactly(again, monkeypatch, tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        after_append(patch, 2, twice)
        fit([FEDAVG], tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints" / "FedAvg").iterdir() if path.name.isdecimal()] == ["2"]
    assert load_metrics(tmp_path)["round"].max() == 4  # rows beyond the checkpoint, which a resumed run measures again
    assert_ended_like(again, tmp_path, fit([FEDAVG], tmp_path), [FEDAVG])


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(again, monkeypatch, tmp_path, capsys, damage):
    stop(monkeypatch, tmp_path, 2, [FEDAVG])
    newest = tmp_path / "checkpoints" / "FedAvg" / "4"
    path = max((path for path in newest.rglob("*") if path.is_file() and path.name != "manifest.json"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    fits = fit([FEDAVG], tmp_path)
    said = capsys.readouterr().err
    assert f"The checkpoint of step 4 in {newest.parent} is damaged" in said and "the one before it is used" in said
    assert_ended_like(again, tmp_path, fits, [FEDAVG])


def test_runs_that_differ_in_more_than_their_seed_have_rows_of_their_own(again, monkeypatch, tmp_path):
    labels, variants = [7, 7, 8], [", rate .1", ", rate .5", ", rate .5"]
    stop(monkeypatch, tmp_path, 2, [FEDAVG], labels=labels, variants=variants)
    whole = again[1]["FedAvg"].rows
    rows = fit([FEDAVG], tmp_path, labels=labels, variants=variants)["FedAvg"].rows
    pd.testing.assert_frame_equal(rows, load_metrics(tmp_path))
    for label, seed, variant in zip(LABELS, labels, variants, strict=True):
        own = rows[(rows["arm"] == f"FedAvg{variant}") & (rows["seed"] == seed)].drop(columns=["arm", "seed"])
        pd.testing.assert_frame_equal(
            own.reset_index(drop=True), whole[whole["seed"] == label].drop(columns=["arm", "seed"]).reset_index(drop=True))


def test_another_configuration_is_refused_with_the_difference(again):
    other = {**CONFIG, "optimizer": {"learning_rate": [0.1, 0.1, 0.4]}}
    with pytest.raises(FlJaxError, match=r"optimizer.learning_rate: \[0.1, 0.1, 0.5\] -> \[0.1, 0.1, 0.4\]"):
        RunFolder.create(again[0], other, resume=True)
    with pytest.raises(FlJaxError, match="already holds this run; resume it"):
        RunFolder.create(again[0], CONFIG)


def test_a_full_disk_loses_nothing(again, monkeypatch, tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, limit[1]))  # nothing larger can be written, so the checkpoint cannot

    try:
        with monkeypatch.context() as patch, pytest.raises(FlJaxError, match=r"Could not save step 4 .*\(earlier checkpoints are intact\).* full"):
            after_append(patch, 2, fill)
            fit([FEDAVG], tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert_ended_like(again, tmp_path, fit([FEDAVG], tmp_path), [FEDAVG])


def test_when_no_message_is_finite_it_stops_names_the_round_and_the_sites_and_loses_nothing(again, monkeypatch, tmp_path):
    stop(monkeypatch, tmp_path, 1, BOTH)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    participants = select(again[1]["FedAvg"].rows, split="round", seed=11, metric="participants")
    first = participants[(participants["round"] > 2) & (participants["value"] > 0)]["round"].min()
    with pytest.raises(FlJaxError, match=rf"FedAvg, seed 11: in round {first} no site sent a finite update \({', '.join(SITES)}\)"):
        fit(BOTH, tmp_path, rates=(0.1, np.nan, 0.5))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert_ended_like(again, tmp_path, fit(BOTH, tmp_path))


def test_a_run_that_may_diverge_goes_on_with_its_model_and_leaves_the_others_alone(again):
    rows = fit([FEDAVG], rates=(0.1, np.nan, 0.5), may_diverge=True)["FedAvg"].rows
    for seed, metric in ((10, "accuracy"), (12, "loss"), (12, "accuracy")):
        for split in ("test", "round"):
            if (split, metric) != ("round", "accuracy"):
                found, expected = (select(of, split=split, seed=seed, metric=metric)["value"] for of in (rows, again[1]["FedAvg"].rows))
                np.testing.assert_array_equal(found, expected)
    lost, came = (select(rows, split="round", seed=11, metric=metric)["value"].to_numpy() for metric in ("nonfinite", "participants"))
    assert len(lost) == ROUNDS and (came == 0).all() and lost.max() == len(SITES)
    kept = select(rows, split="test", seed=11, metric="accuracy", site="large")["value"]
    assert kept.nunique() == 1 and np.isfinite(kept).all()  # that of the initial model


def test_pooled_records_are_not_named_like_the_first_site(again):
    with pytest.raises(FlJaxError, match=r"centralized, seed 12: in round 1 .* \(client 0 of 1\)"):
        fit([CENTRALIZED], rates=(0.1, 0.1, np.nan))


def test_a_site_whose_messages_are_not_finite_is_left_out_and_counted_and_the_run_goes_on(again):
    clean = study()
    train = clean.splits.train
    spoiled = train._replace(x=train.x.at[0, 22].set(jnp.nan))  # a record of the second site
    rows = fit([FEDAVG], of=clean._replace(splits=clean.splits._replace(train=spoiled)))["FedAvg"].rows
    for seed in LABELS:
        counts = select(rows, split="round", seed=seed).pivot(index="round", columns="metric", values="value")
        expected = select(again[1]["FedAvg"].rows, split="round", seed=seed).pivot(index="round", columns="metric", values="value")
        assert (counts["nonfinite"] == np.where(expected["participants"] > 0, 1, 0)).all()
        assert (counts["participants"] == np.maximum(expected["participants"] - 1, 0)).all()
    assert np.isfinite(select(rows, split="test", site="large")["value"]).all()


@pytest.mark.parametrize("change, words", [
    ({"of": study(rounds=0)}, "rounds is 0 and evaluate_every 2: give 1 or more"),
    ({"of": study(evaluate_every=0)}, "evaluate_every 0: give 1 or more"),
    ({"of": study(site_names=("large", "mean", "c"))}, "a site is called 'mean', as rows over all sites are"),
    ({"arms": [FEDAVG, FEDAVG]}, "two arms are called 'FedAvg' or differ from it in punctuation or case only"),
    ({"arms": [FEDAVG._replace(name="a/b"), FEDAVG._replace(name="a b")]}, "two arms are called 'a/b'"),
    ({"labels": (1, 2)}, "2 seeds for 3 keys, 3 data sets and 2 variants"),
    ({"labels": (1, 2, 1)}, "two runs of an arm have one seed"),
    ({"arms": [FEDAVG._replace(sampling=lambda sites: sampling.fixed_size(4, sites.size.shape[0]))]},
     "a cohort of 4 cannot be drawn from 3 clients: choose 1 to 3"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_mistakes_are_named_in_one_line(change, words):
    with pytest.raises(FlJaxError, match=words) as error:
        training.fit(change.get("of", study()), change.get("arms", BOTH), change.get("labels", LABELS), runs())
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The environment of processes that share what they compile."""
    return {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


SCRIPT = "import conftest, sys, test_training; test_training.fit(test_training.BOTH, sys.argv[1])"


def saving(folder, before):
    """A save that this process began is under way."""
    return any("orbax-checkpoint-tmp" in path.name and path not in before for path in folder.glob("checkpoints/*/*"))


def unsealed(folder, before):
    """Orbax has finished a step of this process, whose checksums are not yet written."""
    steps = [path for path in folder.glob("checkpoints/*/*") if path.name.isdecimal() and path not in before]
    return any(not (path / "manifest.json").exists() for path in steps)


def appended(folder, before):
    """Rows were written that were not there when this process began."""
    return size_of(folder) > before[folder]


def size_of(folder):
    path = folder / "metrics.csv"
    return path.stat().st_size if path.exists() else 10_000  # more than a header


@pytest.mark.slow
def test_a_killed_process_resumes_exactly(again, cache, tmp_path):
    root = Path(__file__).parents[1]
    environment = {**os.environ, **cache, "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    for when, delay in ((unsealed, 0), (saving, random.uniform(0, 0.01)), (appended, random.uniform(0, 0.1))):
        before = {tmp_path: size_of(tmp_path)} | dict.fromkeys(tmp_path.glob("checkpoints/*/*"))
        with subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, stderr=subprocess.PIPE) as process:
            while process.poll() is None and not when(tmp_path, before):
                time.sleep(0.0005)
            time.sleep(delay)
            process.kill()
            error = process.stderr.read().decode()
        assert process.returncode == -signal.SIGKILL, error
    assert len(load_metrics(tmp_path)) < len(load_metrics(again[0]))
    assert_ended_like(again, tmp_path, fit(BOTH, tmp_path))
