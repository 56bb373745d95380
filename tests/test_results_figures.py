"""Figures show the numbers that they are given, and event files hold them; looked at through matplotlib's objects, not pixels."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.colors import to_rgb
from matplotlib.text import Annotation, Text

from fl_jax.errors import FlJaxError
from fl_jax.results import MetricRow, curves, frame, per_site, write_event_files
from fl_jax.results.figures import PALETTE, _spread
from fl_jax.statistics import mean_interval

ARMS = ("FedAvg", "FedProx", "Local only")
SITES = ("A", "B", "C")


def metrics(seeds: int = 3) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for (i, arm), seed, round in itertools.product(enumerate(ARMS), range(seeds), range(5)):
        values = {site: 0.5 + 0.05 * round + 0.02 * i - 0.06 * j + 0.01 * rng.random() for j, site in enumerate(SITES)}
        rows += [MetricRow(arm, seed, round, "test", site, "AUROC", value) for site, value in values.items()]
        rows.append(MetricRow(arm, seed, round, "test", "mean", "AUROC", float(np.mean(list(values.values())))))
        rows.append(MetricRow(arm, seed, round, "test", "D", "AUROC", None, "one class"))
    return frame(rows)


def of(data: pd.DataFrame, arm: str, site: str, round: int) -> np.ndarray:
    return data.query("arm == @arm and site == @site and round == @round")["value"].to_numpy()


def test_curves_draw_the_mean_and_the_interval_of_each_round() -> None:
    data = metrics()
    figure = curves(data, "AUROC", "test")
    (axes,) = figure.axes
    bands = [child for child in axes.collections if isinstance(child, FillBetweenPolyCollection)]
    assert len(axes.lines) == len(bands) == len(ARMS)
    for line, band, arm in zip(axes.lines, bands, ARMS, strict=True):
        intervals = [mean_interval(of(data, arm, "mean", round)) for round in range(5)]
        np.testing.assert_array_equal(line.get_xdata(), range(5))
        np.testing.assert_allclose(line.get_ydata(), [interval.mean for interval in intervals])
        corners = {tuple(np.round(vertex, 9)) for vertex in band.get_paths()[0].vertices}
        for round, interval in enumerate(intervals):
            assert {(round, np.round(interval.low, 9)), (round, np.round(interval.high, 9))} <= corners
    assert axes.get_xlabel() == "round" and axes.get_ylabel() == "AUROC (test, mean of sites)"
    assert "mean of 3 seeds" in figure.get_supxlabel() and "95 % confidence" in figure.get_supxlabel()


def test_curves_are_labelled_at_their_ends_without_overlap() -> None:
    data = metrics()
    late = data["round"] == 4
    data.loc[late, "value"] = 0.7 + data.loc[late, "value"] / 100  # all arms end at nearly the same height
    figure = curves(data, "AUROC", "test")
    (axes,) = figure.axes
    figure.draw_without_rendering()
    labels = [child for child in axes.get_children() if isinstance(child, Annotation)]
    assert {label.get_text(): label.xy[1] for label in labels} == {
        arm: line.get_ydata()[-1] for arm, line in zip(ARMS, axes.lines, strict=True)
    }
    boxes = sorted((Text.get_window_extent(label) for label in labels), key=lambda box: box.y0)
    assert all(lower.y0 + 0.8 * lower.height < upper.y0 for lower, upper in itertools.pairwise(boxes))
    assert all(box.x0 > axes.get_window_extent().x1 and box.x1 < figure.bbox.x1 and box.y1 < figure.bbox.y1 for box in boxes)


def test_one_seed_has_no_band_and_says_so() -> None:
    figure = curves(metrics(seeds=1), "AUROC", "test", arms=["FedProx"])
    assert "one seed, no interval" in figure.get_supxlabel()
    assert len(figure.axes[0].lines) == 1


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_per_site_sorts_sites_and_rings_the_worst(higher_is_better: bool) -> None:
    data = metrics()
    figure = per_site(data, "AUROC", arms=["FedProx", "FedAvg"], higher_is_better=higher_is_better)
    (axes,) = figure.axes
    order = ["A", "B", "C"] if higher_is_better else ["C", "B", "A"]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [*order, "D", "mean of sites"]
    rings = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert len(rings) == 2
    for ring, arm, offset in zip(rings, ["FedProx", "FedAvg"], [-0.1, 0.1], strict=True):
        np.testing.assert_allclose(ring.get_xdata(), of(data, arm, order[-1], 4).mean())
        np.testing.assert_allclose(ring.get_ydata(), 2 + offset)
    dots = [line for line in axes.lines if len(line.get_xdata()) == 1 and line not in rings]
    bars = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_color() in PALETTE]
    assert len(dots) == len(bars) == 2 * 4
    for dot, bar, (arm, site) in zip(dots, bars, itertools.product(["FedProx", "FedAvg"], [*order, "mean"]), strict=True):
        interval = mean_interval(of(data, arm, site, 4))
        np.testing.assert_allclose([dot.get_xdata()[0], *bar.get_xdata()], interval[:3])
    assert any(isinstance(text, Annotation) and text.get_text() == "no finite value" for text in axes.texts)
    assert "at D (one class)" in figure.get_supxlabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["FedProx", "FedAvg"]


def many_arms(value: float = 0.5) -> pd.DataFrame:
    each = itertools.product([f"arm {i}" for i in range(30)], (0, 1), ("A", "mean"))
    return frame(MetricRow(arm, seed, 1, "test", site, "AUROC", value) for arm, seed, site in each)


def test_thirty_arms_are_told_apart_and_all_named_inside_the_figure() -> None:
    (axes,) = per_site(many_arms(), "AUROC").figure.axes
    looks = {(line.get_color(), line.get_marker()) for line in axes.lines if len(line.get_xdata()) == 0}
    assert len(looks) == 30
    figure = curves(many_arms(), "AUROC", "test")
    figure.draw_without_rendering()
    boxes = sorted((Text.get_window_extent(a) for a in figure.axes[0].texts if isinstance(a, Annotation)), key=lambda box: box.y0)
    assert len(boxes) == 30 and boxes[0].y0 > 0 and boxes[-1].y1 < figure.bbox.y1
    assert all(lower.y0 + 0.8 * lower.height < upper.y0 for lower, upper in itertools.pairwise(boxes))


def test_an_arm_whose_name_begins_with_an_underscore_is_in_the_legend() -> None:
    figure = per_site(metrics().replace({"arm": {"FedAvg": "_mine"}}), "AUROC")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["_mine", "FedProx", "Local only"]


def test_infinite_values_are_mentioned_and_no_values_are_not_one_seed() -> None:
    data = metrics()
    data.loc[(data["site"] == "A") & (data["arm"] == "FedAvg"), "value"] = np.inf
    assert "3 of 9 values infinite at A" in per_site(data, "AUROC").get_supxlabel()
    nothing = curves(many_arms(np.nan), "AUROC", "test").get_supxlabel()
    assert "one seed" not in nothing and "no values" in nothing


def test_figures_say_what_is_absent() -> None:
    with pytest.raises(FlJaxError, match="name at least one"):
        curves(metrics(), "AUROC", "test", arms=[])
    with pytest.raises(FlJaxError, match="no metrics with metric 'F1'"):
        curves(metrics(), "F1", "test")
    with pytest.raises(FlJaxError, match="there are those of 'FedAvg', 'FedProx', 'Local only'"):
        per_site(metrics(), "AUROC", arms=["FedBN"])


def seen_by_colour_blind(color: str, matrix: list[list[float]]) -> np.ndarray:
    """The colour as a dichromat sees it, linear RGB (Machado, Oliveira & Fernandes 2009, severity 1)."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.array(matrix) @ linear


