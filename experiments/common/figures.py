"""What the panels of all studies' figures look like."""

from matplotlib.axes import Axes

GREY, FAINT = "#555555", "#DDDDDD"


def dress(axes: Axes, x: str = "", y: str = "", title: str = "", *, ticks: float = 8) -> None:
    """Small labels, no box, and faint lines across. ticks: the size of their labels, in points."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.tick_params(labelsize=ticks)
