"""Tables that compare arms: aligned in a terminal, plain in a pipe, Markdown in a document.

A cell is formatted by its column: a number, a mean with its interval, a difference with its sign, or a text. What is missing is a
dash with a footnote that says why.
"""

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from fl_jax.errors import FlJaxError
from fl_jax.statistics import Interval

MISSING = "–"
_GAP = 3  # what rich draws between two columns of a box without lines
_TEXT_WIDTH = 16  # a column of text is not folded to fewer characters than this
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


class Missing(NamedTuple):
    """A value that is not there, and why: the reason becomes a footnote."""

    reason: str


class Noted(NamedTuple):
    """A value that is there, with something to be said of it in a footnote ("" for nothing)."""

    value: Any
    note: str


class Column(NamedTuple):
    """A column: the key of its values in a row, its heading, how a value becomes text, and whether it is aligned to the right.

    format: (value) -> text; it is not asked for values that are missing (None, NaN, Missing, an Interval whose mean is NaN).
    """

    key: str
    heading: str
    format: Callable[[Any], str] = str
    right: bool = True


def number(digits: int = 3) -> Callable[[float], str]:
    """A format: a number with `digits` decimals, without the zero before the point (.912, -.004, 1.204)."""

    def format(value: float) -> str:
        text = f"{float(value):.{digits}f}"
        text = text.lstrip("-") if float(text) == 0 else text  # no -.000
        return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text

    return format


def signed(digits: int = 3) -> Callable[[float], str]:
    """A format for differences: as `number`, with + where it is positive after rounding."""
    plain = number(digits)

    def format(value: float) -> str:
        text = plain(value)
        return text if text.startswith("-") or float(text) == 0 else f"+{text}"

    return format


def with_bounds(each: Callable[[float], str]) -> Callable[[Interval], str]:
    """A format for intervals: mean [low, high], each of them by `each`; the mean alone where there is no interval (one value)."""

    def format(value: Interval) -> str:
        if math.isnan(value.low):
            return each(value.mean)
        return f"{each(value.mean)} [{each(value.low)}, {each(value.high)}]"

    return format


def with_margin(digits: int = 3) -> Callable[[Interval], str]:
    """A format for intervals that are symmetric about their mean: mean ± half their width; the mean alone where there is none."""
    plain = number(digits)

    def format(value: Interval) -> str:
        if math.isnan(value.low):
            return plain(value.mean)
        return f"{plain(value.mean)} ± {plain((value.high - value.low) / 2)}"

    return format


class Table(NamedTuple):
    """A table of texts, to print with rich, `text()` or `markdown()`.

    cells: one tuple a row. notes: the footnotes, without their marks.
    """

    columns: tuple[Column, ...]
    cells: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    title: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title:
            yield Text(self.title, style="bold")
        for i, block in enumerate(self._blocks(options.max_width)):
            if i:
                yield Text("")
            table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
            for column in block:
                table.add_column(
                    Text(column.heading),
                    justify="right" if column.right else "left",
                    min_width=column.width,
                    no_wrap=column.right,
                    overflow="fold",
                    vertical="top",
                )
            for cells in zip(*(column.cells for column in block), strict=True):
                table.add_row(*map(Text, cells))
            yield table
        for mark, note in enumerate(self.notes, start=1):
            yield Text(f"{_superscript(mark)} {note}")

    def _blocks(self, width: int) -> list[list["_Laid"]]:
        """The columns as they fit into a width.

        As they are, with folded headings, with intervals below their means, or in blocks that each begin with the first column.
        """
        texts = [(column, [cells[i] for cells in self.cells]) for i, column in enumerate(self.columns)]
        laid = []
        for fold, break_cells in ((False, False), (True, False), (True, True)):
            laid = [_lay_out(column, cells, fold, break_cells) for column, cells in texts]
            if _width(laid) <= width:
                return [laid]
        blocks = [laid[:2]]
        for column in laid[2:]:
            if _width([*blocks[-1], column]) > width:
                blocks.append([laid[0]])
            blocks[-1].append(column)
        return blocks

    def text(self, width: int = 80) -> str:
        """The table as plain text of at most `width` characters a line; what does not fit goes below, never away."""
        console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())

    def markdown(self) -> str:
        """The table in Markdown, with the columns aligned in the source too."""
        headings = [_escaped(column.heading) for column in self.columns]
        lines = [headings, *([_escaped(cell) for cell in cells] for cells in self.cells)]
        layout = [(max(3, *(len(line[i]) for line in lines)), column.right) for i, column in enumerate(self.columns)]

        def row(cells: Sequence[str]) -> str:
            pairs = zip(cells, layout, strict=True)
            return f"| {' | '.join(cell.rjust(width) if right else cell.ljust(width) for cell, (width, right) in pairs)} |"

        rule = ["-" * (width - 1) + (":" if right else "-") for width, right in layout]
        parts = [f"**{_escaped(self.title)}**\n"] if self.title else []
        parts += [row(lines[0]), row(rule), *map(row, lines[1:])]
        parts += [f"\n{_superscript(mark)} {_escaped(note)}" for mark, note in enumerate(self.notes, start=1)]
        return "\n".join(parts) + "\n"