@pytest.mark.parametrize("matrix", [
    np.eye(3).tolist(),
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
], ids=["everyone", "protan", "deutan", "tritan"])  # fmt: skip
def test_colours_differ_for_everyone(matrix: list[list[float]]) -> None:
    for one, other in itertools.combinations(PALETTE, 2):
        difference = seen_by_colour_blind(one, matrix) - seen_by_colour_blind(other, matrix)
        assert np.linalg.norm(difference) > 0.1, (one, other)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8).map(sorted), st.floats(0.01, 0.2))
def test_spread_places_are_apart_in_order_and_stay_where_there_is_room(wishes: list[float], gap: float) -> None:
    places = _spread(wishes, gap)
    assert all(upper - lower >= gap * (1 - 1e-9) - 1e-12 for lower, upper in itertools.pairwise(places))
    np.testing.assert_allclose(np.mean(places), np.mean(wishes), atol=1e-12)
    if all(upper - lower > gap for lower, upper in itertools.pairwise(wishes)):
        np.testing.assert_allclose(places, wishes, atol=1e-12)


def test_event_files_hold_the_metrics(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    data = metrics(seeds=2)
    folders = write_event_files(data, tmp_path)
    assert [str(folder.relative_to(tmp_path)) for folder in folders] == [
        f"{arm}/seed_{seed}" for arm in ("FedAvg", "FedProx", "Local_only") for seed in range(2)
    ]
    read = {}
    for folder, (arm, seed) in zip(folders, itertools.product(ARMS, range(2)), strict=True):
        (path,) = folder.iterdir()
        content, at = path.read_bytes(), 0
        while at < len(content):
            length = int.from_bytes(content[at : at + 8], "little")
            record = content[at + 12 : at + 12 + length]
            assert int.from_bytes(content[at + 12 + length : at + 16 + length], "little") == masked_crc32c(record)
            at += 16 + length
            event = Event.FromString(record)
            for value in event.summary.value:
                read[arm, seed, event.step, value.tag] = value.simple_value
    known = data[data["value"].notna()]
    expected = {(row.arm, row.seed, row.round, f"test/AUROC/{row.site}"): np.float32(row.value) for row in known.itertuples()}
    assert read == expected
    with pytest.raises(FlJaxError, match="holds event files already"):
        write_event_files(data, tmp_path)
    assert write_event_files(data, tmp_path, replace=True) == folders and all(len(list(folder.iterdir())) == 1 for folder in folders)


def test_event_files_without_tensorboardx_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(FlJaxError, match=r"pip install fl_jax\[tensorboard\]"):
        write_event_files(metrics(), tmp_path)


def test_event_files_in_an_impossible_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FlJaxError, match="file is where a folder should be"):
        write_event_files(metrics(), tmp_path / "file")
