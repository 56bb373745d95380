"""experiments.speed: the work that a file prescribes, the floor, and the numbers that are reported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import speed
from experiments.benchmark import floor, workloads
from experiments.benchmark.measure import measure
from experiments.benchmark.private import measure_private
from experiments.benchmark.workloads import WORKLOADS, generate, load
from experiments.common import cli
from fl_jax import algorithms, core, models
from fl_jax.errors import FlJaxError

ROOT = Path(__file__).parent.parent
KEYS = ["name", "workload", "rounds", "warmup", "seconds_first", "seconds_steady", "examples", "examples_per_s", "rounds_per_s",
        "floor_examples_per_s", "floor_ratio", "wasted_steps", "peak_rss_mb", "final_train_loss"]
SIZES = np.array([7, 3, 10, 1, 9, 6])  # no site is above a batch of W4, so a step is a full gradient and no order of records matters
ROUNDS, WARMUP = 3, 1


def arrays_of_w4() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(SIZES.sum(), 60)).astype(np.float32)
    return {
        "x": x, "y": np.argmax(x[:, :10], axis=1), "offsets": np.concatenate([[0], np.cumsum(SIZES)]),
        "cohorts": np.stack([rng.permutation(len(SIZES))[:3] for _ in range(WARMUP + ROUNDS)]), "eval_idx": np.arange(0, 36, 5),
        "p0": rng.normal(size=(60, 10), scale=0.1).astype(np.float32), "p1": rng.normal(size=10).astype(np.float32),
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("work") / "w4.npz"
    np.savez(path, **arrays_of_w4())
    return path


@pytest.fixture(autouse=True, scope="module")
def models_begin_in_one_program():
    """Layer by layer, as where nothing is jitted, it takes seconds."""
    model_of = workloads._model

    def jitted(*given):
        model = model_of(*given)
        return model._replace(init=jax.jit(model.init))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workloads, "_model", jitted)
        yield


def log_softmax(logits):
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def numpy_loss(held) -> float:
    """Plain FedAvg on the file's work, 20 full-batch steps a client, in float64: the loss that should be reported."""
    x, y, workload = np.float64(held["x"]), held["y"], WORKLOADS["W4"]
    kernel, bias = np.float64(held["p0"]), np.float64(held["p1"])
    for cohort in held["cohorts"]:
        kernels, biases = [], []
        for id in cohort:
            rows = slice(held["offsets"][id], held["offsets"][id + 1])
            k, b = kernel.copy(), bias.copy()
            for _ in range(workload.epochs):
                error = np.exp(log_softmax(x[rows] @ k + b)) - np.eye(10)[y[rows]]
                k -= workload.learning_rate * x[rows].T @ error / len(error)
                b -= workload.learning_rate * error.mean(0)
            kernels.append(k)
            biases.append(b)
        kernel, bias = (np.average(each, axis=0, weights=SIZES[cohort]) for each in (kernels, biases))
    chosen = held["eval_idx"]
    return -log_softmax(x[chosen] @ kernel + bias)[np.arange(len(chosen)), y[chosen]].mean()


@pytest.mark.slow
def test_a_file_is_the_work_and_the_loss_is_that_of_plain_fedavg(file):
    held = arrays_of_w4()
    measured = measure("W4", ROUNDS, WARMUP, file, 2, 1, 1, lambda sentence: None)
    assert list(measured)[: len(KEYS)] == KEYS
    assert measured["final_train_loss"] == pytest.approx(numpy_loss(held), abs=1e-5)
    assert measured["examples"] == 20 * SIZES[held["cohorts"][WARMUP:]].sum()
    assert 0 <= measured["wasted_steps"] < 1 and measured["peak_rss_mb"] > 50
    assert measured["examples_per_s"] == pytest.approx(measured["examples"] / measured["seconds_steady"])
    assert measured["floor_ratio"] > 0 and measured["lanes"] == 2 and measured["devices"] == jax.device_count()
    assert "over the floor" in speed.report(measured)


