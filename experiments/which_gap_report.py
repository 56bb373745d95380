"""What the study of the federation gap says: cells, gaps, the share of each switch, claims, tables, a figure."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from experiments.common import rate_grid
from experiments.common.chest_xrays import SITES
from experiments.common.figures import GREY, dress
from experiments.common.report import Results, bullets, say_where
from experiments.which_gap_protocol import (
    CENTRALIZED,
    FEDERATED,
    HELD_OUT,
    IMAGES,
    LOCAL,
    LONG,
    MENDED,
    METRIC,
    METRICS,
    OFFICIAL,
    RATE,
    SHORT,
    Cell,
    Config,
    kind,
)
from fl_jax.data import FederatedDataset, describe
from fl_jax.results import (
    Claim,
    Column,
    Direction,
    RunFolder,
    Table,
    Verdict,
    claims_table,
    comparison_table,
    signed,
    with_bounds,
    with_margin,
)
from fl_jax.results.figures import PALETTE
from fl_jax.statistics import Interval, mean_interval

SWITCHES = ("BatchNorm policy", "budget", "heterogeneity")
ALL_OFF, ALL_ON = (False, False, False), (True, True, True)
Values = npt.NDArray[np.float64]
"""One a seed."""


class Tried(NamedTuple):
    """A grid of rates in a cell. scores: validation AUROC float64[G, S]. choice: the best point."""

    scores: Values
    choice: rate_grid.Choice


Grids = Mapping[str, Mapping[Cell, Tried]]


class Gaps:
    """The gaps of a study, on some images. mended: the policy that counts as mended."""

    def __init__(self, metrics: pd.DataFrame, config: Config, split: str = HELD_OUT, mended: str = "") -> None:
        self.metrics, self.config, self.split, self.mended = metrics, config, split, mended or config.mended
        self.results = {SHORT: Results(metrics[metrics["round"] <= config.short]), LONG: Results(metrics)}

    def on(self, split: str) -> "Gaps":
        """The same runs on other images."""
        return Gaps(self.metrics, self.config, split, self.mended)

    def with_policy(self, mended: str) -> "Gaps":
        """The same runs with another policy that counts as mended."""
        return Gaps(self.metrics, self.config, self.split, mended)

    def values(self, arm: str, cell: Cell, metric: str = METRIC, site: str = "mean") -> Values:
        """A metric of the images at a site, one value a seed."""
        return self.results[cell.budget].values(f"{arm}, {kind(cell.alike)}", self.split, site, metric)

    def gain(self, arm: str, other: str, cell: Cell) -> Values:
        """What an arm has more than another one, in the same seed."""
        return self.values(arm, cell) - self.values(other, cell)

    def gap(self, arm: str, cell: Cell, metric: str = METRIC) -> Values:
        """What an arm lacks against centralized training of the long run, on the same images."""
        return self.values(CENTRALIZED, Cell(LONG, cell.alike), metric) - self.values(arm, cell, metric)

    def of_switches(self, on: tuple[bool, ...], metric: str = METRIC) -> Values:
        """The gap with each of SWITCHES as it commonly is (False) or mended (True)."""
        mended, long, alike = on
        return self.gap(self.mended if mended else FEDERATED, Cell(LONG if long else SHORT, alike), metric)

    def shares(self, metric: str = METRIC) -> dict[str, Values]:
        """What each switch takes off the gap, by its name."""
        return dict(zip(SWITCHES, shapley(lambda on: self.of_switches(on, metric), len(SWITCHES)), strict=True))


def shapley(value: Callable[[tuple[bool, ...]], Values], count: int) -> list[Values]:
    """By how much each of `count` switches lowers a value, the mean over the orders in which they can be turned on (Shapley 1953). They add up to
    value(all off) - value(all on)."""
    shares = [np.zeros_like(value((False,) * count)) for _ in range(count)]
    for order in itertools.permutations(range(count)):
        on = [False] * count
        for switch in order:
            before = value(tuple(on))
            on[switch] = True
            shares[switch] = shares[switch] + (before - value(tuple(on))) / math.factorial(count)
    return shares


def claims(config: Config) -> list[Claim]:
    """What the configuration is to show."""
    return [claim for claim, _ in stated(config)]


def stated(config: Config) -> Iterator[tuple[Claim, Callable[[Gaps], Values]]]:
    """The claims, each with the function that measures it on the held-out images, one value a seed."""
    differ, alike = Cell(LONG, False), Cell(LONG, True)
    yield Claim(
        "gap of FedAvg as it is commonly run: all of BatchNorm averaged, few rounds, hospitals that differ", "own bar", 0.01,
        Direction.AT_LEAST, 0.0, "a gap of less than a point of AUROC is not worth dividing", quick=config.quick,
    ), lambda gaps: gaps.of_switches(ALL_OFF)
    yield Claim(
        "share of the BatchNorm policy in it", "arXiv 2102.07623 (FedBN), section 5", 0.0, Direction.AT_LEAST, 0.0,
        "the paper has local layers ahead of averaged ones wherever features differ", quick=config.quick,
    ), lambda gaps: gaps.shares()["BatchNorm policy"]
    if config.quick:
        return
    yield Claim(
        "the same share, on the official test images", "arXiv 2102.07623 (FedBN), section 5", 0.0, Direction.AT_LEAST, 0.0,
        "the paper has local layers ahead of averaged ones wherever features differ",
    ), lambda gaps: gaps.on(OFFICIAL).shares()["BatchNorm policy"]
    if MENDED[0] in config.arms:
        yield Claim(
            "what local statistics alone gain where hospitals differ: the silent error of exchanging trained parameters only",
            "arXiv 2008.07424 (SiloBN), section 4", 0.0, Direction.AT_LEAST, 0.0,
            "the paper has them ahead of averaged ones at centres that differ",
        ), lambda gaps: gaps.gain(MENDED[0], FEDERATED, differ)
    yield Claim(
        "the policy where hospitals are alike: mended minus averaged", "arXiv 2102.07623 (FedBN), section 5", 0.0, Direction.WITHIN, 0.01,
        "statistics are then those of one population",
    ), lambda gaps: gaps.gain(gaps.mended, FEDERATED, alike)
    yield Claim(
        "what remains with everything mended", "arXiv 1602.05629 (FedAvg), section 3", 0.0, Direction.WITHIN, 0.01,
        "one epoch a round at clients that are alike comes close to pooled training there",
    ), lambda gaps: gaps.of_switches(ALL_ON)


def conclude(
    folder: RunFolder, example: FederatedDataset, gaps: Gaps, tried: Grids, chosen: Mapping[str, Mapping[bool, float]],
    verdicts: Sequence[Verdict],
) -> None:
    """Prints the tables and their reading; writes summary and figure."""
    console, config, sentences = Console(), gaps.config, reading(gaps, tried)
    console.print(Rule("Which gap?", align="left"))
    console.print(Text("\n" + describe(example) + "\n"), soft_wrap=True)
    for split in IMAGES:
        for metric in METRICS:
            console.print(cells(gaps.on(split), metric), "")
    for split in IMAGES:
        console.print(divided(gaps.on(split)), "")
    console.print(claims_table(verdicts, "Claims"), "")
    console.print(f"After {config.short} rounds (short) and {config.long} (long) of one epoch at each hospital, mean over hospitals; mean over "
                  f"{config.seeds} seeds ± half of the 95 % interval, or with it (Student t, paired by seed).\n", style="dim", highlight=False)
    console.print(Rule("Reading", align="left"))
    console.print(bullets(sentences))
    folder.save_figure("shares", shares_figure(gaps))
    folder.write_summary({
        "mended": gaps.mended, "chosen": {arm: {kind(alike): rate for alike, rate in of.items()} for arm, of in chosen.items()},
        "shares": {IMAGES[split]: {policy: {metric: {
            switch: mean_interval(values)._asdict() for switch, values in gaps.on(split).with_policy(policy).shares(metric).items()}
            for metric in METRICS} for policy in config.mendable} for split in IMAGES},
        "reading": sentences})
    say_where(console, folder)


def cells(gaps: Gaps, metric: str) -> Table:
    """One row an arm; columns for budget and kind of hospitals."""
    every = [Cell(budget, alike) for alike in (False, True) for budget in (SHORT, LONG)]
    rows: list[dict[str, Any]] = []
    for arm in gaps.config.arms:
        row: dict[str, Any] = {"arm": arm}
        for cell in every:
            if arm != CENTRALIZED or cell.budget == LONG:
                row[f"{cell}"] = mean_interval(gaps.values(arm, cell, metric))
        row["worst"] = mean_interval(gaps.values(arm, Cell(LONG, False), metric, "worst"))
        rows.append(row)
    columns = [Column("arm", "", right=False), *(Column(f"{cell}", f"{kind(cell.alike)}, {cell.budget}", with_margin()) for cell in every),
               Column("worst", "worst, differ, long", with_margin())]
    return comparison_table(rows, columns, f"{METRICS[metric]} on {IMAGES[gaps.split]}")


def divided(gaps: Gaps) -> Table:
    """One row a policy that could count as mended, and a metric: the gap, the shares, what remains."""
    rows: list[dict[str, Any]] = []
    for metric, name in METRICS.items():
        for policy in gaps.config.mendable:
            own = gaps.with_policy(policy)
            row: dict[str, Any] = {"mended": policy, "metric": name}
            row["gap"] = mean_interval(100 * own.of_switches(ALL_OFF, metric))
            row |= {switch: mean_interval(100 * values) for switch, values in own.shares(metric).items()}
            row["rest"] = mean_interval(100 * own.of_switches(ALL_ON, metric))
            rows.append(row)
    shown = with_bounds(signed(1))
    columns = [Column("metric", "", right=False), Column("mended", "mended policy", right=False), Column("gap", "gap", shown),
               *(Column(switch, switch, shown) for switch in SWITCHES), Column("rest", "remains", shown)]
    return comparison_table(rows, columns, f"The gap in points, and the share of each switch, on {IMAGES[gaps.split]}")


def reading(gaps: Gaps, tried: Grids) -> list[str]:
    """Sentences that follow from the numbers, whatever these are."""
    shown, config, sentences = with_bounds(signed(1)), gaps.config, []
    for split, name in IMAGES.items():
        own = gaps.on(split)
        gap, rest = (mean_interval(100 * own.of_switches(on)) for on in (ALL_OFF, ALL_ON))
        shares = {switch: mean_interval(100 * values) for switch, values in own.shares().items()}
        ordered = sorted(shares.items(), key=lambda item: -item[1].mean)
        clear = [switch for switch, share in ordered if share.low > 0]
        sentences.append(
            f"On {name}, of a gap of {shown(gap)} points of AUROC, {'; '.join(f'{switch} {shown(share)}' for switch, share in ordered)}; "
            f"{shown(rest)} remain with hospitals that are alike, {config.long} rounds and {gaps.mended}. Clear of 0: "
            f"{', '.join(clear) if clear else 'none of the three'}.")
        gains = {policy: mean_interval(100 * own.gain(policy, FEDERATED, Cell(LONG, False))) for policy in config.mendable}
        sentences.append(f"On {name}, hospitals that differ, {config.long} rounds, against all of BatchNorm averaged: "
                         f"{'; '.join(f'{policy} {shown(gain)}' for policy, gain in gains.items())} points.")
        if LOCAL in config.arms:
            gains = {arm: mean_interval(100 * own.gain(arm, LOCAL, Cell(LONG, False))) for arm in (FEDERATED, *config.mendable)}
            sentences.append(f"On {name}, against each hospital's own model, same steps: "
                             f"{'; '.join(f'{arm} {shown(gain)}' for arm, gain in gains.items())} points.")
    if tried:
        edges = [f"{arm} ({kind(alike)})" for arm in tried for alike in (False, True) if tried[arm][Cell(LONG, alike)].choice.edges]
        sentences.append(f"Rates on the edge of the grid: {', '.join(edges)}." if edges else "No chosen rate lies on the edge of the grid.")
        lost = []
        for alike in (False, True):
            short, long = (tried[FEDERATED][Cell(budget, alike)] for budget in (SHORT, LONG))
            place = rate_grid.points({RATE: config.rates}).index(long.choice.point)
            lost.append(f"{100 * (short.choice.score - short.scores[place].mean()):.1f} where {kind(alike)}")
        sentences.append(f"A rate of its own for the short budget would have been worth, in points on validation images: {', '.join(lost)}.")
    sentences.append("The hospitals are simulated from one hospital's children; shares are of this task, network and ways to differ.")
    return sentences


def shares_figure(gaps: Gaps) -> Figure:
    """The share of each switch, with its interval, for each policy that could count as mended, on either kind of images; and the AUROC at each
    hospital."""
    figure = Figure(figsize=(12.6, 3.9), layout="constrained")
    *panels, right = figure.subplots(1, 3, width_ratios=(1.2, 1.2, 1))
    names = ("gap", *SWITCHES, "remains")
    for axes, split in zip(panels, IMAGES, strict=True):
        for i, policy in enumerate(gaps.config.mendable):
            own = gaps.on(split).with_policy(policy)
            found = [own.of_switches(ALL_OFF), *own.shares().values(), own.of_switches(ALL_ON)]
            _bars(axes, i, [mean_interval(100 * values) for values in found], policy)
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
        dress(axes, y="points of AUROC", title=f"the gap to centralized training, {IMAGES[split]}")
    limits = np.array([axes.get_ylim() for axes in panels])
    for axes in panels:
        axes.set_ylim(limits[:, 0].min(), limits[:, 1].max())
    shown = [arm for arm in (CENTRALIZED, FEDERATED, gaps.mended, LOCAL) if arm in gaps.config.arms]
    for i, arm in enumerate(shown):
        _bars(right, i, [mean_interval(100 * gaps.values(arm, Cell(LONG, False), site=site)) for site in SITES], arm, color=i + 3)
    right.set_xticks(range(len(SITES)), [site.replace(" ", "\n") for site in SITES])
    dress(right, y="AUROC, %", title=f"long budget, hospitals that differ, {IMAGES[gaps.split]}")
    for axes, title in ((panels[0], "mended policy"), (right, None)):
        axes.legend(title=title, frameon=False, fontsize=8, title_fontsize=8)
    return figure


def _bars(axes: Any, place: int, found: list[Interval], label: str, color: int | None = None) -> None:
    """Points with intervals, a little beside those of other places."""
    x = np.arange(len(found)) + 0.14 * (place - 1)
    mean = np.array([one.mean for one in found])
    margins = np.abs(np.array([[one.low, one.high] for one in found]).T - mean)
    shade = PALETTE[(place if color is None else color) % len(PALETTE)]
    axes.errorbar(x, mean, margins, fmt="o", color=shade, markersize=5, linewidth=1.3, capsize=2, label=label)
