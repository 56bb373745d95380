"""The folder of one run: configuration, environment, metrics per round and site, summary and figures, on the disk as they arise.

config.json       what was asked for, written once
environment.json  a list: one entry for each process that worked on the run
arms.json         of each arm what its numbers mean: the BatchNorm policy, how many clients and rounds
metrics.csv       long format, one row per arm, seed, round, split, site and metric
summary.json      what came out
claims.json       of a study that reproduces published results: what it claims, and whether that holds
figures/*.png

A run that is killed and resumed ends with exactly the rows of one that was not: `RunFolder.truncate_after` drops what lies
beyond the checkpoint that it resumes from.
"""

import contextlib
import csv
import io
import math
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import pandas as pd
from matplotlib.figure import Figure

from fl_jax.errors import FlJaxError
from fl_jax.files import check_config, disk_errors, jsonable, read_json, write_atomically, write_json
from fl_jax.results.claims import CLAIMS, Verdict, write_claims

CONFIG, ENVIRONMENT, ARMS, METRICS, SUMMARY, FIGURES = (
    "config.json", "environment.json", "arms.json", "metrics.csv", "summary.json", "figures")
_DOTS_PER_INCH = 200


class MetricRow(NamedTuple):
    """One measured number.

    arm: what was trained, as it is called in tables. seed, round: ints; round 0 is before training. split: "train",
    "validation", "test", "unseen" (sites that took no part) or "round" (what a round reports of itself). site: a site's name, or
    "all" (records pooled), "mean", "worst" or "std" over sites. metric: its name. value: float; NaN or None where it is missing.
    note: why it is missing.
    """

    arm: str
    seed: int
    round: int
    split: str
    site: str
    metric: str
    value: float | None
    note: str = ""


COLUMNS = MetricRow._fields
_HEADER = ",".join(COLUMNS) + "\n"
_TEXTS = ("arm", "split", "site", "metric", "note")
_DTYPES = {"seed": "int64", "round": "int64", "value": "float64", **dict.fromkeys(_TEXTS, "str")}


class Run(NamedTuple):
    """What a run folder holds; environment, summary and arms are empty where a run has not come that far."""

    path: Path
    config: dict[str, Any]
    environment: list[dict[str, Any]]
    metrics: pd.DataFrame
    summary: dict[str, Any]
    arms: dict[str, Any]


