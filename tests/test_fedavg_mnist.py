"""Rounds to target: the crossing, the federations of images, the choice of a rate, and the study on small images that stand in for MNIST."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import fedavg_mnist, fedavg_mnist_protocol
from experiments.common.mnist import classifier, stacked, to_choose, to_measure, unit_pixels
from experiments.fedavg_mnist_protocol import (
    PROBLEMS,
    Config,
    Setting,
    at_least,
    at_most,
    by_chance,
    claims,
    crossings,
    two_shards,
)
from fl_jax import data, models
from fl_jax.data import Source
from fl_jax.errors import FlJaxError
from fl_jax.results import Direction, load_run, read_claims
from fl_jax.results.crossing import rounds_to_target, running_best

pytestmark = pytest.mark.usefixtures("one_device")

SIDE, CLASSES, TRAIN, TEST = 8, 4, 1200, 200
PATTERNS = np.random.default_rng(5).integers(0, 128, (CLASSES, SIDE, SIDE, 1), dtype=np.uint8)


def images(split):
    """Noisy images of four patterns; each carries its number in two pixels, so that it can be found again."""
    rng, number = np.random.default_rng({"train": 0, "test": 1}[split]), {"train": TRAIN, "test": TEST}[split]
    y = rng.integers(0, CLASSES, number).astype(np.int32)
    x = PATTERNS[y] + rng.integers(0, 128, (number, SIDE, SIDE, 1), dtype=np.uint8)
    x[:, 0, 0, 0], x[:, 0, 1, 0] = np.arange(number) // 256, np.arange(number) % 256
    return Source("patterns", x, y, tuple("abcd"), (), (f"{number} images.",))


def numbers(x):
    return np.asarray(x[..., 0, 0, 0], int) * 256 + np.asarray(x[..., 0, 1, 0], int)


def test_a_crossing_is_interpolated_on_the_best_so_far():
    values = [0.2, 0.6, 0.4, 0.5, 0.8, 0.7]
    rounds = [1, 2, 3, 4, 6, 7]
    assert running_best(values).tolist() == [0.2, 0.6, 0.6, 0.6, 0.8, 0.8]
    assert rounds_to_target(rounds, values, 0.4) == pytest.approx(1.5)
    assert rounds_to_target(rounds, values, 0.7) == pytest.approx(5.0)  # half of the way from .6 at 4 to .8 at 6
    assert rounds_to_target(rounds, values, 0.6) == pytest.approx(2.0)
    assert rounds_to_target(rounds, values, 0.1) == 1.0
    assert np.isnan(rounds_to_target(rounds, values, 0.81))
    assert rounds_to_target([3, 4], [np.nan, 0.5], 0.4) == 4.0 and rounds_to_target([1, 2, 3], [0.2, np.nan, 0.4], 0.3) == pytest.approx(2.5)


def test_crossings_are_monotone_and_measuring_more_often_does_not_see_them_later():
    rng = np.random.default_rng(0)
    values = np.cumsum(rng.normal(0.02, 0.1, 60))
    rounds = np.arange(1, 61)
    found = [rounds_to_target(rounds, values, target) for target in np.linspace(values[0], values.max(), 30)]
    assert (np.diff(found) >= 0).all() and not np.isnan(found).any()
    seldom = slice(4, None, 5)
    for target in np.linspace(values[0], values[seldom].max(), 30):
        between = rounds_to_target(rounds[seldom], values[seldom], target)
        assert rounds_to_target(rounds, values, target) <= 5 * np.ceil(between / 5)  # the round in which that was seen


@pytest.mark.parametrize("rounds", [[1, 1], [2, 1], [1, 2, 3]])
def test_rounds_that_do_not_ascend_are_one_sentence(rounds):
    with pytest.raises(FlJaxError, match="a value for each of its ascending rounds"):
        rounds_to_target(rounds, [0.1, 0.2], 0.1)


def test_federations_deal_the_official_sets_and_never_choose_by_the_test_images():
    measured, chosen = (make(images, by_chance, 3, *rest) for make, rest in ((to_measure, ()), (to_choose, (0.25,))))
    assert measured.num_sites == chosen.num_sites == 100
    assert measured.validation.sizes.sum() == 0 and chosen.test.sizes.sum() == 0 and len(chosen.test.x) == 0
    assert set(measured.train.sizes) == {12} and set(chosen.validation.sizes) == {3} and set(chosen.train.sizes) == {9}
    np.testing.assert_array_equal(np.sort(numbers(measured.test.x)), np.arange(TEST))
    np.testing.assert_array_equal(np.sort(numbers(measured.train.x)), np.arange(TRAIN))
    for i in (0, 57):  # the same images at a client, whichever of the two it is
        whole, kept, held = (numbers(records.x[slice(*records.offsets[i : i + 2])]) for records in
                             (measured.train, chosen.train, chosen.validation))
        assert sorted(whole) == sorted([*kept, *held])
    other = to_measure(images, by_chance, 4)
    assert not np.array_equal(numbers(other.train.x), numbers(measured.train.x))


def test_two_shards_give_a_client_two_runs_of_the_sorted_labels():
    site = two_shards(np.random.default_rng(0), images("train").y)
    labels = [np.unique(images("train").y[site == i]).size for i in range(100)]
    assert max(labels) <= 4 and np.mean(labels) < 2.2


def test_stacked_draws_share_one_table():
    draws = [to_choose(images, by_chance, seed, 0.25) for seed in range(3)]
    splits, padded = stacked(draws), data.stack(draws)
    assert splits.train.x.shape == (1, 2700, SIDE, SIDE, 1) and splits.train.offset.shape == (3, 100)
    for s in range(3):
        for name in ("train", "validation"):
            ours, theirs = getattr(splits, name), getattr(padded, name)
            np.testing.assert_array_equal(ours.size[s], theirs.size[s])
            for i in (0, 99):
                first, at = int(ours.offset[s, i]), int(theirs.offset[s, i])
                rows, others = slice(first, first + int(ours.size[s, i])), slice(at, at + int(ours.size[s, i]))
                np.testing.assert_array_equal(ours.x[0, rows], theirs.x[s, others])
                np.testing.assert_array_equal(ours.y[0, rows], theirs.y[s, others])


def test_pixels_are_scaled_to_the_unit_interval():
    np.testing.assert_allclose(unit_pixels(np.array([0, 51, 255], np.uint8)), [0, 0.2, 1])
    model = classifier(models.LogisticRegression(CLASSES), (SIDE, SIDE, 1))
    variables = model.init(jax.random.key(0))
    x = images("test").x[:3]
    expected = x.reshape(3, -1) / 255 @ np.asarray(variables.params["Dense_0"]["kernel"])
    np.testing.assert_allclose(model.predict(variables, x), expected, atol=1e-5)


def test_the_full_form_claims_the_published_rounds_within_a_factor_of_one_and_a_half():
    found = {claim.claim: claim for claim in claims(Config())}
    published = {"2NN, IID: rounds to 97 %": 87, "2NN, two shards: rounds to 97 %": 664, "CNN, IID: rounds to 99 %": 20}
    upper_bars = {claim.claim: claim.published for claim in found.values() if claim.direction is Direction.AT_MOST}
    assert upper_bars == {f"{text}, at most": rounds for text, rounds in published.items()}
    for text, rounds in published.items():
        upper, lower = found[f"{text}, at most"], found[f"{text}, at least"]
        assert upper.admits(1.499 * rounds) and not upper.admits(1.501 * rounds)
        assert lower.admits(rounds / 1.499) and not lower.admits(rounds / 1.501)
    assert len(found) == 6 and not any(claim.quick for claim in found.values())
    for problem in PROBLEMS:  # a run long enough to show that a claim does not hold
        assert problem.setting(Config()).rounds >= 1.5 * problem.rounds


def test_the_quick_form_has_the_published_bar_or_one_that_is_marked():
    found = claims(Config.quick_defaults())
    assert [claim.quick for claim in found] == [False, False, True]
    assert "two shards" in found[-1].claim and not found[-1].admits(58)
    for problem in fedavg_mnist_protocol.problems(Config.quick_defaults()):
        setting, full = problem.setting(Config.quick_defaults()), problem.setting(Config())
        assert len(setting.rates) == 1 and setting.rates[0] in full.rates and setting.epochs == full.epochs


SMALL = Setting(0.75, 1, (0.002, 0.05, 20.0), 4, 9, 2, 3)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The study on the small images, with logistic regression in the place of the networks: configuration and run folder."""
    folder = tmp_path_factory.mktemp("study")
    config = Config(validation=0.25, cohort=4, batch_size=4, two_nn_iid=SMALL, out=folder / "run",
                    two_nn_shards=dataclasses.replace(SMALL, rates=(0.05,), target=0.999, rounds=2),
                    cnn_iid=dataclasses.replace(SMALL, rounds=0))
    with pytest.MonkeyPatch.context() as patch:
        _small(patch)
        fedavg_mnist.run(config, images)
        yield config, load_run(config.out)


