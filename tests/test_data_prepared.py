"""Prepared data are whole or not there: interruptions, damage, downloads, and the command line, on a small data set of its own."""

import errno
import functools
import hashlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fl_jax import data
from fl_jax.data import __main__ as command
from fl_jax.data import catalog, prepared
from fl_jax.data.published import Published, RawFile, number, read_rows
from fl_jax.errors import FlJaxError

ROWS = 30
CONTENT = "name,size\n" + "".join(f"word {k}é,{k / 4 if k % 7 else '?'}\n" for k in range(ROWS))


def parse(folder: Path):
    path = folder / "toys.csv"
    names, sizes = [], []
    for line, cells in read_rows(path, hashlib.sha256(CONTENT.encode()).hexdigest(), rows=ROWS, columns=("name", "size")):
        names.append(cells[0])
        sizes.append(number(path, line, "size", cells[1], missing="?"))
    size = np.asarray(sizes, np.float32)
    kind = np.arange(ROWS) % 3
    return {"train": {"name": np.asarray(names), "size": size, "kind": kind, "pair": np.stack([size, -size], 1)}}


def features():
    import tensorflow_datasets as tfds

    return {
        "name": tfds.features.Text(),
        "size": np.float32,
        "kind": tfds.features.ClassLabel(names=["a", "b", "c"]),
        "pair": tfds.features.Tensor(shape=(2,), dtype=np.float32),
    }


TOYS = Published(
    "toys",
    "1.2.0",
    "Toys: thirty of them.",
    "CC0",
    "Nobody (2020). Toys.",
    "https://example.org/toys",
    (RawFile("toys.csv", "http://127.0.0.1:9/toys.csv"),),
    features,
    parse,
    supervised=("pair", "kind"),
)


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw" / "toys"
    folder.mkdir(parents=True)
    (folder / "toys.csv").write_text(CONTENT)
    return folder


@pytest.fixture
def known(monkeypatch, tmp_path):
    """The toys are in the catalogue; prepared data are in a folder of the test, and FL_JAX_RAW names none."""
    monkeypatch.setitem(catalog.CATALOG, "toys", catalog.Entry(TOYS, lambda data_dir: _federation(data_dir)))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.delenv("FL_JAX_RAW", raising=False)
    return tmp_path / "tfds"


def _federation(data_dir):
    source = data.tfds_source("toys", data_dir=data_dir)
    return data.from_arrays(np.nan_to_num(source.x), source.y, source.y % 2, name="toys", class_names=source.class_names)


def visible(data_dir):
    return sorted(
        str(path.relative_to(data_dir)) for path in data_dir.rglob("*") if path.is_file() and not path.name.endswith(".lock")
    )


def test_records_come_back_in_order_and_as_they_were(raw, tmp_path):
    place = prepared.prepare(TOYS, folder=raw, data_dir=tmp_path / "tfds", progress=False)
    assert place == prepared.place_of(TOYS, tmp_path / "tfds") and prepared.is_prepared(TOYS, tmp_path / "tfds")
    columns, expected = prepared.read(place, "train"), parse(raw)["train"]
    assert set(columns) == set(expected)
    for name, column in expected.items():
        np.testing.assert_array_equal(columns[name], column)
        assert columns[name].dtype == column.dtype
    assert np.isnan(columns["size"]).sum() == 5
    before = (place / "dataset_info.json").stat().st_mtime_ns
    (raw / "toys.csv").unlink()
    assert prepared.prepare(TOYS, folder=raw, data_dir=tmp_path / "tfds") == place  # nothing to do
    assert (place / "dataset_info.json").stat().st_mtime_ns == before
    with pytest.raises(FlJaxError, match="has no split 'test': choose one of train"):
        prepared.read(place, "test")


