"""What a published data set is, before anything of it is on this machine: its files, its terms, and how raw files become records."""

import csv
import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fl_jax.errors import FlJaxError
from fl_jax.files import disk_errors

Columns = Mapping[str, np.ndarray]
"""Records as one array [R, ...] for each feature."""


class RawFile(NamedTuple):
    """A file as its publisher gives it away. name: in the folder of the data set. url: the canonical address."""

    name: str
    url: str


class Published(NamedTuple):
    """A data set that others publish, and that is kept prepared in the format of TensorFlow Datasets (TFDS).

    name: of the data set, and of its folder of raw files. version: of the prepared form, "MAJOR.MINOR.PATCH". about: what a
    record is and where from. features: () -> the TFDS features of a record, by name; called when TFDS is needed.
    parse: (folder of raw files) -> split -> Columns, in the order in which records are kept. It raises FlJaxError unless the
    files hold what was published, to the last digit: what is wrong is named by file, and by line where there are lines.
    supervised: the features that are x and y, where it is these two.
    """

    name: str
    version: str
    about: str
    licence: str
    citation: str
    homepage: str
    files: tuple[RawFile, ...]
    features: Callable[[], dict[str, Any]]
    parse: Callable[[Path], Mapping[str, Columns]]
    supervised: tuple[str, str] | None = None


def read_bytes(path: Path) -> bytes:
    """The content of a raw file. Raises FlJaxError where it cannot be read."""
    with disk_errors(f"read the raw file '{path}'"):
        return path.read_bytes()


def check_content(path: Path, content: bytes, sha256: str, what: str = "content") -> None:
    """Raise FlJaxError unless the content, e.g. of `path` once it is unzipped, has the published digest."""
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise FlJaxError(
            f"'{path}' is not the published file: the checksum (sha256) of its {what} is {found[:16]}..., expected {sha256[:16]}...; "
            "get the file again."
        )


def read_rows(path: Path, sha256: str, *, rows: int, columns: int | Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV file with the lines they stand in, from 1; after the last one, the checksum is compared.

    columns: their names, which the first line must give, or only their number in a file without such a line. Raises FlJaxError
    for text that is not UTF-8, missing or other columns, a line with another number of values, fewer or more than `rows`
    records, and whatever else is not as published.
    """
    content = read_bytes(path)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise FlJaxError(f"'{path}', line {line}: this is no text (UTF-8), so the file is damaged; get it again.") from error
    reader = csv.reader(text.splitlines(), strict=True)
    try:
        if not isinstance(columns, int):
            _check_header(path, next(reader, []), columns)
        width = columns if isinstance(columns, int) else len(columns)
        count = 0
        for cells in reader:
            if len(cells) != width:
                raise FlJaxError(
                    f"'{path}', line {reader.line_num}: there are {len(cells)} values, expected {width}, so the file is truncated or "
                    "was changed; get it again."
                )
            count += 1
            yield reader.line_num, cells
    except csv.Error as error:
        raise FlJaxError(f"'{path}', line {reader.line_num}: this line cannot be read ({error}); get the file again.") from error
    if count != rows:
        why = "the file is truncated" if count < rows else "lines were added"
        raise FlJaxError(
            f"'{path}', line {max(reader.line_num, 1)}: the file ends after {count} records, expected {rows}: {why}; get it again."
        )
    check_content(path, content, sha256)


def _check_header(path: Path, header: Sequence[str], columns: Sequence[str]) -> None:
    for name in columns:
        if name not in header:
            raise FlJaxError(f"'{path}', line 1: the column '{name}' is missing; get the file again.")
    if len(header) != len(columns):
        raise FlJaxError(f"'{path}', line 1: there are {len(header)} columns, expected {len(columns)}; get the file again.")
    for k, (found, name) in enumerate(zip(header, columns, strict=True)):
        if found != name:
            raise FlJaxError(f"'{path}', line 1: column {k + 1} is '{found}', expected '{name}'; get the file again.")


def number(path: Path, line: int, column: str, text: str, *, missing: Collection[str] = ()) -> float:
    """The finite number in a cell, NaN for a text that means missing. Raises FlJaxError for anything else."""
    if text in missing:
        return math.nan
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise FlJaxError(f"'{path}', line {line}: '{text}' in column '{column}' is no number; get the file again.")
    return value


def choice(path: Path, line: int, column: str, text: str, choices: Collection[str]) -> str:
    """The text in a cell, one of `choices`. Raises FlJaxError for anything else."""
    if text not in choices:
        raise FlJaxError(
            f"'{path}', line {line}: '{text}' in column '{column}' is none of {', '.join(sorted(choices))}; get the file again."
        )
    return text
