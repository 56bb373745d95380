"""The study of sites of different ages: its federation, its grids, its claims."""

import dataclasses
import itertools

import numpy as np
import pandas as pd
import pytest

from experiments.common import rate_grid
from experiments.fedprox_recovers import RATE, STRENGTH, WITH_STRENGTH, Config, federation
from experiments.fedprox_recovers_report import ARMS, DITTO, FEDAVG, LOCAL, METRIC, PERSONAL, Measured, claims
from fl_jax.errors import FlJaxError


def test_a_site_has_one_age_group_and_the_grid_has_no_test_records():
    config = Config(patients=100)
    measured, tuning = federation(config, 0, tuning=False), federation(config, 1000, tuning=True)
    assert measured.test.y.shape == tuning.validation.y.shape == (200,)
    assert measured.validation.y.size == 0 and tuning.test.y.size == 0
    ages = [measured.train.x[a:b, 0] for a, b in zip(measured.train.offsets[:-1], measured.train.offsets[1:], strict=True)]
    assert all(young.max() < old.min() for young, old in itertools.pairwise(ages))


def test_without_interaction_a_site_has_the_same_coefficients_as_another():
    def slopes(interaction):
        records = federation(Config(patients=4000, measurements=2, interaction=interaction), 0, tuning=False).train
        cuts = zip(records.offsets[:-1], records.offsets[1:], strict=True)
        return np.array([np.linalg.lstsq(records.x[a:b, 1:], records.y[a:b] - 0.5, rcond=None)[0] for a, b in cuts])

    assert np.ptp(slopes(0.0), axis=0).max() < 0.05
    assert np.ptp(slopes(2.0), axis=0).max() > 0.2


def test_every_arm_has_a_grid_of_the_same_size():
    for config in (Config(), Config.quick_defaults()):
        assert len({len(rate_grid.points(config.axes(arm))) for arm in ARMS}) == 1
        assert {arm for arm in ARMS if STRENGTH in config.axes(arm)} == {*WITH_STRENGTH}
    with pytest.raises(FlJaxError, match="grid of the same size"):
        dataclasses.replace(Config(), rates=(0.1,))
    with pytest.raises(FlJaxError, match="patients must be at least 20"):
        Config(patients=3)


def test_the_best_arm_is_chosen_on_validation_and_judged_at_its_least_site():
    sites = {"age 20 to 35": 0.0, "age 35 to 50": -0.1, "mean": -0.05, "worst": -0.1}
    rows = [{"arm": arm, "seed": seed, "round": 1, "split": "test", "site": site, "metric": METRIC, "note": "",
             "value": 0.8 + (gain if arm == DITTO else 0.0)} for arm in ARMS for seed in range(2) for site, gain in sites.items()]
    chosen = {arm: rate_grid.Choice({RATE: 0.1}, 0.9 if arm == DITTO else 0.7, ()) for arm in ARMS}
    measured = Measured(pd.DataFrame(rows), chosen)
    assert measured.best == DITTO and DITTO in PERSONAL
    np.testing.assert_allclose(measured.least_gain(), -0.1)
    np.testing.assert_allclose(measured.minus(FEDAVG, LOCAL), 0)


def test_the_quick_claims_are_marked():
    quick, full = claims(Config.quick_defaults()), claims(Config())
    assert [claim.claim for claim in quick] == [claim.claim for claim in full]
    assert all(claim.quick for claim in quick) and not any(claim.quick for claim in full)
