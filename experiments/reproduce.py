"""Published results beside what this code gives: runs the studies, one process each, and prints which of their claims hold.

    python -m experiments.reproduce                      # all studies in full: make reproduce
    python -m experiments.reproduce --quick              # their quick forms, at most 90 s each on 2 cores
    python -m experiments.reproduce fed_heart_disease    # one or some of them

Writes DIR/claims.json and DIR/NAME/, the run folder of each study. A study that is finished is kept while its configuration and its code
stay the same; one that was interrupted goes on where it was. Raw data are prepared from FL_JAX_RAW where they are missing
(`python -m fl_jax.data list`); a study without its data is reported as not run. Exits with 1 where a claim that was expected to hold does not.
"""

import dataclasses
import functools
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.rule import Rule

from experiments.common import cli, results_page
from experiments.common.reproduction import STUDIES, Study, code_of, study
from fl_jax import data
from fl_jax.errors import FlJaxError
from fl_jax.files import disk_errors, read_json, write_json
from fl_jax.results import CLAIMS, Verdict, claims_table, read_claims
from fl_jax.results.claims import failed, not_run, write_claims
from fl_jax.shell import INTERRUPTED

BROKEN = 1
STAMP = ".reproduced.json"
"""In a study's run folder: of which configuration and code it is, and whether it is finished."""


@dataclasses.dataclass(frozen=True)
class Config(cli.Common):
    """Published results beside what this code gives: runs studies and prints which of their claims hold.

    A study that is finished is kept while its configuration and code stay the same, and one that was interrupted goes on, also
    without --resume. --out is runs/reproduce where it is not given, or runs/reproduce_quick.
    """

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """studies to run; all of them where none is named"""
    record: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """bring results.json and results.md in this folder, and the claims in the README beside it, up to date with these full runs"""

    def __post_init__(self) -> None:
        if self.record is not None and self.quick:
            raise FlJaxError("--record keeps the results of full runs: leave --quick out.")


def run(config: Config) -> None:
    """Runs the studies; exits the process with 1 where a claim that was expected to hold does not."""
    out = (config.out or cli.RUNS / ("reproduce_quick" if config.quick else "reproduce")).absolute()
    studies = [study(name) for name in dict.fromkeys(config.names or STUDIES)]
    with disk_errors(f"write to {out}"):
        out.mkdir(parents=True, exist_ok=True)
    console = Console()
    began, verdicts = time.perf_counter(), list[Verdict]()
    for i, one in enumerate(studies):
        console.print(Rule(f"{i + 1} of {len(studies)}: {one.name}", align="left"))
        verdicts += reproduce(one, out / one.name, config)
        write_claims(out / CLAIMS, verdicts)
    console.print("", claims_table(verdicts, "Published results"), "")
    broken = [verdict for verdict in verdicts if verdict.broken]
    console.print(
        f"{sum(verdict.holds is True for verdict in verdicts)} of {len(verdicts)} claims hold, {sum(verdict.holds is None for verdict in verdicts)} "
        f"were not run, {len(broken)} were expected to hold and do not; {time.perf_counter() - began:.0f} s. Claims and run folders are in",
        highlight=False)
    console.print(f"{out}", style="bold", highlight=False, soft_wrap=True)
    if config.record is not None:
        results_page.bring_up_to_date(config.record, out, {one.name: arguments_of(one, config) for one in studies})
    if broken:
        sys.stdout.flush()
        sys.exit(BROKEN)


def arguments_of(one: Study, config: Config) -> tuple[str, ...]:
    """What `python -m experiments.NAME` is given for the form of a study that is run here."""
    if config.quick:
        return ("--quick",)
    return one.reproduction.on_gpu if one.reproduction.on_gpu and _has_gpu() else ()


def reproduce(one: Study, folder: Path, config: Config) -> list[Verdict]:
    """The verdicts of one study: of a finished run, of one that goes on, or of a new one."""
    arguments = arguments_of(one, config)
    wanted = cli.parse(one.config, arguments)
    claims = one.reproduction.claims(wanted)
    try:
        for name in one.reproduction.datasets:
            data.ensure_prepared(name)
    except data.DataMissing as error:
        print(error, file=sys.stderr)
        return not_run(one.name, claims, f"{error}")
    if one.reproduction.gpu and not config.quick and not _has_gpu():
        return not_run(one.name, claims, "its full form takes too long without a GPU")
    print(f"{one.name}: {len(claims)} claims", flush=True)
    identity = {"config": cli.recorded(wanted), "code": code_of(one.name)}
    stored = _stamp(folder)
    if stored == identity | {"finished": True}:
        print(f"kept from the run in {folder}")
        return read_claims(folder / CLAIMS)
    if stored is None or stored != identity | {"finished": False}:
        _set_aside(folder)
        _write_stamp(folder, identity | {"finished": False})
    command = [sys.executable, "-m", f"experiments.{one.name}", "--out", f"{folder}", "--resume", *arguments]
    command += [] if config.devices is None else ["--devices", f"{config.devices}"]
    command += ["--tensorboard"] if config.tensorboard else []
    status = _wait(command)
    if status == INTERRUPTED:
        raise KeyboardInterrupt(f"{one.name} was interrupted; the same command goes on with it.")
    if status or not (folder / CLAIMS).exists():
        return failed(one.name, claims, f"{' '.join(command[1:])} ended with status {status}")
    _write_stamp(folder, identity | {"finished": True})
    return read_claims(folder / CLAIMS)


def _wait(command: list[str]) -> int:
    """The status with which a process ends. Ctrl-C reaches it too, and it is given the time to save what it has."""
    with subprocess.Popen(command) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue


@functools.cache
def _has_gpu() -> bool:
    """Asked in another process: the first one that looks at a GPU keeps most of its memory."""
    asked = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.default_backend())"], capture_output=True, text=True, check=False)
    return asked.stdout.split()[-1:] == ["gpu"]


def _stamp(folder: Path) -> Any:
    return read_json(folder / STAMP) if (folder / STAMP).exists() else None


def _write_stamp(folder: Path, stamp: Any) -> None:
    with disk_errors(f"write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / STAMP, stamp)


def _set_aside(folder: Path) -> None:
    """Makes room for a run of another configuration or code; what is there keeps its results under a name with a number."""
    if folder.exists():
        number = 1
        while folder.with_name(f"{folder.name}_{number}").exists():
            number += 1
        with disk_errors(f"rename {folder}"):
            folder.rename(folder.with_name(f"{folder.name}_{number}"))
        print(f"An earlier run, of another configuration or code, is kept as {folder.name}_{number}.")


if __name__ == "__main__":
    cli.main(run, Config, computes=False)
