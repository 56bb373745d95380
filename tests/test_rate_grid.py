"""Grids of learning rates: which run tries what, and which point is chosen by what."""

import itertools

import jax
import numpy as np
import optax
import pandas as pd
import pytest

from experiments.common import rate_grid
from fl_jax import algorithms, batches, data, sampling, training
from fl_jax.errors import FlJaxError
from fl_jax.metrics import CLASSIFICATION
from fl_jax.results import MetricRow
from fl_jax.results.run_folder import frame

AXES = {"client": (0.01, 0.1, 1.0), "server": (0.5, 2.0)}


def rows_of(axes, scores, rounds=(1, 2)):
    """Validation accuracy of each point and seed in each round: its score and what sums to 0; other rows say the reverse."""
    found = []
    for point, of_seeds in zip(rate_grid.points(axes), scores, strict=True):
        arm = f"a{rate_grid.suffix(point)}"
        for seed, score in enumerate(of_seeds):
            for round, shift in zip(rounds, np.linspace(-0.05, 0.05, len(rounds)), strict=True):
                found.append(MetricRow(arm, seed, round, "validation", "all", "accuracy", score + shift))
                found += [MetricRow(name, seed, round, split, site, metric, -score) for name, split, site, metric in (
                    (arm, "test", "all", "accuracy"), (arm, "validation", "mean", "accuracy"), (arm, "validation", "all", "loss"),
                    (f"other{arm}", "validation", "all", "accuracy"))]
    return frame(found).sample(frac=1, random_state=0)


def test_runs_are_the_product_of_points_and_seeds():
    seeds = training.seeds_of([7, 8, 9], stacked=True)
    runs = rate_grid.rows(AXES, seeds)
    keys = jax.random.key_data(seeds.key)
    expected = [(c, s, seed) for c, s in itertools.product(*AXES.values()) for seed in range(3)]
    found = zip(runs.hyper["client"].tolist(), runs.hyper["server"].tolist(), runs.data.tolist(), strict=True)
    np.testing.assert_allclose([*found], expected, rtol=1e-6)
    np.testing.assert_array_equal(jax.random.key_data(runs.key), keys[np.array([seed for *_, seed in expected])])
    assert rate_grid.points(AXES)[4] == {"client": 1.0, "server": 0.5}
    variants, labels = rate_grid.labels(AXES, [7, 8, 9])
    assert labels == [7, 8, 9] * 6 and variants[:4] == [", client 0.01, server 0.5"] * 3 + [", client 0.01, server 2"]
    assert len({*zip(variants, labels, strict=True)}) == 18


def test_the_best_mean_on_validation_records_is_chosen():
    scores = np.array([[0.1, 0.2], [0.2, 0.3], [0.5, 0.6], [0.9, 0.1], [0.0, 0.0], [0.4, 0.5]])
    found = rate_grid.validation_scores(AXES, rows_of(AXES, scores), "a", "accuracy")
    np.testing.assert_allclose(found, scores)
    choice = rate_grid.choose(AXES, found)
    assert choice.point == {"client": 0.1, "server": 0.5} and choice.score == pytest.approx(0.55)
    assert choice.edges == ("server",)


def test_a_score_is_the_mean_of_the_rounds_that_follow():
    axes = {"client": (1.0, 2.0)}
    found = rate_grid.validation_scores(axes, rows_of(axes, [[0.3], [0.5]], rounds=(2, 4, 6)), "a", "accuracy", after=2)
    np.testing.assert_allclose(found, [[0.325], [0.525]])


