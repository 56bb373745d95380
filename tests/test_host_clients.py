"""An arm whose clients' state lies on the host gives the rows, the states and the resumed runs of one on the device."""

import jax
import numpy as np
import optax
import pandas as pd
import pytest

from fl_jax import algorithms, batches, data, deployment, host_clients, sampling, training
from fl_jax.metrics import CLASSIFICATION
from fl_jax.results import RunFolder
from fl_jax.sweep import run_mesh

SITES, UNSEEN, SEEDS, ROUNDS = tuple("abcde"), ("v", "w"), [3, 4], 4
SGD, WORK, FULL = optax.sgd(0.1), batches.epochs(1, 4), batches.epochs(1, 16)
METRICS = {name: CLASSIFICATION[name] for name in ("loss", "accuracy")}  # of the predictions; others take long to compile
SIZES = np.array([14, 6, 21, 9, 17, 12, 10])


def dataset(seed: int, support: int | None):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(SIZES.sum(), 4)).astype(np.float32)
    y = (x @ rng.normal(size=(4, 3))).argmax(1).astype(np.int32)
    made = data.from_arrays(x, y, np.repeat([*SITES, *UNSEEN], SIZES), unseen=UNSEEN, seed=seed)
    return made if support is None else data.with_support(made, support, seed)


def some_of_them(sites):
    return sampling.with_dropouts(sampling.fixed_size(3, len(SITES)), 0.3)


def by_coins(sites):
    """A cohort whose places are not all taken: those of nobody have an id beyond the last client's."""
    return sampling.poisson(0.4, len(SITES), capacity=4)


@pytest.fixture(scope="module")
def fitted(plain_model, normed_model):
    """(build, support) -> the fits of an arm on the device and on the host."""

    def fit(build, support=None, folder=None, resume=False, rounds=ROUNDS, mesh=None, which=(False, True), cohorts=some_of_them,
            normed=False):
        model = normed_model if normed else plain_model
        splits = data.stack([dataset(seed, support) for seed in SEEDS])
        study = training.Study(model, splits, SITES, UNSEEN, rounds, 2, chunk=8, metrics=METRICS, mesh=mesh)
        arms = [training.Arm(f"on host {host}", lambda _: build(model), cohorts, clients_on_host=host) for host in which]
        fits = training.fit(study, arms, SEEDS, training.seeds_of(SEEDS, stacked=True), progress=False, folder=folder, resume=resume)
        return [fits[arm.name] for arm in arms]

    return fit


def alike(device, host):
    rows = [fit.rows.drop(columns="arm") for fit in (device, host)]
    pd.testing.assert_frame_equal(rows[0], rows[1], rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), device.state, host.state)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(host.state.clients))
    assert device.payload == host.payload


def ditto(model):
    return algorithms.ditto(model, SGD, WORK, 0.5)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(host_clients, "GROUP", 2)  # the last group is not full


@pytest.mark.parametrize("build, choices", [
    (ditto, {"cohorts": by_coins, "rounds": 8}),
    (lambda model: algorithms.fedbn(model, SGD, WORK, deploy=deployment.fine_tuned(model, SGD, FULL)),
     {"support": 3, "normed": True}),
    (lambda model: algorithms.local_only(model, SGD, WORK), {"support": 3}),
    (lambda model: algorithms.scaffold(model, 0.1, WORK), {"mesh": run_mesh(2)}),
], ids=["Ditto, donors, and places of nobody", "tuned FedBN and newcomers", "local-only newcomers", "SCAFFOLD on a mesh"])
def test_results_are_those_of_state_on_the_device(fitted, build, choices):
    alike(*fitted(build, **choices))


def test_a_run_that_goes_on_from_its_checkpoint_equals_one_that_was_not_stopped(fitted, tmp_path):
    choices = {"which": (True,), "cohorts": by_coins}
    (whole,) = fitted(ditto, **choices)
    folder = RunFolder.create(tmp_path / "run", {})
    fitted(ditto, rounds=2, folder=folder, **choices)
    (resumed,) = fitted(ditto, folder=folder, resume=True, **choices)
    pd.testing.assert_frame_equal(whole.rows, resumed.rows)
    jax.tree.map(np.testing.assert_array_equal, whole.state, resumed.state)
