"""The study of sites of different ages: its federation, its grids, its claims, a small run."""

import dataclasses
import itertools

import numpy as np
import pytest

from experiments import fedprox_recovers
from experiments.common import rate_grid
from experiments.fedprox_recovers import given
from experiments.fedprox_recovers_protocol import (
    ARMS,
    DITTO,
    FEDAVG,
    FEDPER,
    FEDPROX,
    LINEAR,
    LOCAL,
    NETWORK,
    RATE,
    SCAFFOLD,
    STRENGTH,
    WITH_STRENGTH,
    Config,
    claims,
    federation,
    stated,
)
from experiments.fedprox_recovers_report import METRIC, Measured
from fl_jax.errors import FlJaxError
from fl_jax.results import MetricRow, claims_table, frame, load_run, read_claims

pytestmark = pytest.mark.usefixtures("one_device")

SMALL = Config(
    rounds=4, evaluate_every=2, epochs=1, patients=60, support=30, measurements=2, interaction=1.0, rates=(0.1, 0.3), few_rates=(0.3,),
    strengths=(0.1, 1.0), seeds=2, tuning_seeds=1, models=(LINEAR,), arms=(LOCAL, FEDAVG, FEDPROX, SCAFFOLD, DITTO))
SITES = ("age 20 to 35", "age 35 to 50", "age 50 to 65", "age 65 to 80")


def test_a_site_has_one_age_group_and_the_grid_has_no_test_records():
    config = Config(patients=100, support=20)
    measured, tuning = federation(config, 0, tuning=False), federation(config, 1000, tuning=True)
    assert measured.test.y.shape == tuning.validation.y.shape == (200,)
    assert measured.validation.y.size == 0 and tuning.test.y.size == 0
    assert measured.site_names == tuning.site_names == SITES
    assert measured.unseen_names == ("age 80 to 95",) and measured.support == (20,) and not tuning.unseen_names
    ages = [measured.train.x[a:b, 0] for a, b in itertools.pairwise(measured.train.offsets)]
    assert all(young.max() < old.min() for young, old in itertools.pairwise([*ages, measured.unseen.x[:, 0]]))


def test_without_interaction_a_site_has_the_same_coefficients_as_another():
    def slopes(interaction):
        records = federation(Config(patients=4000, measurements=2, interaction=interaction), 0, tuning=False).train
        return np.array([np.linalg.lstsq(records.x[a:b, 1:], records.y[a:b] - 0.5, rcond=None)[0] for a, b in itertools.pairwise(records.offsets)])

    assert np.ptp(slopes(0.0), axis=0).max() < 0.05
    assert np.ptp(slopes(2.0), axis=0).max() > 0.2


def test_every_arm_has_a_grid_of_the_same_size():
    for config in (Config(), Config.quick_defaults()):
        assert len({len(rate_grid.points(config.axes(arm))) for arm in ARMS}) == 1
        assert {arm for arm in ARMS if STRENGTH in config.axes(arm)} == {*WITH_STRENGTH}
    assert FEDPER in Config().arms_of(NETWORK) and FEDPER not in Config().arms_of(LINEAR)


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"rates": (0.1,)}, "grid of the same size"), ({"patients": 3, "support": 1}, "patients must be at least 20"),
    ({"support": 60}, "support must leave some"), ({"arms": (LOCAL, FEDAVG, FEDPROX, SCAFFOLD)}, "a personalised one"),
    ({"models": ("tree",)}, "models must be"), ({"chosen": ((0.1,),)}, "chosen must have")])
def test_mistakes_are_one_sentence(changes, sentence):
    with pytest.raises(FlJaxError, match=sentence):
        dataclasses.replace(SMALL, **changes)


def test_chosen_points_are_read_in_the_order_of_models_and_arms():
    config = dataclasses.replace(
        SMALL, models=(LINEAR, NETWORK), chosen=(
            (0.1,), (0.2,), (0.3, 1.0), (0.4,), (0.6, 2.0), (0.7,), (0.8,), (0.9, 3.0), (1.0,), (1.2, 4.0)))
    points = given(config)
    assert points[LINEAR][FEDPROX].point == {RATE: 0.3, STRENGTH: 1.0} and points[NETWORK][DITTO].point == {RATE: 1.2, STRENGTH: 4.0}
    assert given(SMALL) == {}


