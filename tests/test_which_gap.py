"""The study of the federation gap: shares that add up, gaps that are the rows' numbers, what is chosen by what, a small run."""

import dataclasses
import itertools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import which_gap
from experiments.common import chest_xrays, rate_grid
from experiments.common.chest_xrays import SITES
from experiments.which_gap import rates, tune
from experiments.which_gap_protocol import (
    CENTRALIZED,
    FEDERATED,
    HELD_OUT,
    LOCAL,
    LONG,
    MENDED,
    METRIC,
    OFFICIAL,
    POLICIES,
    RATE,
    SHORT,
    TRAINERS,
    Cell,
    Config,
    federations,
    kind,
)
from experiments.which_gap_report import ALL_ON, SWITCHES, Gaps, Tried, claims, shapley, stated
from fl_jax import models, norms
from fl_jax.data import Source
from fl_jax.errors import FlJaxError
from fl_jax.results import MetricRow, claims_table, frame, load_run, read_claims

pytestmark = pytest.mark.usefixtures("one_device")

CELLS = [Cell(budget, alike) for budget in (SHORT, LONG) for alike in (False, True)]
SMALL = Config(short=1, long=2, batch_size=16, width=2, seeds=2, tuning_seeds=1, rates=(0.02, 0.1), images=120)


def images(split):
    """Bright left halves are of one class."""
    count = {"train": 150, "validation": 40, "test": 60}[split]
    rng = np.random.default_rng(count)
    y = rng.permutation(np.arange(count) % 2).astype(np.int32)
    bright = (np.arange(28) < 14) == (y[:, None] == 1)
    x = rng.integers(0, 120, (count, 28, 28, 1)) + 60 * bright[:, None, :, None]
    return Source("halves", x.astype(np.uint8), y, ("left", "right"), (), ())


class Dense(nn.Module):
    """A network with BatchNorm that compiles in no time."""

    @nn.compact
    def __call__(self, x, *, train: bool):
        x = nn.Dense(4)(x.reshape(x.shape[0], -1))
        return nn.Dense(2)(nn.relu(models.batch_norm(train)(x)))


def dense(config):
    return models.bridge(Dense(), jnp.zeros((1, 28, 28, 1), jnp.uint8), models.softmax_cross_entropy, preprocess=models.images_uint8)


def test_shares_add_up_and_are_fair_to_switches():
    rng = np.random.default_rng(0)
    table = {on: rng.normal(size=4) for on in itertools.product((False, True), repeat=3)}
    shares = shapley(table.__getitem__, 3)
    np.testing.assert_allclose(sum(shares), table[False, False, False] - table[True, True, True])
    # by the formula over subsets, weights 1/3, 1/6, 1/6, 1/3
    a, b, c = (lambda *on: table[on]), 1 / 3, 1 / 6
    expected = b * (a(False, False, False) - a(True, False, False)) + c * (a(False, True, False) - a(True, True, False))
    expected = expected + c * (a(False, False, True) - a(True, False, True)) + b * (a(False, True, True) - a(True, True, True))
    np.testing.assert_allclose(shares[0], expected)
    # where switches do not interact, a share is what its switch does, and an idle one has none
    alone = shapley(lambda on: np.array([5.0 - 2.0 * on[0] - 1.0 * on[2]]), 3)
    np.testing.assert_allclose(np.concatenate(alone), [2.0, 0.0, 1.0], atol=1e-12)


def by_hand():
    """AUROC of two seeds in every cell: a number for each arm, budget, kind of hospitals and kind of images."""
    worth = {CENTRALIZED: 0.95, FEDERATED: 0.80, MENDED[0]: 0.84, MENDED[1]: 0.86, MENDED[2]: 0.85, LOCAL: 0.82}
    rows = []
    for arm, cell, seed, split in itertools.product(worth, CELLS, (0, 1), (HELD_OUT, OFFICIAL)):
        value = worth[arm] + (arm not in (CENTRALIZED, LOCAL)) * (0.03 * (cell.budget == LONG) + 0.02 * cell.alike) + 0.001 * seed
        value -= (split == OFFICIAL) * 0.1 * (arm == CENTRALIZED)
        for metric, site in itertools.product((METRIC, "accuracy"), ("mean", "worst", *SITES)):
            rows.append(MetricRow(f"{arm}, {kind(cell.alike)}", seed, 2 if cell.budget == LONG else 1, split, site, metric, value))
    return frame(rows)


def test_gaps_are_against_centralized_training_of_the_long_run():
    gaps = Gaps(by_hand(), SMALL)
    np.testing.assert_allclose(gaps.gap(FEDERATED, Cell(SHORT, False)), 0.15)
    np.testing.assert_allclose(gaps.on(OFFICIAL).gap(FEDERATED, Cell(SHORT, False)), 0.05)
    np.testing.assert_allclose(gaps.of_switches(ALL_ON), 0.95 - 0.86 - 0.05)
    shares = gaps.shares()
    np.testing.assert_allclose([shares[name].mean() for name in SWITCHES], [0.06, 0.03, 0.02], atol=1e-9)
    np.testing.assert_allclose(gaps.with_policy(MENDED[0]).on(OFFICIAL).shares()[SWITCHES[0]], 0.04, atol=1e-9)