def comparison_table(rows: pd.DataFrame | Iterable[Mapping[str, Any]], columns: Sequence[Column], title: str = "") -> Table:
    """A Table of rows (dicts, or a DataFrame) with the given columns, in their order.

    A value that is missing (not there, None, NaN, Missing, or an Interval of no values) is a dash; the reason, if it is known, is
    a footnote that equal reasons share, and so is what is said of a Noted value. Raises FlJaxError for a DataFrame that lacks a column, and for no columns.
    """
    if not columns:
        raise FlJaxError("A table without columns shows nothing; give at least one Column.")
    if isinstance(rows, pd.DataFrame):
        absent = [column.key for column in columns if column.key not in rows.columns]
        if absent:
            raise FlJaxError(f"The table's data has no column {absent[0]!r}; it has {', '.join(map(str, rows.columns))}.")
        rows = [dict(zip(rows.columns, values, strict=True)) for values in rows.itertuples(index=False, name=None)]
    notes: list[str] = []

    def cell(row: Mapping[str, Any], column: Column) -> str:
        value = row.get(column.key)
        value, note = value if isinstance(value, Noted) else (value, "")
        if _is_missing(value):
            text, note = MISSING, note or _reason(value)
        else:
            text = column.format(value)
        if note and note not in notes:
            notes.append(note)
        return f"{text}{_superscript(notes.index(note) + 1)}" if note else text

    cells = tuple(tuple(cell(row, column) for column in columns) for row in rows)
    return Table(tuple(columns), cells, tuple(notes), title)


class _Laid(NamedTuple):
    """A column as it is drawn: heading and cells with their line breaks, and the width that it needs."""

    heading: str
    cells: list[str]
    width: int
    right: bool


def _lay_out(column: Column, cells: Sequence[str], fold: bool, break_cells: bool) -> _Laid:
    """A column of text may be folded anywhere, one of numbers only between a mean and its interval, and in its heading."""
    if break_cells and column.right:
        cells = [cell.replace(" [", "\n[", 1) for cell in cells]
    width = max(map(cell_len, "\n".join(cells).split("\n")))
    if not column.right:
        natural = max(width, cell_len(column.heading))
        return _Laid(column.heading, list(cells), min(natural, _TEXT_WIDTH) if fold else natural, False)
    words = column.heading.split() if fold else [column.heading]
    width = max(width, *map(cell_len, words)) if words else width
    return _Laid("\n".join(textwrap.wrap(column.heading, max(width, 1))), list(cells), width, True)


def _width(columns: Sequence[_Laid]) -> int:
    return sum(column.width for column in columns) + _GAP * (len(columns) - 1)


def _is_missing(value: Any) -> bool:
    if value is None or value is pd.NA or value is pd.NaT or isinstance(value, Missing):
        return True
    try:
        return math.isnan(value.mean if isinstance(value, Interval) else value)  # NumPy's and jax's scalars too
    except (TypeError, OverflowError):  # a text; an integer beyond the floats
        return False


def _reason(value: Any) -> str:
    if isinstance(value, Missing):
        return value.reason
    return value.note if isinstance(value, Interval) else ""


def _superscript(mark: int) -> str:
    return str(mark).translate(_SUPERSCRIPTS)


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, within a table's cell."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("*", "\\*").replace("_", "\\_")