def _small(patch):
    small = tuple(problem._replace(
        network=lambda: models.LogisticRegression(CLASSES), target=problem.setting(SMALL_TARGETS).target) for problem in PROBLEMS)
    patch.setattr(fedavg_mnist_protocol, "PROBLEMS", small)


SMALL_TARGETS = Config(two_nn_iid=SMALL, two_nn_shards=dataclasses.replace(SMALL, target=0.999))


@pytest.mark.slow
def test_claims_are_judged_by_the_rounds_of_the_metrics(study):
    _, run = study
    verdicts = {verdict.claim.claim: verdict for verdict in read_claims(run.path / "claims.json")}
    tests = run.metrics[(run.metrics["metric"] == "accuracy") & (run.metrics["split"] == "test") & (run.metrics["site"] == "all")]
    iid = tests[tests["arm"] == "2NN, IID"]
    expected = [rounds_to_target(one["round"], one["value"], 0.75) for _, one in iid.groupby("seed")]
    text = at_most(PROBLEMS[0], 0.75)
    assert text == "2NN, IID: rounds to 75 %, at most" and verdicts[text].measured == pytest.approx(np.mean(expected)) and verdicts[text].seeds == 2
    assert verdicts[text].holds and verdicts[at_least(PROBLEMS[0], 0.75)].holds is False  # these images are easier than digits
    np.testing.assert_allclose(crossings(run.metrics, "2NN, IID", 0.75), expected)
    # ended with the block in which the last seed crossed; without a crossing, after all rounds
    assert iid["round"].max() == 3 * np.ceil(max(expected) / 3)
    missed = verdicts[at_most(PROBLEMS[1], 0.999)]
    assert missed.measured is None and missed.holds is False and "2 of 2 seeds have no value" in missed.cause
    assert tests[tests["arm"] == "2NN, two shards"]["round"].max() == 2


