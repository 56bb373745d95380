"""The figures of the study of private chest X-rays: AUROC over epsilon, and how clips move."""

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from experiments.common.figures import FAINT, GREY, dress
from experiments.dp_chest_xray_protocol import KINDS, NO_DP, arm_name
from fl_jax.results import select
from fl_jax.results.figures import PALETTE
from fl_jax.statistics import Interval, mean_interval

if TYPE_CHECKING:
    from experiments.dp_chest_xray_report import Measured

_MARKERS = ("o", "s", "^")


def auroc_over_epsilon(measured: "Measured") -> Figure:
    """AUROC of all test images over epsilon for each clipping, and without privacy."""
    figure, axes = _panel("ε of an image", "AUROC of all test images")
    plain = _interval(measured, NO_DP)
    axes.axhspan(plain.low, plain.high, color=FAINT, linewidth=0)
    axes.axhline(plain.mean, color=GREY, linewidth=1.0, linestyle="--", label=NO_DP)
    for i, kind in enumerate(KINDS):
        x = np.array(measured.config.epsilons) * 1.04 ** (i - 1)  # side by side
        found = [_interval(measured, arm_name(kind, epsilon)) for epsilon in measured.config.epsilons]
        mean = np.array([one.mean for one in found])
        margins = np.abs(np.array([[one.low, one.high] for one in found]).T - mean)
        axes.errorbar(x, mean, margins, color=PALETTE[i], marker=_MARKERS[i], markersize=5, linewidth=1.4, capsize=2, label=kind)
    axes.set_xscale("log")
    axes.set_xticks(measured.config.epsilons, [f"{epsilon:g}" for epsilon in measured.config.epsilons])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    _caption(figure, f"mean and 95 % confidence interval of {measured.config.seeds} seeds")
    return figure


def clip_over_rounds(measured: "Measured") -> Figure:
    """The bound of each clipping over rounds, on a logarithmic axis."""
    figure, axes = _panel("round", "bound on the norm of a gradient")
    for i, kind in enumerate(KINDS):
        rows = select(measured.results.metrics, "record_clip", "round", "all", [arm_name(kind, measured.shown)])
        over = rows.groupby("round")["value"].agg(["mean", "min", "max"])
        axes.fill_between(over.index, over["min"], over["max"], color=PALETTE[i], alpha=0.16, linewidth=0)
        axes.plot(over.index, over["mean"], color=PALETTE[i], linewidth=1.6, marker=_MARKERS[i], markersize=3, label=kind)
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=9)
    _caption(figure, f"ε {measured.shown:g}; mean over hospitals and a round's steps; line: mean of {measured.config.seeds} "
                     "seeds, band: least to largest")
    return figure


def _panel(x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    axes = figure.add_subplot()
    dress(axes, x, y, ticks=9)
    return figure, axes


def _caption(figure: Figure, text: str) -> None:
    figure.supxlabel(text, fontsize=7.5, color=GREY, x=0.01, ha="left")


def _interval(measured: "Measured", arm: str) -> Interval:
    return mean_interval(measured.auroc(arm), bounds=(0.0, 1.0))