def test_what_is_missing_is_said_in_one_sentence_and_raw_files_are_used_where_they_are(raw, known, monkeypatch):
    with pytest.raises(
        data.DataMissing, match=r"not prepared in .*FL_JAX_RAW names no folder.*`python -m fl_jax.data prepare toys`"
    ):
        data.ensure_prepared("toys")
    monkeypatch.setenv("FL_JAX_RAW", str(raw))  # the parent is meant, so there is none of its name in it
    with pytest.raises(data.DataMissing, match="has no folder 'toys' with its files"):
        data.ensure_prepared("toys")
    assert not known.exists()
    monkeypatch.setenv("FL_JAX_RAW", str(raw.parent))
    assert data.ensure_prepared("toys") == known / "toys" / "1.2.0"
    monkeypatch.delenv("FL_JAX_RAW")
    assert data.ensure_prepared("toys") == known / "toys" / "1.2.0"
    with pytest.raises(FlJaxError, match="'toy' is no data set that fl_jax knows: did you mean 'toys'") as caught:
        data.ensure_prepared("toy")
    assert not isinstance(caught.value, data.DataMissing)
    with pytest.raises(FlJaxError, match="choose one of fed_heart_disease"):
        data.ensure_prepared("zzz")


def test_damaged_prepared_data_are_named(raw, tmp_path):
    place = prepared.prepare(TOYS, folder=raw, data_dir=tmp_path, progress=False)
    shard = next(place.glob("*.array_record*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FlJaxError, match="cannot be read .*remove this folder and prepare it again"):
        prepared.read(place, "train")
    shard.unlink()
    assert not prepared.is_prepared(TOYS, tmp_path)
    with pytest.raises(FlJaxError, match="not the whole data set: remove this folder"):
        prepared.prepare(TOYS, folder=raw, data_dir=tmp_path, progress=False)


class Failing:
    """A column in which reading a record fails after a while."""

    def __init__(self, column, error):
        self.column, self.error = column, error

    def __len__(self):
        return len(self.column)

    def __getitem__(self, k):
        if k == ROWS // 2:
            raise self.error
        return self.column[k]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), RuntimeError("bug")], ids=["disk", "ctrl-c", "bug"]
)
def test_a_prepare_that_fails_half_way_leaves_nothing(raw, tmp_path, error):
    def half(folder):
        columns = parse(folder)["train"]
        return {"train": {**columns, "pair": Failing(columns["pair"], error)}}

    with pytest.raises(
        FlJaxError if isinstance(error, OSError) else type(error),
        match="disk or quota is full" if isinstance(error, OSError) else None,
    ):
        prepared.prepare(TOYS._replace(parse=half), folder=raw, data_dir=tmp_path / "tfds", progress=False)
    assert [path.name for path in (tmp_path / "tfds").iterdir()] == [".toys.lock"]


