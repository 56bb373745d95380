"""The run folder: rows survive kills, cuts and full disks, and nobody's files are overwritten. And what a run ran on."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

import fl_jax
from fl_jax.errors import FlJaxError
from fl_jax.files import jsonable
from fl_jax.results import MetricRow, RunFolder, describe_environment, frame, load_metrics, load_run, now, peak_memory
from fl_jax.results.environment import source

CONFIG = {"lr": 0.1, "sites": ["A", "B"]}


def rows(arm: str, rounds: range, seeds: int = 2) -> list[MetricRow]:
    return [
        MetricRow(arm, seed, round, "test", site, "AUROC", float(np.random.default_rng([round, seed]).random()))
        for round in rounds
        for seed in range(seeds)
        for site in ("NA", "Site, \"B\"", "None")
    ]


names = st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), max_size=8)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.builds(
    MetricRow, names, st.integers(0, 2**31), st.integers(0, 2**31), names, names, names,
    st.floats(allow_nan=False) | st.floats(width=32, allow_nan=False), names,
)))  # fmt: skip
def test_metrics_read_back_as_they_were_measured(tmp_path: Path, some: list[MetricRow]) -> None:
    folder = RunFolder.create(tmp_path / "run", CONFIG, resume=True)
    before = len(folder.metrics())
    folder.append_metrics(some)
    read = folder.metrics().iloc[before:]
    assert [MetricRow(*row) for row in read.itertuples(index=False, name=None)] == some
    pd.testing.assert_frame_equal(read.reset_index(drop=True), frame(some))


def test_a_missing_value_has_a_reason(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, CONFIG)
    known = MetricRow("a", 0, 1, "test", "A", "AUROC", None, "one class only")
    folder.append_metrics([known, known._replace(site="B", value=np.nan, note="")])
    read = load_metrics(tmp_path)
    assert read["value"].isna().all() and list(read["note"]) == ["one class only", "not a number"]
    folder.append_metrics(read)
    pd.testing.assert_frame_equal(load_metrics(tmp_path / "metrics.csv"), pd.concat([read, read], ignore_index=True))


def test_resumed_has_exactly_the_rows_of_uninterrupted(tmp_path: Path) -> None:
    whole = RunFolder.create(tmp_path / "whole", CONFIG)
    for arm in ("one", "two"):
        for round in range(6):
            whole.append_metrics(rows(arm, range(round, round + 1)))
    killed = RunFolder.create(tmp_path / "killed", CONFIG)
    killed.append_metrics(rows("one", range(6)))
    killed.append_metrics(rows("two", range(5)))
    with open(tmp_path / "killed" / "metrics.csv", "ab") as file:
        file.write(b'two,0,5,test,NA,AUROC,0.123')  # cut short
    resumed = RunFolder.create(tmp_path / "killed", CONFIG, resume=True)
    resumed.truncate_after("two", 2)
    resumed.append_metrics(rows("two", range(3, 6)))
    assert (tmp_path / "killed" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()
    resumed.truncate_after("one", 0, seed=1)
    left = resumed.metrics()
    assert set(left[left["arm"] == "one"].groupby("seed")["round"].max()) == {0, 5}


@pytest.mark.parametrize("tail", [b"", b"two,0", b'two,0,1,test,"x', b"two,0,1,test,A,AUROC,0.5,"])
def test_appending_after_a_cut_line_heals_it(tmp_path: Path, tail: bytes) -> None:
    folder = RunFolder.create(tmp_path, CONFIG)
    folder.append_metrics(rows("one", range(3)))
    with open(tmp_path / "metrics.csv", "ab") as file:
        file.write(tail)
    pd.testing.assert_frame_equal(load_metrics(tmp_path), frame(rows("one", range(3))))
    folder.append_metrics(rows("one", range(3, 4)))
    pd.testing.assert_frame_equal(load_metrics(tmp_path), frame(rows("one", range(4))))


KILLED = """
    import os, sys
    from fl_jax.results import MetricRow, RunFolder
    folder = RunFolder.create(sys.argv[1], {}, resume=True)
    print("ready", flush=True)
    for round in range(10**9):
        folder.append_metrics([MetricRow("arm", 0, round, "test", f"site {i}", "loss", i / 3) for i in range(40)])
