"""The figures of the study of adaptive clipping: accuracy by clip, and the bounds and what they cut over rounds."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from experiments.adaptive_clipping_protocol import MEDIAN, PLAIN, short
from experiments.common.figures import GREY, dress
from fl_jax.results import over_seeds, select
from fl_jax.results.figures import PALETTE
from fl_jax.statistics import mean_interval

if TYPE_CHECKING:
    from experiments.adaptive_clipping_report import Measured

_ACCURACY = (0.0, 1.0)


def by_clip(found: "Measured") -> Figure:
    """Test accuracy of each fixed clip with its interval; the median bound and no privacy as lines with theirs."""
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = _axes(figure, 111, "clip", "test accuracy")
    clips = np.array(found.config.clips)
    fixed = [mean_interval(found.accuracy(name), bounds=_ACCURACY) for name in found.bounds[:-1]]
    for name, color, dashes in ((PLAIN, PALETTE[6], (0, (5, 1.5))), (MEDIAN, PALETTE[1], "-")):
        interval = mean_interval(found.accuracy(name), bounds=_ACCURACY)
        axes.axhspan(interval.low, interval.high, color=color, alpha=0.15, linewidth=0)
        axes.axhline(interval.mean, color=color, linewidth=1.5, linestyle=dashes, label=name)
    low, high = ([abs(interval.mean - getattr(interval, side)) for interval in fixed] for side in ("low", "high"))
    axes.errorbar(
        clips, [interval.mean for interval in fixed], yerr=[low, high], fmt="o-", color=PALETTE[0], linewidth=1.2, markersize=4.5,
        capsize=3, label="fixed clip")
    bound = found.settled(MEDIAN, "clip").mean()
    axes.axvline(bound, color=PALETTE[1], linewidth=0.9, linestyle=(0, (1.5, 1.5)))
    axes.annotate(
        f"median bound, {bound:.2f}", (bound, 0.03), xycoords=("data", "axes fraction"), xytext=(3, 0),
        textcoords="offset points", fontsize=7.5, color=PALETTE[1])
    _log(axes.xaxis, axes.set_xscale, clips)
    _legend(figure, axes)
    return figure


def over_rounds(found: "Measured") -> Figure:
    """Left the median bound of every seed beside the fixed ones, right the share of the updates that each cuts."""
    figure = Figure(figsize=(8.2, 3.4), layout="constrained")
    left, right = _axes(figure, 121, "round", "bound"), _axes(figure, 122, "round", "share of updates that are cut")
    colors = [PALETTE[i] for i in (0, 2, 3, 4, 5)]
    for i, (name, clip) in enumerate(zip(found.bounds[:-1], found.config.clips, strict=True)):
        left.axhline(clip, color=colors[i % len(colors)], linewidth=1.0, linestyle=(0, (4, 2)))
        _line(right, found, name, colors[i % len(colors)], 1.0, short(name))
    rows = select(found.metrics, "clip", "round", "all", [MEDIAN]).sort_values("round")
    for _, one in rows.groupby("seed"):
        left.plot(one["round"], one["value"], color=PALETTE[1], linewidth=0.8, alpha=0.5)
    _line(right, found, MEDIAN, PALETTE[1], 1.8, f"{MEDIAN}{' (left: of each seed)' if found.config.seeds > 1 else ''}")
    right.axhline(1 - found.config.target, color=GREY, linewidth=0.8, linestyle=(0, (4, 2)))
    right.set_ylim(-0.02, 1.02)
    for axes in (left, right):
        axes.set_xlim(1, found.config.rounds)
        axes.axvline(found.config.settled, color=GREY, linewidth=0.6, linestyle=(0, (1, 2)))
    _log(left.yaxis, left.set_yscale, np.array(found.config.clips))
    _legend(figure, right)
    return figure


def _line(axes: Axes, found: "Measured", name: str, color: str, width: float, label: str) -> None:
    """The share that an arm cuts, its mean over seeds and the interval."""
    rows = over_seeds(select(found.metrics, "clipped", "round", "all", [name]), ["round"], bounds=_ACCURACY)
    mean, low, high = np.array([interval[:3] for interval in rows["interval"]]).T
    axes.fill_between(rows["round"], low, high, color=color, alpha=0.16, linewidth=0)
    axes.plot(rows["round"], mean, color=color, linewidth=width, label=label)


def _axes(figure: Figure, place: int, x: str, y: str) -> Axes:
    axes = figure.add_subplot(place)
    dress(axes, x, y)
    return axes


def _log(axis: Any, set_scale: Callable[[str], None], ticks: npt.NDArray[np.float64]) -> None:
    """A logarithmic axis whose ticks are the clips."""
    set_scale("log")
    axis.set_ticks(ticks, minor=False)
    axis.set_ticks([], minor=True)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _legend(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 3), frameon=False, fontsize=8)
