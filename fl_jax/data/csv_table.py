"""Reading a CSV file with a site and a label column: what each column is, what is missing, and what is wrong with the file."""

import csv
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np

from fl_jax.data.partition import by_column, natural_key
from fl_jax.data.records import shorten
from fl_jax.errors import FlJaxError

MISSING = ("", "?", "NA", "N/A", "na", "n/a", "NaN", "nan", "NULL", "null")


class Column(NamedTuple):
    """A feature column: float64[R], NaN where missing. levels: what the codes of a categorical one mean, () if it is numeric."""

    name: str
    values: np.ndarray
    levels: tuple[str, ...]


class ParsedCsv(NamedTuple):
    """A CSV file as read: feature columns; site, label and group as codes int64[R] with their names (group may be None)."""

    columns: tuple[Column, ...]
    site: np.ndarray
    site_names: tuple[str, ...]
    label: np.ndarray
    class_names: tuple[str, ...]
    group: np.ndarray | None


class CsvOptions(TypedDict, total=False):
    """What `parse_csv` takes by keyword, and those who call it pass on."""

    group: str | None
    drop: Sequence[str]
    categorical: Sequence[str]
    missing: Collection[str]
    max_levels: int
    delimiter: str


def parse_csv(
    path: str | Path,
    site: str,
    label: str,
    *,
    group: str | None = None,
    drop: Sequence[str] = (),
    categorical: Sequence[str] = (),
    missing: Collection[str] = MISSING,
    max_levels: int = 50,
    delimiter: str = ",",
) -> ParsedCsv:
    """Read a CSV file (UTF-8, one header line, one record a line; blank lines are skipped); every column that is not named
    otherwise is a feature.

    A column whose values, missing ones apart, are all numbers is numeric unless named in `categorical`; others are categorical,
    of at most max_levels levels. drop: columns to leave out. missing: texts that mean a missing value; spaces around values
    are ignored. Raises FlJaxError, with file and line where there is one, for: no such file; no such column; lines that cannot
    be read; a missing site, label or group; a value that is no number in a column of (at least 90 %) numbers; infinite
    numbers; decimal commas; a column of too many levels; a column without a name (row numbers, as pandas writes them, would be a
    feature); fewer than two classes.
    """
    if len(delimiter) != 1 or delimiter in '\r\n"':
        raise FlJaxError(f"The delimiter must be one character, such as ',' or ';', not {delimiter!r}.")
    path = Path(path)
    header, rows, lines = _read(path, delimiter)
    roles = {"site": site, "label": label, **({"group": group} if group is not None else {})}
    for name in (*roles.values(), *drop, *categorical):
        if name not in header:
            hint = " (is the delimiter right?)" if len(header) == 1 else ""
            raise FlJaxError(f"'{path}' has no column '{name}': its columns are {shorten(header, 60)}{hint}.")
    if len(set(roles.values())) < len(roles):
        raise FlJaxError(f"Site, label and group of '{path}' must be different columns, but are {shorten(list(roles.values()))}.")
    cells = dict(zip(header, zip(*rows, strict=True), strict=True))
    gone = set(missing)
    _check_roles(path, roles, cells, lines, gone)

    site_code, site_names = by_column(np.array(cells[site]))
    label_code, class_names = by_column(np.array(cells[label]))
    if len(class_names) < 2:
        raise FlJaxError(f"Every label in column '{label}' of '{path}' is '{class_names[0]}': at least 2 classes are needed.")
    if len(class_names) > max_levels:
        raise FlJaxError(
            f"Column '{label}' of '{path}' has {len(class_names)} different values, which does not look like classes: name "
            "another label column, or raise max_levels."
        )
    names = [name for name in header if name not in roles.values() and name not in drop]
    if "" in names:
        raise FlJaxError(
            f"Column {header.index('') + 1} of '{path}' has no name, as where pandas writes row numbers: name it, or remove it "
            "from the file (index=False)."
        )
    columns = [_column(path, name, cells[name], lines, gone, name in categorical, max_levels) for name in names]
    if not columns:
        raise FlJaxError(f"'{path}' has no feature: beside site, label and group there must be at least one column.")
    return ParsedCsv(
        columns=tuple(columns),
        site=site_code,
        site_names=site_names,
        label=label_code,
        class_names=class_names,
        group=None if group is None else np.unique(np.array(cells[group]), return_inverse=True)[1].reshape(-1),
    )


