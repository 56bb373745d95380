"""Epsilon over rounds as bars of text and as a figure."""

from collections.abc import Sequence
from pathlib import Path

_EIGHTHS = " ▏▎▍▌▋▊▉"


def points(rounds: int, count: int) -> list[int]:
    """At most `count` numbers of rounds, evenly from the first of them to the last."""
    return sorted({max(1, round(rounds * k / count)) for k in range(1, count + 1)})


def bars(rounds: Sequence[int], epsilons: Sequence[float], width: int = 50) -> str:
    """One line for each number of rounds with a bar as long as its epsilon."""
    most = max(epsilons)
    digits = max(len(f"{count:,}") for count in rounds)
    lines = []
    for count, value in zip(rounds, epsilons, strict=True):
        eighths = round(8 * width * value / most) if most > 0 else 0
        lines.append(f"{count:>{digits},} {'█' * (eighths // 8)}{_EIGHTHS[eighths % 8].strip()} {value:.4g}")
    return "\n".join(lines)


def save_figure(path: Path, rounds: Sequence[int], epsilons: Sequence[float], title: str) -> None:
    """Writes epsilon over rounds as a PNG. Raises OSError."""
    from matplotlib.figure import Figure  # half a second, for those who want one

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(rounds, epsilons)
    axes.set(xlabel="rounds", ylabel="epsilon", title=title, ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=200, format="png")
