"""The figures of the study of differential privacy on Fed-Heart-Disease: what labels lose, and the honest curve."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.common.figures import GREY, dress
from experiments.dp_fed_heart_disease_measured import Measured
from experiments.dp_fed_heart_disease_protocol import (
    FEDERATED,
    OWN,
    POOLED,
    PUBLISHED,
    as_many_steps,
    at_published_rate,
    chosen,
    half_interval,
    private,
)
from fl_jax.results.figures import PALETTE
from fl_jax.statistics import mean_interval

_DASH = (0, (4, 2))


def of_labels(study: Measured) -> Figure:
    """What is lost against the label and against the true epsilon at the worst hospital: published, here, and with own
    generators."""
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for k, delta in enumerate(study.config.deltas):
        pairs = [(epsilon, delta) for epsilon in study.config.labels]
        shift = 1.09 ** (k - (len(study.config.deltas) - 1) / 2)
        _losses(study, left, pairs, [epsilon * shift for epsilon, _ in pairs], PALETTE[k], f"delta {delta:g}")
        _losses(study, right, pairs, [study.worst(label).pld for label in pairs], PALETTE[k], "")
    left.plot([], [], "D", color=GREY, markersize=4, label="published, 5 runs")
    left.plot([], [], "o", color=GREY, markersize=4, label=f"here, {study.config.seeds} starts")
    left.plot([], [], "x", color=GREY, markersize=4, label="own generators")
    for axes, label in ((left, "epsilon on the label"), (right, "epsilon of 1,500 Poisson steps, worst hospital (PLD)")):
        axes.set_xscale("log")
        axes.axhline(0, color=GREY, linewidth=0.8, linestyle=_DASH)
        dress(axes, label)
        axes.set_axisbelow(True)
    left.set_ylabel("test accuracy minus that without DP,\nmean over hospitals, with its 95 % interval", fontsize=9)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return figure


def _losses(
    study: Measured, axes: Axes, pairs: Sequence[tuple[float, float]], x: Sequence[float], color: str, label: str
) -> None:
    theirs = [PUBLISHED[pair] for pair in pairs]
    half = [half_interval(one.deviation) for one in theirs]
    axes.errorbar(x, [one.difference for one in theirs], half, fmt="D", color=color, markersize=4, linewidth=0.7, alpha=0.75)
    ours = [mean_interval(study.lost(pair)) for pair in pairs]
    bars = [(one.high - one.low) / 2 for one in ours]
    beside = [1.05 * at for at in x]
    axes.errorbar(beside, [one.mean for one in ours], bars, fmt="o-", color=color, markersize=4, linewidth=1.3)
    axes.plot(beside, [study.lost(pair, OWN).mean() for pair in pairs], "x", color=color, markersize=5)
    if label:
        axes.plot([], [], color=color, linewidth=1.6, label=label)


def of_budgets(study: Measured) -> Figure:
    """Accuracy within a budget, by epsilon, and without one: of the choice, on validation patients, and on test patients."""
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    left, axes = figure.subplots(1, 2, sharey=True)
    epsilons = study.config.epsilons
    lines = [("FedAvg at .001, 1,500 steps", [as_many_steps(e) for e in epsilons], at_published_rate(FEDERATED))]
    lines += [(arm, [chosen(arm, e) for e in epsilons], chosen(arm)) for arm in private(study.config)]
    places = np.arange(len(epsilons) + 1)
    for k, (label, arms, without) in enumerate(lines):
        found = [mean_interval(study.patients(arm)) for arm in (*arms, without)]
        bars = [(one.high - one.low) / 2 for one in found]
        at = places + 0.05 * (k - (len(lines) - 1) / 2)
        means = [one.mean for one in found]
        axes.errorbar(at[:-1], means[:-1], bars[:-1], fmt="o-", color=PALETTE[k], markersize=4, label=label)
        axes.errorbar(at[-1:], means[-1:], bars[-1:], fmt="s", color=PALETTE[k], markersize=4.5)
        if without in study.choices:
            scores = [study.choices[arm].score for arm in (*arms, without)]
            left.plot(at[:-1], scores[:-1], "o-", color=PALETTE[k], markersize=4)
            left.plot(at[-1:], scores[-1:], "s", color=PALETTE[k], markersize=4.5)
    pooled = study.patients(chosen(POOLED)).mean()
    axes.axhline(pooled, color=GREY, linewidth=0.9, linestyle=_DASH, label="pooled, no DP")
    left.axhline(study.choices[chosen(POOLED)].score, color=GREY, linewidth=0.9, linestyle=_DASH)
    by_validation = f"validation patients, mean of {study.config.tuning_seeds} splits: the best of each grid"
    by_test = f"{int(study.dataset.test.sizes.sum())} test patients, with 95 % intervals over starts"
    for panel, title in ((left, by_validation), (axes, by_test)):
        panel.set_xticks(places, [*(f"{epsilon:g}" for epsilon in epsilons), "no DP"])
        dress(panel, f"epsilon at delta {study.config.delta:g}, of the ledger", title=title)
        panel.set_axisbelow(True)
    left.set_ylabel("accuracy over all patients", fontsize=9)
    figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    return figure
