"""Claims: a published number, what was measured in its place, and whether it holds. Stated before a study runs, judged after it."""

import dataclasses
import enum
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt

from fl_jax.errors import FlJaxError
from fl_jax.files import disk_errors, read_json, write_json
from fl_jax.results.tables import Column, Noted, Table, comparison_table, number
from fl_jax.statistics import mean_interval

CLAIMS = "claims.json"
CONFIDENCE = 0.95


class Direction(enum.StrEnum):
    """How a measured value must lie to the published one; each side may be missed by the tolerance."""

    WITHIN = "within"
    AT_LEAST = "at least"
    AT_MOST = "at most"


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a study is to show.

    claim: in words, unique within the study. source: paper, and its table, figure or file; for a bar of our own, what it follows from.
    published: the value there. direction, tolerance >= 0: it holds where the mean over seeds is within published +- tolerance, at least
    published - tolerance, or at most published + tolerance. reason: why that tolerance. expected: False for one that is known not to
    hold, whose cause then says why, as found by experiment. quick: of a study's quick form, where that differs from the full one.
    digits: decimals in tables. Raises FlJaxError for a tolerance below 0 and for what lacks a source, a reason or a cause.
    """

    claim: str
    source: str
    published: float
    direction: Direction
    tolerance: float
    reason: str
    expected: bool = True
    cause: str = ""
    quick: bool = False
    digits: int = 3

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise FlJaxError(f"The tolerance of the claim {self.claim!r} is {self.tolerance}: give 0 or more.")
        for what, text in (("source", self.source), ("reason for its tolerance", self.reason)):
            if not text:
                raise FlJaxError(f"The claim {self.claim!r} has no {what}: give one.")
        if not self.expected and not self.cause:
            raise FlJaxError(f"The claim {self.claim!r} is not expected to hold: give the cause that was found.")

    def admits(self, value: float) -> bool:
        """Whether a measured value satisfies the claim; NaN does not."""
        below = value >= self.published - self.tolerance
        above = value <= self.published + self.tolerance
        return bool({Direction.WITHIN: below and above, Direction.AT_LEAST: below, Direction.AT_MOST: above}[self.direction])


class Verdict(NamedTuple):
    """A claim and what came of it.

    measured: the mean over `seeds` seeds, low and high its 95 % interval (None for one seed). holds: None where it was not run; cause
    then says why.
    """

    study: str
    claim: Claim
    measured: float | None
    low: float | None
    high: float | None
    seeds: int
    holds: bool | None
    cause: str

    @property
    def broken(self) -> bool:
        """Was expected to hold, was run, and does not hold."""
        return self.holds is False and self.claim.expected


def judge(study: str, claims: Iterable[Claim], values: Mapping[str, npt.ArrayLike]) -> list[Verdict]:
    """Each claim's verdict. values: by the text of the claim, what was measured, float[n] with one value a seed.

    A law that must hold for every seed is a claim of 1 whose values are 1 where it holds and 0 elsewhere. Raises FlJaxError where a claim has no
    values, or values have no claim.
    """
    claims = list(claims)
    names = [claim.claim for claim in claims]
    for name in (*names, *values):
        if names.count(name) != 1 or name not in values:
            raise FlJaxError(f"The study {study} must measure each of its claims once, and nothing else, but {name!r} is not such a pair.")
    return [_verdict(study, claim, values[claim.claim]) for claim in claims]


def _verdict(study: str, claim: Claim, values: npt.ArrayLike) -> Verdict:
    found = mean_interval(values, CONFIDENCE)
    # an arm that has no value in some seed has not shown what it claims
    holds = claim.admits(found.mean) and found.missing == 0
    cause = claim.cause or (f"{found.missing} of {found.n + found.missing} seeds have no value" if found.missing else "")
    return Verdict(study, claim, _finite(found.mean), _finite(found.low), _finite(found.high), found.n, holds, cause)


def not_run(study: str, claims: Iterable[Claim], why: str) -> list[Verdict]:
    """The verdicts of a study that could not run here. why: what is missing, for a reader."""
    return [Verdict(study, claim, None, None, None, 0, None, f"not run: {why}") for claim in claims]


def failed(study: str, claims: Iterable[Claim], why: str) -> list[Verdict]:
    """The verdicts of a study that ended without a result: none of its claims holds."""
    return [Verdict(study, claim, None, None, None, 0, False, f"failed: {why}") for claim in claims]


def write_claims(path: str | os.PathLike[str], verdicts: Iterable[Verdict]) -> None:
    """Writes claims.json: a list of objects, one a claim, with the claim's fields and the verdict's side by side."""
    with disk_errors(f"write {path}"):
        write_json(Path(path), [record(verdict) for verdict in verdicts])


def read_claims(path: str | os.PathLike[str]) -> list[Verdict]:
    """What `write_claims` wrote. Raises FlJaxError where the file is missing or something else."""
    content = read_json(Path(path))
    try:
        return [from_record(item) for item in content]
    except (KeyError, TypeError, ValueError) as error:
        raise FlJaxError(f"{path} does not hold claims ({error!r} is wrong): run the study again.") from error


def record(verdict: Verdict) -> dict[str, Any]:
    """A verdict as the flat JSON object of claims.json."""
    fields = dataclasses.asdict(verdict.claim) | {"direction": str(verdict.claim.direction)}
    return {"study": verdict.study} | fields | {
        name: getattr(verdict, name) for name in ("measured", "low", "high", "seeds", "holds", "cause")}


def from_record(item: Mapping[str, Any]) -> Verdict:
    """The verdict of such an object. Raises KeyError, TypeError, ValueError for another."""
    fields = {field.name: item[field.name] for field in dataclasses.fields(Claim)}
    claim = Claim(**fields | {"direction": Direction(fields["direction"])})
    return Verdict(item["study"], claim, item["measured"], item["low"], item["high"], item["seeds"], item["holds"], item["cause"])


def claims_table(verdicts: Sequence[Verdict], title: str = "", *, sources: bool = True) -> Table:
    """Published beside measured, one row a claim; why one does not hold or was not run is a footnote. sources: with their column.

    A study is named where there are several.
    """
    several = len({verdict.study for verdict in verdicts}) > 1
    columns = [
        *([Column("study", "study", right=False)] if several else []), Column("claim", "claim", right=False), *([Column("source", "source", right=False)] if sources else []),
        Column("published", "published"), Column("measured", "measured"), Column("seeds", "seeds"), Column("holds", "holds", right=False),
    ]
    return comparison_table([_row(verdict) for verdict in verdicts], columns, title)


def _row(verdict: Verdict) -> dict[str, Any]:
    claim, show = verdict.claim, number(verdict.claim.digits)
    sign, bar = {Direction.WITHIN: ("", "±"), Direction.AT_LEAST: ("≥ ", "−"), Direction.AT_MOST: ("≤ ", "+")}[claim.direction]
    published = f"{sign}{show(claim.published)}" + (f" {bar} {show(claim.tolerance)}" if claim.tolerance else "")
    measured: str | None = None
    if verdict.measured is not None:
        interval = "" if verdict.low is None or verdict.high is None else f" [{show(verdict.low)}, {show(verdict.high)}]"
        measured = show(verdict.measured) + interval
    return {
        "study": verdict.study, "claim": f"{claim.claim}{' (quick)' if claim.quick else ''}", "source": claim.source, "published": published, "measured": measured,
        "seeds": verdict.seeds or None, "holds": Noted(_holds(verdict), verdict.cause),
    }


def _holds(verdict: Verdict) -> str:
    if verdict.holds is None:
        return "not run"
    if verdict.holds:
        return "yes" if verdict.claim.expected else "yes, unexpectedly"
    return "NO" if verdict.claim.expected else "no, as known"


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None  # NaN neither
