"""Figures for a paper, from metrics in the long format: curves over rounds, and one dot with its interval per site and arm.

The matplotlib object interface only: nothing is global, nothing is shown, and a Figure is returned.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fl_jax.data.federated import OVER_SITES
from fl_jax.results.seeds import last_round, over_seeds, select
from fl_jax.statistics import Bounds, Interval

# Okabe and Ito, "Color universal design" (2008), without its yellow, which is too light for a line; dashes and markers tell them
# apart in grey.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DASHES: tuple[object, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", ">", "X")
_GREY, _FAINT = "#555555", "#DDDDDD"
_FONT, _SMALL = 9.0, 7.5  # points
_NAME_HEIGHT = 1.25 * _FONT / 72  # inches from one name at the end of a line to the next


def curves(
    metrics: pd.DataFrame,
    metric: str,
    split: str = "validation",
    site: str = "mean",
    arms: Sequence[str] | None = None,
    confidence: float = 0.95,
    bounds: Bounds | None = None,
    size: tuple[float, float] = (6.0, 3.2),
) -> Figure:
    """One line per arm: the mean of a metric over seeds at each round, in the band of its confidence interval.

    metrics: see `load_metrics`. arms: which, and in which order; default: all. bounds: the metric's range, e.g. (0, 1), which no
    interval leaves. size: inches; the height grows where the arms' names, which stand one above another, need it. Raises
    FlJaxError where there are no such metrics.
    """
    rows = select(metrics, metric, split, site, arms)
    intervals = over_seeds(rows, ["arm", "round"], confidence, bounds)
    names = list(arms if arms is not None else rows["arm"].unique())
    figure, axes = _figure((size[0], max(size[1], 1.2 + _NAME_HEIGHT * len(names))))
    ends: list[_End] = []
    for i, arm in enumerate(names):
        line = intervals[intervals["arm"] == arm].sort_values("round")
        rounds = line["round"].to_numpy()
        mean, low, high = np.array([interval[:3] for interval in line["interval"]]).T
        color = PALETTE[i % len(PALETTE)]
        alone = "o" if np.isfinite(mean).sum() == 1 else None
        axes.fill_between(rounds, low, high, color=color, alpha=0.16, linewidth=0)
        axes.plot(rounds, mean, color=color, linestyle=_DASHES[i % len(_DASHES)], linewidth=1.6, marker=alone, markersize=4)
        finite = np.flatnonzero(np.isfinite(mean))
        if finite.size:
            ends.append(_End(arm, color, float(rounds[finite[-1]]), float(mean[finite[-1]])))
    first, last = rows["round"].min(), rows["round"].max()
    axes.set_xlim(first, last if last > first else first + 1)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    axes.set_xlabel("round", fontsize=_FONT)
    axes.set_ylabel(_label(metric, split, site), fontsize=_FONT)
    axes.grid(axis="y", color=_FAINT, linewidth=0.6)
    _caption(figure, _describe(intervals["interval"], "line", "band", confidence), _missing(rows))
    _label_ends(figure, axes, ends)
    return figure


def per_site(
    metrics: pd.DataFrame,
    metric: str,
    split: str = "test",
    arms: Sequence[str] | None = None,
    higher_is_better: bool = True,
    confidence: float = 0.95,
    bounds: Bounds | None = None,
    width: float = 6.0,
) -> Figure:
    """One row per site, one dot per arm with its interval over seeds, at each arm's last round; the best site on top.

    Each arm's worst site has a ring. Below the sites stands the mean over sites, where the metrics have it. metrics, arms,
    bounds: as for `curves`. width: inches; the height follows from the number of sites and arms. Raises FlJaxError where there
    are no such metrics.
    """
    rows = last_round(select(metrics, metric, split, arms=arms))
    names = list(arms if arms is not None else rows["arm"].unique())
    intervals = over_seeds(rows, ["arm", "site"], confidence, bounds)
    found = intervals[np.isfinite([interval.mean for interval in intervals["interval"]])]
    table: dict[tuple[str, str], Interval] = {(row.arm, row.site): row.interval for row in found.itertuples()}
    sign = 1.0 if higher_is_better else -1.0

    def quality(site: str) -> float:
        known = [table[arm, site].mean for arm in names if (arm, site) in table]
        return sign * float(np.mean(known)) if known else -np.inf

    sites = sorted((site for site in rows["site"].unique() if site not in OVER_SITES), key=quality, reverse=True)
    ordered = [*sites, *(["mean"] if (rows["site"] == "mean").any() else [])]
    spread = min(0.7, 0.2 * (len(names) - 1))
    figure, axes = _figure((width, 1.2 + len(ordered) * max(0.26, 0.11 * len(names) + 0.1)))
    legend: dict[str, Line2D] = {}  # not by label: matplotlib leaves out what begins with "_"
    for i, (arm, offset) in enumerate(zip(names, np.linspace(-spread / 2, spread / 2, len(names)), strict=True)):
        # a colour and a marker of their own for 49 arms
        color, marker = PALETTE[i % len(PALETTE)], _MARKERS[(i + i // len(PALETTE)) % len(_MARKERS)]
        (legend[arm],) = axes.plot([], [], marker, color=color, markersize=4.5)
        shown = {site: (table[arm, site], y + offset) for y, site in enumerate(ordered) if (arm, site) in table}
        for interval, y in shown.values():
            axes.plot([interval.low, interval.high], [y, y], color=color, linewidth=1.3, solid_capstyle="butt")
            axes.plot(interval.mean, y, marker, color=color, markersize=4.5, markeredgewidth=0)
        measured = [(interval.mean, y) for site, (interval, y) in shown.items() if site != "mean"]
        if len(measured) > 1:
            worst = min(measured, key=lambda dot: sign * dot[0])
            axes.plot(*worst, "o", markerfacecolor="none", markeredgecolor=color, markersize=9, markeredgewidth=1.0)
    for y, site in enumerate(ordered):
        if not any((arm, site) in table for arm in names):
            where = ("axes fraction", "data")
            axes.annotate("no finite value", (0.01, y), xycoords=where, va="center", fontsize=_SMALL, color=_GREY)
        if y % 2 == 0 and site != "mean":
            axes.axhspan(y - 0.5, y + 0.5, color="#F5F5F5", linewidth=0, zorder=0)
    if ordered != sites:
        axes.axhline(len(sites) - 0.5, color=_GREY, linewidth=0.8)
    axes.set_yticks(range(len(ordered)), [*sites, *(["mean of sites"] if ordered != sites else [])])
    axes.set_ylim(len(ordered) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(_label(metric, split, ""), fontsize=_FONT)
    _legend(figure, legend)
    ring = "ring: the arm's worst site" if len(sites) > 1 else ""
    _caption(figure, _describe(intervals["interval"], "dot", "bar", confidence), ring, _missing(rows[rows["site"].isin(sites)]))
    return figure


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(labelsize=_FONT, color=_GREY)
    return figure, axes


def _label(metric: str, split: str, site: str) -> str:
    where = {"": "", "mean": ", mean of sites", "worst": ", worst site", "all": ", records pooled"}.get(site, f", {site}")
    return f"{metric} ({split}{where})"


def _describe(intervals: pd.Series, point: str, extent: str, confidence: float) -> str:
    """What a point and its extent are, and of how many seeds."""
    counts = sorted({interval.n for interval in intervals if interval.n})
    if not counts:
        return "no values"
    if counts[-1] == 1:
        return "one seed, no interval"
    number = f"{counts[0]} to {counts[-1]}" if counts[0] < counts[-1] else str(counts[-1])
    return f"{point}: mean of {number} seeds, {extent}: {100 * confidence:g} % confidence interval"


def _missing(rows: pd.DataFrame) -> str:
    """Which sites have values that cannot be drawn: missing ones, with the reason, and infinite ones."""
    parts = []
    for what, gone in (("missing", rows["value"].isna()), ("infinite", np.isinf(rows["value"]))):
        for (site, note), group in rows[gone].groupby(["site", "note"], sort=False):
            where = f" at {site}" if site not in OVER_SITES else ""
            parts.append(f"{len(group)} of {(rows['site'] == site).sum()} values {what}{where}" + (f" ({note})" if note else ""))
    return "; ".join(parts)


def _caption(figure: Figure, *sentences: str) -> None:
    """Small print below a figure, broken into lines that fit its width."""
    text = "\n".join(sentence for sentence in sentences if sentence)
    figure.supxlabel(text, fontsize=_SMALL, color=_GREY, x=0.01, ha="left", wrap=True)


def _legend(figure: Figure, arms: dict[str, Line2D], max_columns: int = 4) -> None:
    """The arms above the figure, in reading order: matplotlib fills a legend column by column."""
    columns = min(len(arms), max_columns)
    order = [arm for i in range(columns) for arm in list(arms)[i::columns]]
    figure.legend(
        [arms[arm] for arm in order],
        order,
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        fontsize=_FONT,
        handletextpad=0.2,
    )


class _End(NamedTuple):
    """Where a line ends, in data coordinates, and what is written there."""

    name: str
    color: str
    x: float
    y: float


def _label_ends(figure: Figure, axes: Axes, ends: Sequence[_End]) -> None:
    """Write each line's name beside its end, moved apart where they would overlap, with a hair line back to the end."""
    figure.draw_without_rendering()  # for the height of the axes
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    gap = _NAME_HEIGHT * figure.dpi / axes.get_window_extent().height
    ascending = sorted(ends, key=lambda end: end.y)
    places = _spread([(end.y - low) / (high - low) for end in ascending], gap)
    for i, (end, place) in enumerate(zip(ascending, places, strict=True)):
        axes.annotate(
            end.name,
            xy=(end.x, end.y),
            xycoords="data",
            xytext=(1.035, max(gap * i, min(place, 1 - gap * (len(places) - 1 - i)))),
            textcoords="axes fraction",
            color=end.color,
            fontsize=_FONT,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": end.color, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)
            },
        )  # fmt: skip


def _spread(wishes: Sequence[float], gap: float) -> list[float]:
    """Places at least `gap` apart, in the same order, with the least squared distance to ascending wishes.

    By pooling adjacent violators (isotonic regression) of wish - position in the order * gap.
    """
    pools: list[tuple[float, int]] = []  # mean, and how many
    for i, wish in enumerate(wishes):
        mean, count = wish - i * gap, 1
        while pools and pools[-1][0] > mean:
            other, size = pools.pop()
            mean, count = (mean * count + other * size) / (count + size), count + size
        pools.append((mean, count))
    flat = [mean for mean, count in pools for _ in range(count)]
    return [mean + i * gap for i, mean in enumerate(flat)]