def test_a_point_that_diverged_in_one_seed_is_not_chosen():
    axes = {"client": (1.0, 2.0)}
    assert rate_grid.choose(axes, [[0.9, np.nan], [0.2, 0.3]]).point == {"client": 2.0}
    metrics = rows_of(axes, [[0.9, 0.9], [0.2, 0.2]])
    metrics.loc[(metrics["arm"] == "a, client 1") & (metrics["seed"] == 1) & (metrics["round"] == 1), "value"] = np.nan
    assert np.isnan(rate_grid.validation_scores(axes, metrics, "a", "accuracy")).tolist() == [[False, True], [False, False]]
    arm, rounds = "a, client 2", [MetricRow("a, client 1", 1, 1, "round", "all", "participants", 0.0)]  # nobody was asked
    rounds += [MetricRow(arm, 1, r, "round", "all", name, float(value)) for r, came in ((1, 3), (2, 0)) for name, value in (
        ("participants", came), ("nonfinite", 3 - came))]
    rounds += [MetricRow("a, client 1", 1, 1, "round", "all", "nonfinite", 0.0)]
    metrics = pd.concat([rows_of(axes, [[0.9, 0.9], [0.2, 0.2]]), frame(rounds)])
    assert np.isnan(rate_grid.validation_scores(axes, metrics, "a", "accuracy")).tolist() == [[False, False], [False, True]]
    with pytest.raises(FlJaxError, match="lower the rates"):
        rate_grid.choose(axes, [[np.nan, 0.1], [0.1, np.nan]])


@pytest.mark.parametrize(("best", "edges"), [(0, ("client",)), (1, ()), (2, ("client",))])
def test_the_edge_is_the_least_and_the_largest_of_several_values(best, edges):
    axes = {"client": (0.1, 0.2, 0.3), "server": (1.0,)}
    assert rate_grid.choose(axes, np.eye(3)[:, [best]]).edges == edges


def test_what_is_no_grid_is_one_sentence():
    with pytest.raises(FlJaxError, match="at least one hyper-parameter"):
        rate_grid.points({})
    with pytest.raises(FlJaxError, match="client in a grid must ascend"):
        rate_grid.points({"client": (0.1, 0.1)})
    with pytest.raises(FlJaxError, match="a score of each"):
        rate_grid.choose(AXES, [[1.0]])
    metrics = rows_of(AXES, np.ones((6, 2)))
    for gone in (metrics["arm"] == "a, client 1, server 2", (metrics["arm"] == "a, client 1, server 2") & (metrics["seed"] == 1),
                 (metrics["arm"] == "a, client 1, server 2") & (metrics["round"] == 1)):
        with pytest.raises(FlJaxError, match="is not complete|no such metrics"):
            rate_grid.validation_scores(AXES, metrics[~gone], "a", "accuracy")


def test_a_run_of_the_grid_is_the_run_with_that_rate_alone(plain_model):
    rng = np.random.default_rng(0)
    x, site = rng.normal(size=(60, 4)).astype(np.float32), np.arange(60) % 3
    dataset = data.from_arrays(x, (x[:, 0] > 0).astype(np.int32), site, num_classes=3, validation=0.3, test=0.2)
    metrics = {"accuracy": CLASSIFICATION["accuracy"]}
    study = training.Study(plain_model, data.stack([dataset]), dataset.site_names, (), 2, 2, metrics=metrics)

    def arm(build):
        return training.Arm("a", build, lambda sites: sampling.everyone())

    work = batches.epochs(1, 5)
    seeds = training.seeds_of([3, 4], stacked=False)
    axes = {"client": (0.01, 0.3), "server": (0.5, 1.0)}
    of_grid = arm(lambda hyper: algorithms.fedavg(
        plain_model, optax.sgd(hyper["client"]), work, server=optax.sgd(hyper["server"])))
    tried = training.fit(study, [of_grid], range(8), rate_grid.rows(axes, seeds))["a"]
    alone = training.fit(study, [arm(lambda _: algorithms.fedavg(
        plain_model, optax.sgd(0.3), work, server=optax.sgd(0.5)))], [3, 4], seeds)["a"]
    for every, one in zip(jax.tree.leaves(tried.state.shared), jax.tree.leaves(alone.state.shared), strict=True):
        np.testing.assert_allclose(every[4:6], one, atol=1e-6)
        assert not np.allclose(every[6:8], one, atol=1e-4)