def _lines(rows: Iterable[MetricRow]) -> str:
    """The rows as lines of CSV. Raises FlJaxError for a line break in a name or a note: a row is a line, also after a crash."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for row in rows:
        missing = row.value is None or math.isnan(row.value)
        # repr is the shortest text that reads back as the same number.
        value = "" if row.value is None or missing else repr(float(row.value))
        note = row.note if isinstance(row.note, str) else ""
        note = note or ("not a number" if missing else "")
        texts = (row.arm, row.split, row.site, row.metric, note)
        if any("\n" in text or "\r" in text for text in texts):
            raise FlJaxError(f"A metric's names and its note are single lines, but not in {texts}; remove the line break.")
        writer.writerow((row.arm, int(row.seed), int(row.round), row.split, row.site, row.metric, value, note))
    return buffer.getvalue()


def frame(rows: Iterable[MetricRow]) -> pd.DataFrame:
    """Rows as the DataFrame that `load_metrics` returns."""
    return pd.DataFrame([tuple(row) for row in rows], columns=list(COLUMNS)).astype(_DTYPES)


def _rows(metrics: pd.DataFrame | Iterable[MetricRow]) -> Iterable[MetricRow]:
    if not isinstance(metrics, pd.DataFrame):
        return metrics
    absent = [column for column in COLUMNS if column not in metrics.columns]
    if absent:
        raise FlJaxError(f"The metrics have no column {absent[0]!r}; give the columns {', '.join(COLUMNS)}.")
    return (MetricRow(*values) for values in metrics[list(COLUMNS)].itertuples(index=False, name=None))


def load_metrics(path: str | os.PathLike[str]) -> pd.DataFrame:
    """The metrics of a run folder (or metrics.csv): arm, seed, round, split, site, metric, value (NaN where missing), note.

    Values are what was measured to the last bit. A last line that a crash cut short is left out. Raises FlJaxError where the file
    is missing, or is not as it was written.
    """
    path = Path(path)
    path = path / METRICS if path.is_dir() else path
    with disk_errors(f"read {path}"):
        content = path.read_bytes()
    content = content[: content.rfind(b"\n") + 1]
    if not content.startswith(_HEADER.encode()):
        raise FlJaxError(f"{path} does not start with the header {_HEADER.strip()}; it is not the metrics of a run.")
    try:
        # Python's float reads what repr wrote to the last bit; nothing but an empty value is missing: a site may be called "NA".
        metrics = pd.read_csv(io.StringIO(content.decode()), dtype={**_DTYPES, "value": "str"}, keep_default_na=False)
        return metrics.assign(value=[float(value or "nan") for value in metrics["value"]]).astype(_DTYPES)
    except ValueError as error:
        raise FlJaxError(f"{path} was damaged or edited ({error}); restore it, or give the run another folder.") from error


def load_run(path: str | os.PathLike[str]) -> Run:
    """Everything in a run folder but its figures, to read. Raises FlJaxError where it is not a run folder."""
    folder = RunFolder.open(path)
    environment, summary, arms = (folder.path / name for name in (ENVIRONMENT, SUMMARY, ARMS))
    return Run(
        folder.path,
        folder.config,
        read_json(environment) if environment.exists() else [],
        load_metrics(folder.path),
        read_json(summary) if summary.exists() else {},
        read_json(arms) if arms.exists() else {},
    )


class RunFolder:
    """A run's folder, to write; made by `RunFolder.create` or `RunFolder.open`. One writer at a time.

    compile_seconds: what this process spent compiling for the run, as `training.fit` adds it up. Whole files are replaced
    atomically; metrics are appended and flushed to the disk. A full disk or a lost permission is a FlJaxError, and what was there
    before stays.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self.compile_seconds = 0.0

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: Mapping[str, Any], resume: bool = False) -> Self:
        """The folder of a new run, or with `resume` of one that goes on (and of a new one where there is none yet).

        config: what JSON can hold. Raises FlJaxError where the folder cannot be written, holds anything that is not a run, holds
        a run and `resume` is False, or holds a run with another configuration (the differences are shown).
        """
        folder = Path(path).absolute()
        given = jsonable(config)
        with disk_errors(f"write to {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
            if CONFIG not in names:
                if names:
                    raise FlJaxError(f"{folder} holds other files ({names[0]}, ...); give the run an empty or new folder.")
                write_json(folder / CONFIG, given)
            else:
                stored = read_json(folder / CONFIG)
                check_config(stored, given)
                if not resume:
                    raise FlJaxError(f"{folder} already holds this run; resume it, or give another folder.")
            if METRICS not in names:
                write_atomically(folder / METRICS, _HEADER)
            (folder / FIGURES).mkdir(exist_ok=True)
        return cls.open(folder)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """The folder of a run that exists. Raises FlJaxError where it does not, or is not a run folder."""
        folder = Path(path).absolute()
        if not (folder / CONFIG).is_file() or not (folder / METRICS).is_file():
            raise FlJaxError(f"{folder} is not the folder of a run (it has no {CONFIG} and {METRICS}); check the path.")
        return cls(folder, read_json(folder / CONFIG))

    def append_metrics(self, metrics: pd.DataFrame | Iterable[MetricRow]) -> None:
        """Append rows to metrics.csv; when it returns they are on the disk, and where it raises FlJaxError none of them is."""
        lines = _lines(_rows(metrics)).encode()
        path = self.path / METRICS
        with disk_errors(f"append to {path} (its earlier rows are intact)"), open(path, "r+b") as file:
            end = _last_line_end(file)
            try:
                file.seek(end)
                file.truncate()
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    file.close()  # it would otherwise write again what it still holds
                os.truncate(path, end)
                raise

    def truncate_after(self, arm: str | Collection[str], round: int, seed: int | None = None) -> None:
        """Drop the rows of an arm or several (of one seed, or of all) beyond a round: those that a resumed run is about to measure again.

        round: rows of this round stay. Other arms' rows, and the order of all, stay as they are. Raises FlJaxError.
        """
        metrics = load_metrics(self.path)
        beyond = metrics["arm"].isin({arm} if isinstance(arm, str) else arm) & (metrics["round"] > round)
        if seed is not None:
            beyond &= metrics["seed"] == seed
        with disk_errors(f"rewrite {self.path / METRICS}"):
            write_atomically(self.path / METRICS, _HEADER + _lines(_rows(metrics[~beyond])))

    def metrics(self) -> pd.DataFrame:
        """The metrics so far (see `load_metrics`)."""
        return load_metrics(self.path)

    def record_environment(self, environment: Mapping[str, Any]) -> None:
        """Add what a process ran on (see `describe_environment`), or replace the entry of the same start.

        Written at the start it is there even if the run is killed; written again at the end it has the times.
        """
        path = self.path / ENVIRONMENT
        entry = jsonable(environment)
        entries = read_json(path) if path.exists() else []
        entries = [old for old in entries if old.get("started") != entry.get("started")]
        with disk_errors(f"write {path}"):
            write_json(path, [*entries, entry])

    def record_arms(self, arms: Mapping[str, Mapping[str, Any]]) -> None:
        """Add what is known of these arms to arms.json, or replace it."""
        path = self.path / ARMS
        with disk_errors(f"write {path}"):
            write_json(path, jsonable({**(read_json(path) if path.exists() else {}), **arms}))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write (or replace) summary.json. Raises FlJaxError for what JSON cannot hold."""
        with disk_errors(f"write {self.path / SUMMARY}"):
            write_json(self.path / SUMMARY, summary)

    def write_claims(self, verdicts: Iterable[Verdict]) -> None:
        """Write (or replace) claims.json."""
        write_claims(self.path / CLAIMS, verdicts)

    def save_figure(self, name: str, figure: Figure) -> Path:
        """Save a figure as figures/{name}.png at 200 dots per inch; returns its path."""
        if not name or Path(name).name != name:
            raise FlJaxError(f"{name!r} is not the name of a file; give a figure's name without a folder.")
        path = self.path / FIGURES / f"{name}.png"
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
        with disk_errors(f"write {path}"):
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, buffer.getvalue())
        return path


def _last_line_end(file: Any) -> int:
    """The length of a file up to its last line break: what follows is a row that a crash cut short."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 4096)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