@pytest.mark.slow
def test_the_rate_is_chosen_by_validation_images(study):
    _, run = study
    rows = run.metrics[run.metrics["arm"].str.contains("choosing")]
    assert {*rows["arm"]} == {f"2NN, IID, choosing, learning rate {rate}" for rate in ("0.002", "0.05", "20")} and {*rows["seed"]} == {0}
    assert not rows[(rows["split"] == "test") & rows["value"].notna()].size
    summary = json.loads((run.path / "summary.json").read_text())["problems"]["2NN, IID"]
    pooled = rows[(rows["split"] == "validation") & (rows["site"] == "all")]
    best = {float(arm.split()[-1]): np.maximum.accumulate(one.sort_values("round")["value"])[2:].mean() for arm, one in pooled.groupby("arm")}
    assert {float(rate): tried["score"] for rate, tried in summary["grid"].items()} == pytest.approx(best)
    middle = pooled[pooled["arm"].str.endswith("0.05")].sort_values("round")
    assert summary["grid"]["0.05"]["rounds"] == pytest.approx(rounds_to_target(middle["round"], middle["value"], 0.75))
    assert summary["learning_rate"] == max(best, key=best.__getitem__)
    assert summary["at_edge_of_grid"] is (summary["learning_rate"] != 0.05)
    assert summary["megabytes_of_a_round"] == pytest.approx(2 * 4 * 4 * (SIDE * SIDE + 1) * CLASSES / 1e6)  # clients x float32
    assert (run.path / "figures" / "accuracy_over_rounds.png").stat().st_size > 10_000


def test_blocks_that_end_early_change_no_run(study, tmp_path):
    """Nine rounds in blocks of three, resumed, are nine rounds."""
    config, run = study
    whole = dataclasses.replace(
        config, out=tmp_path / "run", two_nn_iid=dataclasses.replace(SMALL, rates=(0.05,), extend=100),
        two_nn_shards=dataclasses.replace(SMALL, rounds=0))
    fedavg_mnist.run(whole, images)
    if json.loads((run.path / "summary.json").read_text())["problems"]["2NN, IID"]["learning_rate"] != 0.05:
        pytest.fail("choose the small rates so that .05 is the best")
    rows, again = (one[(one["arm"] == "2NN, IID") & (one["site"] == "all")].set_index(["seed", "round", "split", "metric"])["value"]
                   for one in (run.metrics, load_run(whole.out).metrics))
    np.testing.assert_array_equal(again.loc[rows.index], rows)


def test_a_setting_that_makes_no_sense_is_one_sentence():
    for changes, words in ({"rates": ()}, "rates"), ({"target": 97.0}, "target"), ({"extend": 0}, "extend"):
        with pytest.raises(FlJaxError, match=f"^{words} must be"):
            dataclasses.replace(SMALL, **changes)
    with pytest.raises(FlJaxError, match="validation must be a share"):
        Config(validation=0.0)


@pytest.mark.slow
def test_the_quick_form_reaches_its_bars(quick_form):
    verdicts = read_claims(quick_form("fedavg_mnist", "mnist") / "claims.json")
    assert len(verdicts) == 3 and not any(verdict.broken for verdict in verdicts), verdicts
    at_34 = verdicts[0]  # where plain NumPy crosses too, and a tenth to either side of it
    assert at_34.measured == pytest.approx(35, rel=0.1), at_34
