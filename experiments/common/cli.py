"""The command line that every experiment shares: `python -m experiments.NAME [--config FILE.json] [--quick] [--out DIR] [--field VALUE]`.

A value comes from the command line, else from the configuration file, else from the defaults: those of the full study, or with --quick
those of its quick form. The configuration that a run records (config.json of its folder) is such a file.
"""

import argparse
import contextlib
import dataclasses
import datetime
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from experiments.common.config import UNRECORDED, Common, ConfigT, load_json, override, recorded
from fl_jax.errors import FlJaxError
from fl_jax.shell import status_of

if TYPE_CHECKING:
    from fl_jax.results import RunFolder

__all__ = ["UNRECORDED", "Common", "main", "new_folder", "parse", "recorded", "run_folder"]

RUNS = Path("runs")


def main(
    run: Callable[[ConfigT], None], config_type: type[ConfigT], argv: Sequence[str] | None = None, *, computes: bool = True
) -> None:
    """Runs an experiment with the configuration of its command line; for `if __name__ == "__main__"`.

    argv: the arguments, default: the process's. computes: False for a program that leaves the devices to others. Splits the CPU into devices and turns the compilation cache on, before `run` can touch
    a device. Exits the process with 2 after one line on stderr for a FlJaxError (or tyro's own words for arguments that it cannot parse),
    130 after Ctrl-C, and 141 without a word where nobody reads the output any more.
    """
    name = _name(run)

    def action() -> None:
        config = parse(config_type, sys.argv[1:] if argv is None else argv, f"python -m experiments.{name}")
        if computes:
            _prepare(config.devices, name)
        run(config)

    status = status_of(name, action)
    if status:
        sys.exit(status)


def parse(config_type: type[ConfigT], argv: Sequence[str], program: str | None = None) -> ConfigT:
    """The configuration that a command line asks for.

    program: how it is called, for the help. Raises FlJaxError for a configuration file that does not fit; tyro ends the process with 0
    after --help and with 2 after arguments that it cannot parse.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path, nargs="?")
    first.add_argument("--quick", action=argparse.BooleanOptionalAction)
    known, _ = first.parse_known_args(argv)
    content = {} if known.config is None else load_json(known.config)
    if known.quick and content.get("quick") is False:
        raise FlJaxError(f"{known.config} is the configuration of a full study, whose values --quick would not change: leave one of them out.")
    quick = content.get("quick") is True if known.quick is None else known.quick
    defaults = config_type.quick_defaults() if quick else config_type()
    defaults = override(dataclasses.replace(defaults, quick=quick), content, known.config)
    config = _command_line(config_type, defaults, argv, program)
    if config.resume and config.out is None:
        raise FlJaxError("--resume goes on with a run that there is: give its folder with --out DIR.")
    return config


@contextlib.contextmanager
def run_folder(config: Common, name: str) -> "Iterator[RunFolder]":
    """The folder of a run, new or with --resume the one that goes on; at the end it has the times and, with --tensorboard, event files.

    name: of the experiment, for a folder below runs/ where there is no --out. Raises FlJaxError as `RunFolder.create` does, and at once
    where event files are wanted and tensorboardX is not installed.
    """
    from fl_jax.results import RunFolder, describe_environment, now, write_event_files  # jax, which --help does without
    from fl_jax.results.tensorboard import summary_writer

    began, started = time.perf_counter(), now()
    if config.tensorboard:
        summary_writer()
    folder = RunFolder.create(config.out or new_folder(name), recorded(config), config.resume)
    folder.record_environment(describe_environment(started))
    yield folder
    if config.tensorboard:
        write_event_files(folder.metrics(), folder.path / "tensorboard", replace=True)
    folder.record_environment(describe_environment(started, time.perf_counter() - began, folder.compile_seconds))


def new_folder(name: str) -> Path:
    """runs/NAME/DATE_TIME, a path at which there is nothing yet, for a run without --out."""
    stamp = f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}"
    folder, again = RUNS / name / stamp, 1
    while folder.exists():
        again += 1
        folder = RUNS / name / f"{stamp}_{again}"
    return folder


def _command_line(config_type: type[ConfigT], defaults: ConfigT, argv: Sequence[str], program: str | None) -> ConfigT:
    """What tyro makes of the arguments: the fields of the configuration, and --config beside them."""
    file = Annotated[Path | None, tyro.conf.arg(metavar="FILE.json", help="a configuration to start from, e.g. config.json of a run folder")]
    fields = [("config", file, None), ("experiment", Annotated[config_type, tyro.conf.arg(name="")], defaults)]
    line: Any = tyro.cli(
        dataclasses.make_dataclass("CommandLine", fields, frozen=True), args=list(argv), prog=program,
        description=inspect.getdoc(config_type))
    return line.experiment


def _prepare(devices: int | None, name: str) -> None:
    from fl_jax import runtime  # jax, which --help does without

    runtime.compilation_cache()
    count = runtime.virtual_devices(devices)
    if devices not in (None, count):
        print(f"{name}: --devices {devices} has no effect here: there are {count}.", file=sys.stderr)


def _name(run: Callable[..., None]) -> str:
    """The NAME of `python -m experiments.NAME`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name if run.__module__ == "__main__" and spec is not None else run.__module__
    return module.rpartition(".")[2]