SLOW = """
import sys, time
import fl_jax.data.__main__ as command
from fl_jax.data import catalog
assert "tensorflow_datasets" not in sys.modules and "sklearn" not in sys.modules
sys.path.insert(0, {tests!r})
import test_data_prepared as toys

class Column(toys.Failing):
    def __getitem__(self, k):
        if k == 15:
            print("half", file=sys.__stdout__, flush=True)
            time.sleep(60)
        return self.column[k]

def slow(folder):
    columns = toys.parse(folder)["train"]
    return {{"train": columns, "test": {{**columns, "pair": Column(columns["pair"], None)}}}}

catalog.CATALOG["toys"] = catalog.Entry(toys.TOYS._replace(parse=slow), None)
sys.exit(command.main(["prepare", "toys", "--from", {raw!r}, "--data-dir", {data_dir!r}]))
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_a_process_that_is_stopped_half_way_leaves_nothing_that_is_taken_for_whole(raw, tmp_path, sent):
    data_dir = tmp_path / "tfds"
    script = SLOW.format(tests=str(Path(__file__).parent), raw=str(raw), data_dir=str(data_dir))
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )
    try:
        assert "Preparing 'toys' from" in process.stdout.readline() and process.stdout.readline() == "half\n"
        assert any("toys-train.array_record" in name for name in visible(data_dir))  # one of two splits is there already
        process.send_signal(sent)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert not prepared.is_prepared(TOYS, data_dir) and "toys" not in command.prepared_names(data_dir)
    if sent == signal.SIGINT:
        assert process.returncode == 130 and errors.endswith("fl_jax.data: interrupted; what was not whole has been removed.\n")
        assert not visible(data_dir)
    else:
        assert process.returncode == -signal.SIGKILL and visible(data_dir)
    place = prepared.prepare(TOYS, folder=raw, data_dir=data_dir, progress=False)
    assert len(prepared.read(place, "train")["size"]) == ROWS
    assert not any(".incomplete" in name for name in visible(data_dir))


def test_the_second_of_two_who_prepare_waits_and_finds_it_done(raw, tmp_path):
    started, times = threading.Event(), []

    def counted(folder):
        times.append(time.perf_counter())
        started.set()
        time.sleep(0.2)
        return parse(folder)

    toys = TOYS._replace(parse=counted)
    first = threading.Thread(target=lambda: prepared.prepare(toys, folder=raw, data_dir=tmp_path / "tfds", progress=False))
    first.start()
    assert started.wait(10)
    prepared.prepare(toys, folder=raw, data_dir=tmp_path / "tfds", progress=False)
    first.join()
    assert len(times) == 1 and prepared.is_prepared(TOYS, tmp_path / "tfds")


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path == "/short/toys.csv":
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT.encode())))
            self.end_headers()
            self.wfile.write(CONTENT.encode()[:100])
        elif self.path == "/hanging/toys.csv":
            time.sleep(1.0)
        else:
            super().do_GET()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("server")
    (root / "good").mkdir()
    (root / "good" / "toys.csv").write_text(CONTENT)
    (root / "bad").mkdir()
    (root / "bad" / "toys.csv").write_text(CONTENT.replace("word 3", "ward 3"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(root))) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_downloads_are_verified_and_what_fails_leaves_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setattr("fl_jax.data.download.TIMEOUT", 0.3)
    for mirror, message in (
        (f"{server}/short", "/short/toys.csv failed .*100 bytes|IncompleteRead"),
        (f"{server}/absent", "/absent/toys.csv failed .*404: File not found"),
        (f"{server}/hanging", "/hanging/toys.csv failed .*timed out"),
        (f"{server}/bad", "is not the published file: the checksum"),
        (
            None,
            "Downloading http://127.0.0.1:9/toys.csv failed .*check the network, or put the file in a folder and name that by --from",
        ),
    ):
        began = time.perf_counter()
        with pytest.raises(FlJaxError, match=message):
            prepared.prepare(TOYS, mirror=mirror, data_dir=tmp_path / "tfds", progress=False)
        assert time.perf_counter() - began < 5 and [path.name for path in (tmp_path / "tfds").iterdir()] == [".toys.lock"]
    canonical = TOYS._replace(files=(RawFile("toys.csv", f"{server}/good/toys.csv"),))
    place = prepared.prepare(canonical, data_dir=tmp_path / "tfds", progress=False)
    assert len(prepared.read(place, "train")["size"]) == ROWS
    assert not any("raw" in name for name in visible(tmp_path / "tfds"))


def run(*arguments):
    return command.main(list(arguments))


def test_the_command_line_lists_describes_and_prepares(server, raw, known, monkeypatch, capfd):
    assert run("list") == 0
    assert "toys               to be downloaded  Toys" in capfd.readouterr().out
    assert run("describe", "toys") == 0
    shown = capfd.readouterr().out
    assert all(text in shown for text in ("licence  CC0", "https://example.org/toys", "Nobody (2020)", "is not prepared in"))
    assert run("prepare", "toys", "--from", str(raw.parent.parent)) == 2
    assert capfd.readouterr().err.endswith("holds no raw file of 'toys': put toys.csv there, or into a folder 'toys' in it.\n")
    assert run("prepare", "toys", "--from", str(raw), "--mirror", server) == 2
    assert "leave one of them out" in capfd.readouterr().err
    assert run("prepare", "toyz") == 2
    assert capfd.readouterr().err == "fl_jax.data: 'toyz' is no data set that fl_jax knows: did you mean 'toys'?\n"

    monkeypatch.setenv("FL_JAX_RAW", str(raw.parent))
    run("list")
    assert f"raw files in '{raw}'" in capfd.readouterr().out
    assert run("prepare", "toys", "--mirror", f"{server}/good") == 0
    out, err = capfd.readouterr()
    assert out == f"Preparing 'toys' from {server}/good\n'toys' is prepared, in '{known / 'toys' / '1.2.0'}'.\n"
    assert "toys.csv: " in err and "preparing toys" in err
    assert run("prepare", "toys") == 0 and "prepared already" in capfd.readouterr().out
    assert run("list") == 0 and "toys               prepared" in capfd.readouterr().out
    assert run("describe", "toys") == 0
    assert "toys: 2 sites" in capfd.readouterr().out
    for folder in (raw, raw.parent):
        assert run("prepare", "toys", "--from", str(folder), "--data-dir", str(known / folder.name)) == 0
        assert prepared.is_prepared(TOYS, known / folder.name)


def test_any_prepared_tfds_data_set_is_found_by_name(raw, known, capfd):
    prepared.prepare(TOYS, folder=raw, data_dir=known, progress=False)
    other = TOYS._replace(name="others", supervised=None)
    for version in ("1.9.0", "1.10.0"):
        prepared.prepare(other._replace(version=version), folder=raw, data_dir=known, progress=False)
    source = data.tfds_source("toys")
    expected = parse(raw)["train"]
    np.testing.assert_array_equal(source.x, expected["pair"])
    np.testing.assert_array_equal(source.y, expected["kind"])
    assert source.y.dtype == np.int32 and source.class_names == ("a", "b", "c")
    with pytest.raises(FlJaxError, match="'others' does not say which feature is x: set x to one of kind, name, pair, size"):
        data.tfds_source("others")
    with pytest.raises(FlJaxError, match="has no feature 'weight'"):
        data.tfds_source("others", x="weight", y="kind")
    chosen = data.tfds_source("others", x="pair", y="size")
    assert "(1.10.0)" in chosen.notes[0] and chosen.y.dtype == np.float32 and chosen.class_names == ()
    assert "(1.9.0)" in data.tfds_source("others:1.9.0", x="pair", y="kind").notes[0]
    for name, message in (
        ("others:2.0.0", "did you mean 'others'"),
        ("toyz", "did you mean 'toys'"),
        ("q", "prepared are others, toys; prepare it"),
    ):
        began = time.perf_counter()
        with pytest.raises(data.DataMissing, match=message):
            data.tfds_source(name)
        assert time.perf_counter() - began < 2
    assert run("list") == 0 and "others             prepared by TFDS  1.9.0, 1.10.0" in capfd.readouterr().out
    assert run("describe", "others:1.9.0") == 0
    assert "train: 30 records" in capfd.readouterr().out

    for config in ("small", "large"):
        (known / "with_config" / config).mkdir(parents=True)
        (known / "others" / "1.9.0").rename(known / "with_config" / config / "1.0.0") if config == "small" else (
            known / "others" / "1.10.0"
        ).rename(known / "with_config" / config / "1.0.0")
    with pytest.raises(FlJaxError, match="several configurations: choose one of with_config/large, with_config/small"):
        data.tfds_source("with_config")
    assert len(data.tfds_source("with_config/small", x="pair", y="kind").y) == ROWS
    info = known / "with_config" / "small" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    next(info.parent.glob("*.array_record*")).rename(info.parent / "others-train.tfrecord-00000-of-00001")
    with pytest.raises(FlJaxError, match="kept as tfrecord, which needs TensorFlow"):
        data.tfds_source("with_config/small", x="pair", y="kind")


def test_the_data_dir_is_that_of_tfds(monkeypatch, tmp_path):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    assert prepared.resolve_data_dir() == Path.home() / "tensorflow_datasets"
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert prepared.resolve_data_dir() == tmp_path and prepared.resolve_data_dir("here") == Path("here")
    if os.geteuid():  # root may write anywhere
        tmp_path.chmod(0o500)
        with pytest.raises(FlJaxError, match="writing is not permitted"):
            prepared.prepare(TOYS, folder=tmp_path, data_dir=tmp_path / "tfds")