def test_claims_are_of_the_shares_and_the_quick_ones_are_marked():
    full, quick = claims(Config()), claims(Config.quick_defaults())
    assert len(full) == 6 and not any(claim.quick for claim in full)
    assert quick and all(claim.quick for claim in quick) and {c.claim for c in quick} <= {c.claim for c in full}
    found = {claim.claim: law(Gaps(by_hand(), SMALL)).mean() for claim, law in stated(Config())}
    np.testing.assert_allclose([*found.values()], [0.15, 0.06, 0.06, 0.04, 0.06, 0.04], atol=2e-3)


@pytest.mark.parametrize("changes, sentence", [
    ({"long": 5, "short": 5}, "must be more than"), ({"long": 15, "short": 10}, "multiple"), ({"seeds": 0}, "1 or more"),
    ({"chosen": ((0.1, 0.1),) * 2}, "two learning rates"), ({"mended": "FedAvg"}, "mended must be one of"),
    ({"held_out": 1.0}, "held_out must be between"), ({"arms": (FEDERATED, MENDED[0], CENTRALIZED)}, "FedAvg, recalibrated and centralized among"),
])
def test_configurations_that_mean_nothing_are_refused(changes, sentence):
    with pytest.raises(FlJaxError, match=sentence):
        dataclasses.replace(Config(), **changes)


def test_the_policies_are_the_librarys():
    assert [policy.name for policy in POLICIES.values()] == [
        policy.name for policy in (norms.AVERAGED, norms.LOCAL_STATISTICS, norms.RECALIBRATED, norms.LOCAL)]


def test_held_out_images_are_of_the_training_ones_and_the_grid_has_no_test_images():
    config = dataclasses.replace(SMALL, images=100)
    measured, tuning = (federations(config, images, [0, 1], tuning=tuning)[False, 0] for tuning in (False, True))
    assert measured.train.sizes.sum() == 75 and measured.validation.sizes.sum() == 25 and measured.test.sizes.sum() == 60
    assert tuning.train.sizes.sum() == 100 and tuning.validation.sizes.sum() == 40 and tuning.test.sizes.sum() == 0
    assert not tuning.unseen_names
    # without calibration and noise an image is what it was: no held-out one is trained on
    plain = chest_xrays.to_measure(chest_xrays.Hospitals(2.0, 1.0, 0.0, 0.0, 0.0), 0, images, 0.25)
    train, held = ({image.tobytes() for image in records.x} for records in (plain.train, plain.validation))
    assert not train & held and len(train | held) == 150 and train | held == {image.tobytes() for image in images("train").x}
    assert [*federations(config, images, [0, 1], tuning=False)] == [(False, 0), (False, 1), (True, 0), (True, 1)]


def test_rates_follow_from_validation_scores_alone_and_the_policies_have_fedavgs():
    axes = {RATE: SMALL.rates}

    def tried(first, second):
        scores = np.array([[first], [second]])
        return dict.fromkeys(CELLS, Tried(scores, rate_grid.choose(axes, scores)))

    grids = {FEDERATED: tried(0.7, 0.6), LOCAL: tried(0.1, 0.2), CENTRALIZED: tried(0.1, 0.2)}
    found = rates(SMALL, grids)
    assert {found[arm][False] for arm in (FEDERATED, *MENDED)} == {0.02} and found[LOCAL][True] == 0.1
    fixed = dataclasses.replace(SMALL, chosen=((0.1, 0.2),) * len(TRAINERS))
    assert rates(fixed, {})[MENDED[0]] == {False: 0.1, True: 0.2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = dataclasses.replace(SMALL, chosen=((0.05, 0.05),) * len(TRAINERS), out=tmp_path_factory.mktemp("gap") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(which_gap, "network", dense)
        which_gap.run(config, images)
    return config, load_run(config.out)


@pytest.mark.slow
def test_a_run_leaves_claims_policies_and_figures(finished):
    config, left = finished
    assert [verdict.claim.claim for verdict in read_claims(config.out / "claims.json")] == [claim.claim for claim in claims(config)]
    assert {left.arms[arm]["BatchNorm"] for arm in POLICIES} == {policy.name for policy in POLICIES.values()}
    assert left.arms[CENTRALIZED]["clients"] == 1
    assert (config.out / "figures" / "shares.png").stat().st_size > 10_000
    assert left.summary["mended"] == MENDED[1] and len(left.summary["reading"]) >= 6


@pytest.mark.slow
def test_policies_differ_where_hospitals_do_and_the_averaged_model_is_one_for_all(finished):
    _, left = finished
    gaps = Gaps(left.metrics, SMALL)
    for cell in CELLS:
        assert len({gaps.values(arm, cell, "accuracy")[0] + gaps.values(arm, cell)[0] for arm in POLICIES}) > 1
    assert all(np.isfinite(gaps.values(arm, cell)).all() for arm in POLICIES for cell in CELLS)


@pytest.mark.slow
def test_the_grid_is_judged_after_either_budget_on_validation_images():
    seen = []

    def watched(split):
        seen.append(split)
        return images(split)

    tried = tune(SMALL, dense(SMALL), watched)
    assert "test" not in seen and set(tried) == {*TRAINERS}
    for of in tried.values():
        assert set(of) == set(CELLS) and all(found.scores.shape == (2, 1) for found in of.values())


@pytest.mark.slow
def test_the_quick_form_holds(quick_form):
    verdicts = read_claims(quick_form("which_gap", "pneumoniamnist") / "claims.json")
    assert len(verdicts) == 2 and all(verdict.holds for verdict in verdicts), claims_table(verdicts).text(120)