"""


def test_killed_while_appending(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        while (tmp_path / "metrics.csv").stat().st_size < 20_000:
            pass
        child.send_signal(signal.SIGKILL)
    folder = RunFolder.create(tmp_path, {}, resume=True)
    read = folder.metrics()
    last = int(read["round"].max())
    assert last >= 1 and len(read) > 40 * last
    folder.truncate_after("arm", last - 1)
    expected = [MetricRow("arm", 0, round, "test", f"site {i}", "loss", i / 3) for round in range(last) for i in range(40)]
    pd.testing.assert_frame_equal(folder.metrics(), frame(expected))


def test_full_disk_loses_nothing(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, CONFIG)
    folder.append_metrics(rows("one", range(3)))
    folder.write_summary({"a": 1})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["metrics.csv"]) + 100, hard))
    try:
        with pytest.raises(FlJaxError, match="earlier rows are intact.*full"):
            folder.append_metrics(rows("one", range(3, 200)))
        with pytest.raises(FlJaxError, match="full"):
            folder.write_summary({"a": "x" * 10_000})
        with pytest.raises(FlJaxError, match="full"):
            figure = Figure()
            figure.add_subplot().plot([1, 2])
            folder.save_figure("curve", figure)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert not list((tmp_path / "figures").iterdir())
    folder.append_metrics(rows("one", range(3, 5)))
    pd.testing.assert_frame_equal(folder.metrics(), frame(rows("one", range(5))))


def test_refuses_to_overwrite(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", CONFIG).append_metrics(rows("one", range(1)))
    with pytest.raises(FlJaxError, match="already holds this run; resume it"):
        RunFolder.create(tmp_path / "run", CONFIG)
    for resume in (False, True):
        with pytest.raises(FlJaxError, match="lr: 0.1 -> 0.2"):
            RunFolder.create(tmp_path / "run", {**CONFIG, "lr": 0.2}, resume)
    with pytest.raises(FlJaxError, match=r"holds other files \(run"):
        RunFolder.create(tmp_path, CONFIG)
    with pytest.raises(FlJaxError, match="not the folder of a run"):
        RunFolder.open(tmp_path)
    with pytest.raises(FlJaxError, match="a file is where a folder should be"):
        RunFolder.create(tmp_path / "run" / "config.json", CONFIG)
    assert len(RunFolder.create(tmp_path / "run", CONFIG, resume=True).metrics()) == len(rows("one", range(1)))


def test_bad_rows_and_names_are_refused(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, CONFIG)
    with pytest.raises(FlJaxError, match="line break"):
        folder.append_metrics([MetricRow("a\nb", 0, 0, "test", "A", "loss", 1.0)])
    with pytest.raises(FlJaxError, match="no column 'note'"):
        folder.append_metrics(frame(rows("a", range(1))).drop(columns="note"))
    with pytest.raises(FlJaxError, match="without a folder"):
        folder.save_figure("../x", Figure())
    with pytest.raises(FlJaxError, match="model.layer is a object, not JSON"):
        folder.write_summary({"model": {"layer": object()}})
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(FlJaxError, match="does not start with the header"):
        folder.metrics()


@pytest.mark.parametrize("line", [b"a,0,x,test,A,AUROC,0.1,", b"a,0,0,test,A,AUROC,zero,", b"a,0,0,test,\xff,AUROC,0.1,", b"a,b"])
def test_damaged_metrics_are_one_clear_error(tmp_path: Path, line: bytes) -> None:
    folder = RunFolder.create(tmp_path, CONFIG)
    with open(tmp_path / "metrics.csv", "ab") as file:
        file.write(line + b"\n")
    with pytest.raises(FlJaxError, match="metrics.csv was damaged or edited"):
        folder.metrics()


def test_load_run_has_everything(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, CONFIG)
    assert load_run(tmp_path).environment == [] and load_run(tmp_path).summary == {}
    started = now()
    folder.record_environment(describe_environment(started))
    folder.record_environment(describe_environment(started, wall_seconds=2.0, compile_seconds=0.5))
    folder.record_environment(describe_environment(now()))
    folder.write_summary({"AUROC": np.float32(0.5), "missing": np.nan, "epsilon": np.inf, "sites": np.arange(2)})
    run = load_run(tmp_path)
    assert run.config == CONFIG
    assert [entry["wall_seconds"] for entry in run.environment] == [2.0, None]
    assert run.summary == {"AUROC": 0.5, "missing": None, "epsilon": "inf", "sites": [0, 1]}
    assert folder.save_figure("curve", Figure()).read_bytes().startswith(b"\x89PNG")


json_leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


@given(st.recursive(json_leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10))
def test_jsonable_is_strict_json(value: object) -> None:
    assert json.loads(json.dumps(jsonable(value), allow_nan=False)) == jsonable(value)


def test_environment_names_what_numbers_depend_on() -> None:
    environment = describe_environment(now())
    json.dumps(environment, allow_nan=False)
    assert environment["versions"]["jax"] == version("jax") and environment["versions"]["fl_jax"] == fl_jax.__version__
    assert environment["hardware"]["usable_cores"] <= environment["hardware"]["cores"]
    assert environment["hardware"]["memory_bytes"] > peak_memory()


def test_peak_memory_is_in_bytes() -> None:
    before = peak_memory()
    block = np.ones(2**26, np.uint8) if before < 2**33 else None
    assert 2**25 < before < 2**40
    del block
    assert peak_memory() >= before


def test_source_is_the_commit_of_the_package_and_of_nothing_else(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        done = subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert source(package) is None or not os.environ.get("CI")
    git("init", "-q")
    (tmp_path / "README.md").write_text("")
    git("add", "README.md")
    git("commit", "-qm", "Something else")
    assert source(package) is None  # inside a checkout that does not track it
    git("add", "package")
    git("commit", "-qm", "The package")
    assert source(package) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "notes.txt").write_text("")
    assert source(package) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (package / "new.py").write_text("")
    assert source(package) == {"commit": git("rev-parse", "HEAD"), "dirty": True}


def test_what_is_known_of_arms_is_added_up_and_read_back(tmp_path):
    folder = RunFolder.create(tmp_path / "run", {})
    assert load_run(folder.path).arms == {}
    folder.record_arms({"FedAvg": {"BatchNorm": "averaged"}, "FedBN": {"BatchNorm": "?"}})
    folder.record_arms({"FedBN": {"BatchNorm": "local"}})
    assert load_run(folder.path).arms == {"FedAvg": {"BatchNorm": "averaged"}, "FedBN": {"BatchNorm": "local"}}