def _read(path: Path, delimiter: str) -> tuple[list[str], list[list[str]], list[int]]:
    """Header, records and the line at which each record ends."""
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            records = (row for row in reader if len(row) > 1 or any(map(str.strip, row)))  # a blank line is no record
            try:
                header = [name.strip() for name in next(records, [])]
                for row in records:
                    if len(row) != len(header):
                        raise FlJaxError(
                            f"'{path}', line {reader.line_num}: there are {len(row)} values for {len(header)} columns; correct "
                            "the line (values that hold the delimiter need quotes)."
                        )
                    rows.append([cell.strip() for cell in row])
                    lines.append(reader.line_num)
            except csv.Error as error:
                raise FlJaxError(f"'{path}', line {reader.line_num}: this line is no CSV ({error}); correct it.") from error
            except UnicodeDecodeError as error:
                raise FlJaxError(
                    f"'{path}', near line {reader.line_num + 1}: the text is not UTF-8 ({error.reason}); save the file as UTF-8."
                ) from error
    except OSError as error:
        raise FlJaxError(f"The file '{path}' cannot be read ({error.strerror}): check the path.") from error
    if not header or not rows:
        raise FlJaxError(f"'{path}' holds no records: it needs a header line and at least one line of values.")
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise FlJaxError(f"'{path}' has two columns named '{twice}': rename one.")
    return header, rows, lines


def _check_roles(
    path: Path, roles: dict[str, str], cells: dict[str, tuple[str, ...]], lines: list[int], missing: set[str]
) -> None:
    """Site, label and group may not be missing; a site without any label is named."""
    sites, labels = cells[roles["site"]], cells[roles["label"]]
    empty = {role: [i for i, cell in enumerate(cells[name]) if cell in missing] for role, name in roles.items()}
    if empty["label"]:
        labelled = {s for s, value in zip(sites, labels, strict=True) if value not in missing}
        for i in empty["label"]:
            if sites[i] not in labelled and sites[i] not in missing:
                raise FlJaxError(f"Site '{sites[i]}' in '{path}' has no label at all: label its records or remove the site.")
    for role in ("site", "label", "group"):
        if empty.get(role):
            first = lines[empty[role][0]]
            raise FlJaxError(
                f"'{path}', line {first}: the {role} is missing; {len(empty[role])} records have none: fill them in or remove "
                "these records."
            )


def _column(
    path: Path, name: str, cells: tuple[str, ...], lines: list[int], missing: set[str], categorical: bool, max_levels: int
) -> Column:
    present = np.array([cell not in missing for cell in cells])
    values = np.full(len(cells), np.nan)
    numbers = [None if categorical else _number(cell) for cell in cells]
    wrong = [i for i, (number, there) in enumerate(zip(numbers, present, strict=True)) if there and number is None]
    if not wrong:
        values[present] = [number for number, there in zip(numbers, present, strict=True) if there]
        if np.isinf(values).any():
            line = lines[int(np.flatnonzero(np.isinf(values))[0])]
            raise FlJaxError(f"'{path}', line {line}: column '{name}' is infinite; correct it or leave it empty.")
        return Column(name, values, ())
    if not categorical and len(wrong) <= 0.1 * present.sum():
        raise FlJaxError(
            f"'{path}', line {lines[wrong[0]]}: column '{name}' holds '{cells[wrong[0]]}' where {present.sum() - len(wrong)} "
            f"of {present.sum()} values are numbers; correct it, name it in missing, or the column in categorical or drop."
        )
    if not categorical and all(_number(cell.replace(",", ".", 1)) is not None for cell in cells if cell not in missing):
        raise FlJaxError(
            f"'{path}', line {lines[wrong[0]]}: column '{name}' holds '{cells[wrong[0]]}', a number with a decimal comma; write "
            "points, or name the column in categorical or drop."
        )
    levels = tuple(sorted({cell for cell in cells if cell not in missing}, key=natural_key))
    if len(levels) > max_levels:
        raise FlJaxError(
            f"Column '{name}' of '{path}' has {len(levels)} different texts, too many for categories: name it in drop, or "
            "raise max_levels."
        )
    code = {level: k for k, level in enumerate(levels)}
    values[present] = [code[cell] for cell, there in zip(cells, present, strict=True) if there]
    return Column(name, values, levels)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return None if math.isnan(value) or "_" in text else value  # Python reads the code 1_2 as 12
