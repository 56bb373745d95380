"""The results page: docs/results.json keeps the last full run of each study, docs/results.md and the README's table are made from it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fl_jax.errors import FlJaxError
from fl_jax.files import disk_errors, read_json, write_atomically, write_json
from fl_jax.results import CLAIMS, Verdict, claims_table, load_run, read_claims
from fl_jax.results.claims import from_record, record

DATA, PAGE = "results.json", "results.md"
BEGIN, END = "<!-- claims: made by make reproduce -->", "<!-- end of claims -->"
_HEAD = """# Published results, and what this code gives

Made by `make reproduce` from the last full run of each study; do not edit. Measured values are means over seeds with their 95 % interval
(Student t). A claim that is known not to hold stays here with its cause. `python -m experiments.reproduce NAME` runs one study again.
"""


def bring_up_to_date(folder: Path, runs: Path, studies: Mapping[str, Sequence[str]]) -> None:
    """Takes over the finished runs of these studies below `runs`, and writes the page and the README's table anew.

    folder: of results.json and results.md; the README is beside it. studies: name -> the arguments with which it was run. One
    that was not run or failed keeps what is recorded of it. Raises FlJaxError where a file cannot be read or written.
    """
    stored = read_json(folder / DATA) if (folder / DATA).exists() else {}
    stored |= {name: entry(runs / name, arguments) for name, arguments in studies.items() if (runs / name / CLAIMS).exists()}
    with disk_errors(f"write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / DATA, stored)
        write_atomically(folder / PAGE, page(stored))
        readme = folder.absolute().parent / "README.md"
        if readme.exists():
            write_atomically(readme, with_claims(readme.read_text(), stored))


def entry(folder: Path, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """What results.json keeps of a run folder: its claims, how it was run and on what."""
    processes = load_run(folder).environment
    last = processes[-1]
    return {
        "claims": [record(verdict) for verdict in read_claims(folder / CLAIMS)],
        "seconds": sum(process["wall_seconds"] or 0 for process in processes),
        "compile_seconds": sum(process["compile_seconds"] or 0 for process in processes),
        "date": last["started"][:10], "arguments": list(arguments),
        "source": last["source"], "versions": last["versions"], "hardware": last["hardware"],
    }


def page(stored: Mapping[str, Any]) -> str:
    """results.md: one section a study."""
    return "\n".join([_HEAD, *(_section(name, found) for name, found in stored.items())])


def with_claims(readme: str, stored: Mapping[str, Any]) -> str:
    """The README with the table of all studies' claims between its two marks. Raises FlJaxError where these are missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise FlJaxError(f"The README lacks the lines {BEGIN!r} and {END!r}, between which the table of claims belongs: put them back.")
    return f"{before}{BEGIN}\n{summary(stored)}{END}{after}"


def summary(stored: Mapping[str, Any]) -> str:
    """All claims of all studies in one table, in Markdown."""
    return claims_table([verdict for found in stored.values() for verdict in _verdicts(found)], sources=False).markdown()


def _section(name: str, found: Mapping[str, Any]) -> str:
    verdicts = _verdicts(found)
    source, hardware, versions = found["source"] or {"commit": None, "dirty": None}, found["hardware"], found["versions"]
    commit = f"commit {source['commit'][:10]}{' with changes' if source['dirty'] else ''}" if source["commit"] else "outside a checkout"
    machine = f"{hardware['usable_cores']} cores of {hardware['cpu']}" if hardware["backend"] == "cpu" else ", ".join(hardware["devices"])
    packages = ", ".join(f"{package} {versions[package]}" for package in ("python", "jax", "flax", "optax") if versions.get(package))
    # what was recorded before studies could have arguments has none
    command = " ".join([f"python -m experiments.{name}", *found.get("arguments", [])])
    tolerances = dict.fromkeys(f"- {verdict.claim.claim}: {verdict.claim.reason}." for verdict in verdicts)
    return (
        f"## {name}\n\n{claims_table(verdicts).markdown()}\nWhy these tolerances:\n\n" + "\n".join(tolerances) +
        f"\n\n{_duration(found['seconds'])} ({found['compile_seconds']:.0f} s of compiling, summed over processes) on {machine}; {packages}; {commit}; "
        f"{found['date']}. Command: `{command}`\n")


def _verdicts(found: Mapping[str, Any]) -> list[Verdict]:
    return [from_record(item) for item in found["claims"]]


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 100 else f"{seconds:.0f} s"