def test_the_best_arm_is_chosen_on_validation_and_judged_at_its_least_site():
    gains = {SITES[0]: 0.0, SITES[1]: -0.1, SITES[2]: 0.3, SITES[3]: 0.2, "mean": 0.1}
    rows = [MetricRow(arm, seed, 1, "test", site, METRIC, 0.6 + gain * (arm == DITTO) + 0.01 * (arm == FEDPROX))
            for arm in SMALL.arms for seed in range(2) for site, gain in gains.items()]
    chosen = {arm: rate_grid.Choice({RATE: 0.1}, 0.9 if arm == DITTO else 0.7, ()) for arm in SMALL.arms}
    measured = Measured(SMALL.arms, federation(SMALL, 0, tuning=False), frame(rows), chosen)
    assert measured.best == DITTO
    np.testing.assert_allclose(measured.least_gain(), -0.1)
    found = [law({LINEAR: measured}).mean() for _, law in stated(SMALL)]
    np.testing.assert_allclose(found, [0.0, 0.01, 0.0, 0.1, -0.1], atol=1e-12)


def test_the_quick_claims_are_marked():
    quick, full = claims(Config.quick_defaults()), claims(Config())
    assert {claim.claim for claim in quick} < {claim.claim for claim in full}
    assert all(claim.quick for claim in quick) and not any(claim.quick for claim in full)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = dataclasses.replace(SMALL, out=tmp_path_factory.mktemp("ages") / "run")
    fedprox_recovers.run(config)
    return config, load_run(config.out)


@pytest.mark.slow
def test_what_is_written_is_what_the_rows_say(finished):
    config, run = finished
    rows = run.metrics[(run.metrics["round"] == 4) & (run.metrics["split"] == "test") & (run.metrics["metric"] == METRIC)]
    mean = rows[rows["site"] == "mean"].groupby("arm")["value"].mean()
    verdicts = {verdict.claim.claim: verdict for verdict in read_claims(config.out / "claims.json")}
    assert [*verdicts] == [claim.claim for claim in claims(config)]
    verdict = verdicts[f"FedAvg minus local only, {LINEAR}, mean of the sites, AUROC"]
    assert verdict.measured == pytest.approx(mean[f"{FEDAVG}, {LINEAR}"] - mean[f"{LOCAL}, {LINEAR}"])
    chosen = run.summary["models"][LINEAR]["arms"]
    assert {arm: [*point["point"]] for arm, point in chosen.items()} == {arm: [*config.axes(arm)] for arm in config.arms}
    assert {path.stem for path in (run.path / "figures").glob("*.png")} == {"auroc_per_site_logistic", "auroc_over_rounds_logistic"}
    assert not any("nan" in sentence for sentence in run.summary["reading"])


@pytest.mark.slow
def test_the_grid_is_judged_on_validation_records_of_other_seeds(finished):
    _, run = finished
    grid = run.metrics[run.metrics["arm"].str.startswith("grid of ")]
    assert {*grid["seed"]} == {1000} and grid[grid["split"].isin(("test", "unseen"))]["value"].isna().all()
    last = grid[(grid["round"] == 4) & (grid["split"] == "validation") & (grid["site"] == "mean") & (grid["metric"] == METRIC)].set_index("arm")["value"]
    of = {rate: last[f"grid of {FEDAVG}, {LINEAR}, learning rate {rate:g}"] for rate in SMALL.rates}
    assert run.summary["models"][LINEAR]["arms"][FEDAVG]["point"][RATE] == max(of, key=of.__getitem__)


@pytest.mark.slow
def test_the_quick_form_holds(quick_form):
    verdicts = read_claims(quick_form("fedprox_recovers", "") / "claims.json")
    assert verdicts and all(verdict.holds for verdict in verdicts if verdict.claim.expected), claims_table(verdicts).text(120)