@pytest.mark.slow
def test_one_line_of_json_from_a_process_of_its_own(file, tmp_path):
    command = [sys.executable, "-m", "experiments.speed", "--workload", "W4", "--rounds", "1", "--data", str(file), "--devices", "2", "--json",
               "--lanes", "auto", "--pairs", "1", "--seeds", "2", "--out", str(tmp_path / "run")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert len(ended.stdout.splitlines()) == 1
    printed = json.loads(ended.stdout)
    assert list(printed)[: len(KEYS)] == KEYS and printed["devices"] == 2 and printed["seeds"] == 2 and printed["seeds_ratio"] > 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["final_train_loss"] == printed["final_train_loss"]


def test_the_floor_is_plain_sgd_whatever_its_form():
    work = generate("W4", 1)
    held = floor.shuffled(work, 0)
    expected = jax.tree.map(np.float64, work.variables.params["Dense_0"])
    steps = floor.UNROLLED
    for x, y in zip(np.float64(held[0][:steps]), np.asarray(held[1][:steps])):
        error = (np.exp(log_softmax(x @ expected["kernel"] + expected["bias"])) - np.eye(10)[y]) / len(y)
        expected["kernel"] = expected["kernel"] - 0.01 * x.T @ error
        expected["bias"] = expected["bias"] - 0.01 * error.sum(0)
    forms = dict(floor.forms(work))
    assert len(forms) > 1
    for loop in forms.values():
        after = loop(work.variables.params, held, jnp.int32(0), jnp.int32(steps))["Dense_0"]
        for leaf in expected:
            np.testing.assert_allclose(after[leaf], expected[leaf], atol=1e-6)


@pytest.mark.slow
def test_the_price_of_privacy_is_that_of_the_same_rounds_with_another_gradient(monkeypatch):
    """W4's rounds, which take as many steps whatever the gradient; a private one cannot be free."""
    monkeypatch.setattr(core, "client_mesh", lambda: None)  # the eight devices of the tests are two cores
    measured = measure_private([("W4", 10)], rounds=1, lanes=2, pairs=1, say=lambda sentence: None)
    (row,) = measured["private"]
    assert row["workload"] == "W4" and row["batch"] == 10 and row["private_over_plain"] == row["ratios"][0]
    assert row["steps"] == row["private_steps"] > 0 and row["private_over_plain"] > 0.5 and row["private_over_plain_without_noise"] > 0.5
    assert "W4, batch 10" in speed.private_report(measured)


@pytest.mark.parametrize("name, parameters, records", [("W1", 199_210, 60_000), ("W2", 1_690_046, None), ("W3", 1_626_442, 50_000), ("W4", 610, None)])
def test_generated_work_has_the_published_shape(name, parameters, records):
    work = generate(name, 2)
    sizes, workload = np.asarray(work.sites.size), work.workload
    assert sum(leaf.size for leaf in jax.tree.leaves(work.variables)) == parameters
    assert sizes.sum() == len(work.sites.y) and records in (None, sizes.sum())
    assert work.cohorts.shape == (2, workload.cohort_size) and len(set(work.cohorts[0].tolist())) == workload.cohort_size
    if name == "W2":
        assert len(sizes) == 340 and sizes.min() >= 10 and np.log(sizes).std() == pytest.approx(0.6, abs=0.08)
    if name == "W4":
        assert len(sizes) == 30 and sizes.min() >= 50 and sizes.max() <= 5000


def test_parameters_are_taken_in_layer_order(tmp_path):
    """p0, p1, ... are kernel and bias of each layer as the network calls it; pixels are read as (x - 128) / 128."""
    rng = np.random.default_rng(1)
    shapes = [(5, 5, 1, 32), (32,), (5, 5, 32, 64), (64,), (3136, 512), (512,), (512, 62), (62,)]
    given = [rng.normal(size=shape, scale=0.05).astype(np.float32) for shape in shapes]
    x = rng.integers(0, 256, (4, 28, 28), dtype=np.uint8)
    path = tmp_path / "w2.npz"
    np.savez(path, x=x, y=np.arange(4), offsets=[0, 2, 4], cohorts=[[0, 1]], eval_idx=[0], **{f"p{i}": p for i, p in enumerate(given)})
    work = load("W2", path, 1)

    @jax.jit
    def expected(pixels):
        for kernel, bias in (given[0:2], given[2:4]):
            pixels = models.xla_convolution(pixels, jnp.asarray(kernel), (1, 1), ((2, 2), (2, 2))) + bias
            pixels = jax.nn.relu(models.max_pool(pixels, (2, 2), (2, 2)))
        hidden = jax.nn.relu(pixels.reshape(4, -1) @ given[4] + given[5])
        return hidden @ given[6] + given[7]

    pixels = (np.float32(x)[..., None] - 128) / 128
    np.testing.assert_allclose(jax.jit(work.model.predict)(work.variables, work.sites.x), expected(pixels), atol=1e-3)


@pytest.mark.parametrize("change, words", [
    ({"y": None}, "lacks the array 'y'"),
    ({"p0": np.zeros((10, 60))}, "has the shapes|have the shapes"),
    ({"x": np.zeros((36, 61))}, "records of shape"),
    ({"offsets": np.array([0, 7, 7, 36])}, "at least one"),
    ({"cohorts": np.zeros((2, 1), int)}, "cohorts of 2 rounds, and 4"),
    ({"cohorts": np.full((4, 1), 6)}, "outside 0 to 5"),
    ({"y": np.full(36, 10)}, "must be 0 to 9"),
    ({"eval_idx": np.array([36])}, "eval_idx"),
])
def test_a_file_that_is_not_the_work_is_refused_in_one_sentence(tmp_path, change, words):
    held = arrays_of_w4() | change
    np.savez(tmp_path / "odd.npz", **{name: array for name, array in held.items() if array is not None})
    with pytest.raises(FlJaxError, match=words) as caught:
        load("W4", tmp_path / "odd.npz", ROUNDS + WARMUP)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("text.npz", "absent.npz"):
        with pytest.raises(FlJaxError, match=name):
            load("W4", tmp_path / name, 1)


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--lanes", "0"], ["--warmup", "0"], ["--resume", "--out", "x"]])
def test_wishes_that_cannot_be_met_are_refused(arguments):
    with pytest.raises(FlJaxError):
        cli.parse(speed.Config, arguments)


def test_the_command_line_reads_as_in_the_readme():
    config = cli.parse(speed.Config, ["--workload", "W2", "--rounds", "3", "--warmup", "2", "--lanes", "4", "--devices", "1", "--json"])
    assert config == speed.Config(workload="W2", rounds=3, warmup=2, lanes=4, devices=1, json=True)
    assert cli.parse(speed.Config, ["--lanes", "auto"]).lanes == "auto" and cli.parse(speed.Config, ["--quick"]).quick


def test_every_workload_is_fedavg(monkeypatch):
    seen = {}
    monkeypatch.setattr(algorithms, "fedavg", lambda model, optimizer, local, gradient, engine: seen.update(size=local.size, steps=local.steps(jnp.int32(45))))
    from experiments.benchmark.measure import fedavg
    from fl_jax.core import Engine

    for name, steps in {"W1": 5, "W4": 100}.items():
        fedavg(generate(name, 1), Engine())
        assert seen == {"size": 10, "steps": steps}
