"""Tables: numbers read back as what they were, nothing is cut off at any width, and what is missing says why."""

import re

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_jax.errors import FlJaxError
from fl_jax.results import Column, MetricRow, Missing, comparison_table, frame, last_round, number, over_seeds, select, signed
from fl_jax.results.tables import with_bounds, with_margin
from fl_jax.statistics import mean_interval

TWO = {"arm": "FedAvg", "x": 1.0}


@given(st.floats(-1e6, 1e6), st.integers(0, 5))
def test_a_number_is_the_rounded_value_in_the_short_form(value: float, digits: int) -> None:
    text = number(digits)(value)
    assert abs(float(text) - value) <= 0.5 * 10.0**-digits * (1 + 1e-9) + 1e-9
    assert not re.match(r"-?0\.", text) and not (float(text) == 0 and text.startswith("-"))
    sign = signed(digits)(value)
    assert sign.lstrip("+") == text and sign.startswith("+") == (float(text) > 0)


def test_forms_of_an_interval() -> None:
    values = mean_interval([0.90, 0.912, 0.924])
    assert with_bounds(number())(values) == f".912 [{number()(values.low)}, {number()(values.high)}]"
    assert with_margin()(values) == f".912 ± {number()(values.high - values.mean)}"
    assert with_bounds(signed(2))(mean_interval([-0.5, 0.7])).startswith("+.10 [-")
    assert with_bounds(number())(mean_interval([0.5])) == with_margin()(mean_interval([0.5])) == ".500"


def a_table(**last: object) -> object:
    columns = [
        Column("arm", "Arm", right=False),
        Column("auroc", "AUROC [95 % CI]", with_bounds(number())),
        Column("delta", "delta to centralized", with_bounds(signed())),
        Column("loss", "loss", with_margin()),
        Column("rounds", "rounds"),
    ]
    rows = [
        {
            "arm": f"FedProx [bold] with μ = .0{i} and more words",
            "auroc": mean_interval([0.9, 0.91 + i / 1000]),
            "delta": mean_interval([-0.01, 0.02]),
            "loss": mean_interval([1.1, 1.2]),
            "rounds": 100,
        }
        for i in range(3)
    ]
    return comparison_table([*rows, {"arm": "last", **last}], columns, "Title")


@settings(deadline=None, max_examples=25)
@given(st.integers(36, 140))
def test_text_fits_the_width_and_keeps_every_cell(width: int) -> None:
    table = a_table(auroc=Missing("one class"))
    text = table.text(width)
    assert all(len(line) <= width and line == line.rstrip() for line in text.splitlines())
    assert "…" not in text
    for cells in table.cells:
        for cell in cells[1:]:
            for part in cell.replace(" [", "\n[").split("\n"):  # an interval may go below its mean, and is never split itself
                assert part in text
        for word in cells[0].split():
            assert word in text


def test_wide_enough_is_one_line_a_row() -> None:
    table = a_table()
    lines = table.text(140).splitlines()
    assert lines[0] == "Title" and len(lines) == 1 + 2 + 4
    # Aligned: every number column ends in the same place.
    assert len({len(line) for line in lines[3:6]}) == 1


def test_a_pipe_gets_plain_text() -> None:
    assert "\x1b" not in a_table().text() and "[bold]" in a_table().text(140)


def test_missing_values_share_footnotes_by_reason() -> None:
    rows = [
        {"arm": "a", "x": Missing("diverged"), "y": np.nan},
        {"arm": "b", "x": None, "y": Missing("one class")},
        {"arm": "c", "y": Missing("diverged"), "x": mean_interval([np.nan])},
        {"arm": "d", "x": mean_interval([0.5]), "y": pd.NA},
        {"arm": "e", "x": np.float32(np.nan), "y": jnp.float32(np.nan)},
    ]
    columns = [Column("arm", "Arm", right=False), Column("x", "x", lambda _: "value"), Column("y", "y", number())]
    table = comparison_table(rows, columns)
    assert [cells[1:] for cells in table.cells] == [("–¹", "–"), ("–", "–²"), ("–³", "–¹"), ("value", "–"), ("–", "–")]
    assert table.notes == ("diverged", "one class", "no values")
    assert "¹ diverged" in table.text() and "² one class" in table.markdown()


def test_markdown_has_the_same_cells() -> None:
    columns = [Column("arm", "Arm|s", right=False), Column("x", "x", number(1))]
    lines = comparison_table([{"arm": "a_b*c|d", "x": 1.25}, TWO], columns).markdown().splitlines()
    assert lines[1].startswith("| --") and lines[1].endswith("-: |")
    assert len({len(line) for line in lines}) == 1
    split = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert split[0] == [r"Arm\|s", "x"] and split[2] == [r"a\_b\*c\|d", "1.2"] and split[3] == ["FedAvg", "1.0"]


def test_a_data_frame_gives_the_same_table_and_a_missing_column_is_named() -> None:
    columns = [Column("arm", "Arm", right=False), Column("x", "x", number(1))]
    assert comparison_table(pd.DataFrame([TWO]), columns) == comparison_table([TWO], columns)
    with pytest.raises(FlJaxError, match="no column 'y'; it has arm, x"):
        comparison_table(pd.DataFrame([TWO]), [Column("y", "y")])
    with pytest.raises(FlJaxError, match="without columns"):
        comparison_table([TWO], [])
    assert comparison_table([], columns).text().startswith("Arm")


def metrics(seeds: int = 4) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return frame(
        MetricRow(arm, seed, round, "test", site, "AUROC", float(rng.random()))
        for arm, rounds in (("b", (1, 2, 3)), ("a", (1, 2)))
        for round in rounds
        for seed in range(seeds)
        for site in ("A", "B")
    )


def test_over_seeds_is_the_interval_of_each_group() -> None:
    data = metrics()
    found = over_seeds(data, ["arm", "site", "round"])
    assert list(found["arm"].unique()) == ["b", "a"] and len(found) == 2 * 5
    for row in found.itertuples():
        values = data.query("arm == @row.arm and site == @row.site and round == @row.round")["value"]
        assert row.interval == mean_interval(values.to_numpy())
    with pytest.raises(FlJaxError, match="several values"):
        over_seeds(data, ["arm"])


def test_an_interval_of_no_values_has_the_reason() -> None:
    data = metrics()
    gone = (data["site"] == "A") & (data["arm"] == "a")
    data.loc[gone, ["value", "note"]] = [np.nan, "one class"]
    found = over_seeds(last_round(data), ["arm", "site"])
    by_key = {(row.arm, row.site): row.interval for row in found.itertuples()}
    assert by_key["a", "A"].note == "one class" and by_key["a", "A"].n == 0 and by_key["b", "A"].n == 4
    assert "¹ one class" in comparison_table(found, [Column("arm", "Arm"), Column("interval", "AUROC", with_margin())]).text()


def test_last_round_is_each_arms_own() -> None:
    assert set(last_round(metrics()).groupby("arm")["round"].unique().map(tuple).items()) == {("a", (2,)), ("b", (3,))}


def test_select_says_what_there_is() -> None:
    with pytest.raises(FlJaxError, match="no metrics with metric 'F1'; there are 'AUROC'"):
        select(metrics(), "F1", "test")
    with pytest.raises(FlJaxError, match="arm 'c'; there are those of 'b', 'a'"):
        select(metrics(), "AUROC", "test", arms=["c"])
    assert set(select(metrics(), "AUROC", "test", "A", ["a"])["arm"]) == {"a"}
