"""A claim's verdict, and claims.json."""

import dataclasses
import json

import numpy as np
import pytest

from fl_jax.errors import FlJaxError
from fl_jax.results.claims import Claim, Direction, claims_table, failed, judge, not_run, read_claims, record, write_claims

FIELDS = ["study", "claim", "source", "published", "direction", "tolerance", "reason", "measured", "low", "high", "seeds", "holds",
          "expected", "cause", "quick"]


def claim(text="the mean is one half", direction=Direction.WITHIN, **changes):
    stated = {"claim": text, "source": "Table 1", "published": 0.5, "direction": direction, "tolerance": 0.1, "reason": "seeds vary by .1"}
    return Claim(**stated | changes)


def verdict(values, **changes):
    return judge("study", [claim(**changes)], {"the mean is one half": values})[0]


@pytest.mark.parametrize(("direction", "holds"), [
    (Direction.WITHIN, [False, True, True, True, False]),
    (Direction.AT_LEAST, [False, True, True, True, True]),
    (Direction.AT_MOST, [True, True, True, True, False]),
])
def test_the_direction_says_which_side_may_be_missed_by_more_than_the_tolerance(direction, holds):
    assert [verdict([value, value], direction=direction).holds for value in (0.39, 0.41, 0.5, 0.59, 0.61)] == holds


def test_the_mean_over_seeds_is_judged_and_its_t_interval_reported():
    found = verdict([0.2, 0.4, 0.9])
    half = 4.302652729911275 * np.std([0.2, 0.4, 0.9], ddof=1) / np.sqrt(3)  # t of 2 degrees of freedom, from tables
    assert found.holds and found.seeds == 3
    np.testing.assert_allclose([found.measured, found.low, found.high], [0.5, 0.5 - half, 0.5 + half])


def test_a_value_that_is_missing_never_holds_and_says_so():
    assert verdict([np.nan, np.nan]).holds is False and verdict([np.nan, np.nan]).measured is None
    partly = verdict([0.5, np.nan, 0.5])
    assert partly.holds is False and partly.cause == "1 of 3 seeds have no value"


def test_only_a_claim_that_was_expected_to_hold_breaks():
    assert verdict([0.9, 0.9]).broken
    assert not verdict([0.9, 0.9], expected=False, cause="the published code clips").broken
    assert not verdict([0.5, 0.5]).broken
    assert not not_run("study", [claim()], "no data")[0].broken
    assert failed("study", [claim()], "it ended with status 1")[0].broken


def test_every_claim_is_measured_and_nothing_else():
    for values in ({}, {"the mean is one half": [1.0], "another": [1.0]}):
        with pytest.raises(FlJaxError, match="must measure each of its claims once"):
            judge("study", [claim()], values)
    with pytest.raises(FlJaxError, match="must measure each of its claims once"):
        judge("study", [claim(), claim()], {"the mean is one half": [1.0]})


@pytest.mark.parametrize(("changes", "says"), [
    ({"tolerance": -0.1}, "give 0 or more"), ({"tolerance": float("nan")}, "give 0 or more"), ({"source": ""}, "no source"),
    ({"reason": ""}, "no reason for its tolerance"), ({"expected": False}, "give the cause"),
])
def test_a_claim_without_its_grounds_is_refused(changes, says):
    with pytest.raises(FlJaxError, match=says):
        claim(**changes)


def test_claims_json_has_the_stated_fields_and_reads_back(tmp_path):
    verdicts = [verdict([0.4, 0.6]), verdict([0.4]), *not_run("other", [claim(expected=False, cause="found", quick=True)], "no data")]
    write_claims(tmp_path / "claims.json", verdicts)
    items = json.loads((tmp_path / "claims.json").read_text())
    assert all(set(FIELDS) <= set(item) for item in items)
    assert [item["holds"] for item in items] == [True, True, None] and items[1]["low"] is None
    read = read_claims(tmp_path / "claims.json")
    assert read[:2] == verdicts[:2] and [record(verdict) for verdict in read] == items


@pytest.mark.parametrize("content", ["[{}]", "[1]", '{"study": 1}', "nonsense"])
def test_what_is_no_claims_json_is_refused(tmp_path, content):
    (tmp_path / "claims.json").write_text(content)
    with pytest.raises(FlJaxError):
        read_claims(tmp_path / "claims.json")


def test_the_table_says_what_holds_what_does_not_and_why():
    broken, known = verdict([0.9, 0.9]), verdict([0.9, 0.9], expected=False, cause="the published code clips")
    verdicts = [verdict([0.4, 0.6]), broken, known, *not_run("s", [claim()], "no data"), verdict([0.5, 0.5], direction=Direction.AT_LEAST)]
    table = claims_table(verdicts)
    assert [row[-1] for row in table.cells] == ["yes", "NO", "no, as known¹", "not run²", "yes"]
    assert table.notes == ("the published code clips", "not run: no data")
    assert [row[3] for row in table.cells][::4] == [".500 ± .100", "≥ .500 − .100"]


def test_a_table_of_several_studies_names_them():
    verdicts = [verdict([0.5, 0.5]), *not_run("other", [claim()], "no data")]
    assert [row[0] for row in claims_table(verdicts).cells] == ["study", "other"]
    assert claims_table(verdicts[:1]).cells[0][0] == "the mean is one half"


def test_a_claim_is_a_value():
    assert dataclasses.replace(claim(), quick=True) != claim() and claim() == claim()
