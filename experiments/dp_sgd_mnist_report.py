"""What dp_sgd_mnist says: accuracy and epsilon published and here, a reading, what epsilon does not cover, and the figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from rich.console import Console
from rich.rule import Rule

from experiments.common.figures import GREY, dress
from experiments.common.report import bullets, say_where
from experiments.dp_sgd_mnist_protocol import EARLY, Config, Outcome, old_conversion, renyi, short
from fl_jax.privacy import CONVERSION, Accountant, coverage
from fl_jax.results import (
    Column,
    Missing,
    RunFolder,
    Table,
    Verdict,
    claims_table,
    comparison_table,
    number,
    over_seeds,
    select,
    with_bounds,
)
from fl_jax.results.figures import PALETTE
from fl_jax.statistics import Interval, mean_interval

ACCURACY = (0.0, 1.0)
COLLAPSED = 0.5
"""Half of the images: a run that ends below it has lost what it had learnt."""
_PLAIN, _UNPUBLISHED = "the plain gradient, neither clipped nor noised", "nothing is published of this setting"
_percent = with_bounds(number(2))
Outcomes = Mapping[str, Outcome]


def conclude(folder: RunFolder, config: Config, outcomes: Outcomes, verdicts: Sequence[Verdict]) -> None:
    """Prints tables and their reading; writes summary and figures."""
    console = Console()
    private = [outcome for outcome in outcomes.values() if outcome.ledgers]
    sentences = reading(config, outcomes)
    console.print("", accuracy_table(config, outcomes), "")
    if private:
        console.print(epsilon_table(config, private), "")
    console.print(Rule("Reading", align="left"), bullets(sentences), "")
    if private:
        console.print(Rule("What epsilon is about", align="left"), bullets(coverage(private[0].ledgers[0])), "")
        folder.save_figure("accuracy_over_epsilon", figure_of_epsilon(config, private))
    console.print(claims_table(verdicts, "Claims"))
    folder.save_figure("accuracy_over_epochs", figure_of_epochs(config, outcomes))
    problems = {field: summary(config, outcome) for field, outcome in outcomes.items()}
    folder.write_summary({"problems": problems, "reading": sentences})
    say_where(console, folder)


def accuracy_table(config: Config, outcomes: Outcomes) -> Table:
    """One row a setting: test accuracy published and here, by seed, and which share of the images' gradients was clipped."""
    rows: list[dict[str, Any]] = []
    for outcome in outcomes.values():
        setting, values, published = outcome.setting, outcome.accuracy(), outcome.problem.known(config).accuracy
        row: dict[str, Any] = {
            "setting": outcome.name, "rate": setting.rate, "steps": _same(outcome.steps()), "here": _in_percent(values),
            "seeds": ", ".join(f"{100 * value:.2f}" for value in values)}
        if setting.noise is None:
            row |= {"clip": Missing(_PLAIN), "share": Missing(_PLAIN)}
        else:
            row |= {"clip": setting.clip, "share": 100 * clipped(outcome).mean()}
        row["published"] = Missing(_UNPUBLISHED) if published is None else 100 * published
        rows.append(row)
    columns = [
        Column("setting", "", right=False), Column("rate", "rate", short), Column("clip", "clip", short),
        Column("steps", "steps", "{:,}".format), Column("published", "published", number(1)), Column("here", "here", _percent),
        Column("seeds", "by seed"), Column("share", "% clipped", number(0)),
    ]
    return comparison_table(
        rows, columns, "Accuracy on the test images after the last step, %, mean [95 % interval] over seeds; % clipped: of the "
        "images' gradients in all steps")


def epsilon_table(config: Config, private: Sequence[Outcome]) -> Table:
    """One row a private setting: epsilon published, by both conversions of RDP, and by PLD."""
    rows: list[dict[str, Any]] = []
    for outcome in private:
        published = outcome.problem.known(config).old
        rows.append({
            "setting": outcome.name, "noise": outcome.setting.noise, "steps": _same(outcome.steps()),
            "published": Missing(_UNPUBLISHED) if published is None else published,
            "old": outcome.old(config).max(), "today": outcome.spent(config).max(),
            "pld": outcome.spent(config, Accountant.PLD).max()})
    columns = [
        Column("setting", "", right=False), Column("noise", "noise / clip", short),
        Column("steps", "steps", "{:,}".format), Column("published", "published", number(2)),
        Column("old", "old conversion", number(4)),
        Column("today", "today's, of the ledger", number(4)), Column("pld", "PLD, of the ledger", number(4)),
    ]
    return comparison_table(
        rows, columns, f"Epsilon of an image at delta {config.delta:g}, one image added or removed, the same for every seed")


def reading(config: Config, outcomes: Outcomes) -> list[str]:
    """Sentences that follow from the numbers, whatever these are."""
    sentences = []
    for outcome in outcomes.values():
        if outcome.ledgers:
            old, today, pld = (float(value.max()) for value in (
                outcome.old(config), outcome.spent(config), outcome.spent(config, Accountant.PLD)))
            sentences.append(
                f"{outcome.name}: epsilon {old:.3f} by the old conversion is {today:.3f} by today's, "
                f"{100 * (1 - today / old):.0f} % less, and {pld:.3f} by privacy loss distributions: the same steps, noise and "
                "samples.")
    without = outcomes.get("plain")
    if without is not None:
        best = without.accuracy().mean()
        costs = [f"{100 * (best - outcome.accuracy().mean()):.1f} points at epsilon {outcome.spent(config).max():.2f}"
                 for outcome in outcomes.values() if outcome.ledgers]
        if costs:
            sentences.append(f"Against training without privacy, at its own learning rate, privacy costs {', '.join(costs)}.")
    pair = [outcomes[field] for field in ("strict", "strict_plain") if field in outcomes]
    if len(pair) == 2:
        sentences.append(_without_clip(*pair))
    if any(outcome.ledgers for outcome in outcomes.values()):
        sentences += [
            ("Samples are drawn by Poisson, as the accounting has it; the reference's are shuffled batches of a fixed size, which "
             "it accounts for as if they were Poisson samples."),
            (f"Today's: {CONVERSION[Accountant.RDP]}. Old: divergence + log(1 / delta) / (order - 1), the least over the same "
             "orders."),
            ("Initial weights are not published: here of variance 1 / inputs; the reference's script leaves them to Keras "
             "(Glorot uniform).")]
    return sentences


def _without_clip(private: Outcome, plain: Outcome) -> str:
    values = plain.accuracy()
    lost = int((values < COLLAPSED).sum())
    same = f"The strict setting's learning rate, {short(plain.setting.rate)}, without noise and clip: "
    if lost:
        return same + (f"{lost} of {len(values)} runs end below {100 * COLLAPSED:.0f} %, and "
                       f"{int((private.accuracy() < COLLAPSED).sum())} of {private.setting.seeds} with them. Which of the two keeps the "
                       "others up was not tried.")
    more = 100 * (values.mean() - private.accuracy().mean())
    return same + f"{100 * values.mean():.2f} %, {more:.2f} points more than with them."


def clipped(outcome: Outcome) -> npt.NDArray[np.float64]:
    """float64[S]: the share of the images' gradients that did not fit the clip, over all rounds, which have as many steps."""
    rows = select(outcome.rows, "records_clipped", "round", "all", [outcome.name])
    return rows.groupby("seed")["value"].mean().to_numpy(np.float64)


def summary(config: Config, outcome: Outcome) -> dict[str, Any]:
    """A setting's numbers for summary.json."""
    setting, known = outcome.setting, outcome.problem.known(config)
    found: dict[str, Any] = {
        "name": outcome.name, "noise": setting.noise, "learning_rate": setting.rate,
        "clip": None if setting.noise is None else setting.clip,
        "steps": outcome.steps().tolist(), "accuracy": outcome.accuracy().tolist(),
        "published_accuracy": known.accuracy}
    if outcome.ledgers:
        found |= {
            "share_clipped": clipped(outcome).tolist(), "epsilon_old_conversion": outcome.old(config).tolist(),
            "epsilon_rdp": outcome.spent(config).tolist(), "epsilon_pld": outcome.spent(config, Accountant.PLD).tolist(),
            "published_epsilon": known.old, "delta": config.delta}
    return found


def figure_of_epochs(config: Config, outcomes: Outcomes) -> Figure:
    """A panel a setting: each seed's test accuracy over epochs, the mean with its band, and what is published."""
    shown = [outcome for field, outcome in outcomes.items() if field != "strict_plain" or "strict" not in outcomes]
    figure = Figure(figsize=(1.2 + 2.6 * len(shown), 3.1), layout="constrained")
    panels, of_one_run = figure.subplots(1, len(shown), squeeze=False)[0], False
    for axes, outcome in zip(panels, shown, strict=True):
        low = _draw_over_epochs(axes, outcome, PALETTE[0] if outcome.ledgers else GREY)
        if outcome.problem.field == "strict" and "strict_plain" in outcomes:
            _draw_over_epochs(axes, outcomes["strict_plain"], GREY)
        known = outcome.problem.known(config)
        if known.accuracy is not None and not known.early:
            axes.axhline(known.accuracy, color=PALETTE[1], linewidth=1.2, linestyle=(0, (5, 1.5)))
        if outcome.problem.field == "default":
            early = {epoch: of.accuracy for epoch, of in EARLY.items()
                     if epoch <= outcome.setting.epochs and (of.accuracy or 0) > low}
            of_one_run = bool(early)
            axes.plot([*early], [*early.values()], "D", color=PALETTE[1], markersize=4.5)
        _dress(axes, "epochs", title=outcome.name)
        axes.set_ylim(low, 1.0)
        axes.set_xlim(0, 1.03 * outcome.setting.epochs)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    panels[0].set_ylabel("test accuracy", fontsize=9)
    panels[0].plot([], [], color=PALETTE[0], linewidth=1.5, label="mean of seeds, 95 % interval of three or more")
    if any(not outcome.ledgers for outcome in outcomes.values()):
        panels[0].plot([], [], color=GREY, linewidth=1.5, label="neither clipped nor noised")
    panels[0].plot([], [], color=PALETTE[1], linewidth=1.2, linestyle=(0, (5, 1.5)), label="published, after the last step")
    if of_one_run:
        panels[0].plot([], [], "D", color=PALETTE[1], markersize=4.5, label="published, of one run")
    figure.legend(loc="outside upper center", ncols=4 if len(shown) > 2 else len(shown), frameon=False, fontsize=8)
    return figure


def _draw_over_epochs(axes: Axes, outcome: Outcome, color: str) -> float:
    """Draws a setting's curves; returns where an axis for their last third begins."""
    rows = select(outcome.rows, "accuracy", "test", "all", [outcome.name])
    rows = rows.assign(epochs=rows["round"] * outcome.setting.steps_per_round * outcome.rate).sort_values("epochs")
    for _, one in rows.groupby("seed"):
        axes.plot(one["epochs"], one["value"], color=color, alpha=0.45, linewidth=0.6)
    at, mean, low, high = _band(outcome)
    if outcome.setting.seeds > 2:  # the interval of two is as wide as the panel
        axes.fill_between(at, low, high, color=color, alpha=0.18, linewidth=0)
    axes.plot(at, mean, color=color, linewidth=1.5, marker="o" if len(at) < 4 else None, markersize=3)
    return _lowest(float(mean[2 * len(mean) // 3:].min()))


def _lowest(accuracy: float) -> float:
    """Where an axis of accuracies begins so that this one stands well above it."""
    return max(0.0, 1 - 2.5 * max(1 - accuracy, 0.01))


def _band(outcome: Outcome) -> tuple[npt.NDArray[np.float64], ...]:
    """Epochs, and the mean accuracy over seeds with its interval, each float64[T]."""
    rows = select(outcome.rows, "accuracy", "test", "all", [outcome.name]).sort_values("round")
    found = over_seeds(rows, ["round"], bounds=ACCURACY)
    mean, low, high = np.array([interval[:3] for interval in found["interval"]]).T
    return found["round"].to_numpy(np.float64) * outcome.setting.steps_per_round * outcome.rate, mean, low, high


def figure_of_epsilon(config: Config, private: Sequence[Outcome]) -> Figure:
    """Test accuracy against what it costs: along training by today's conversion, and at its end by all three accounts."""
    figure = Figure(figsize=(6.6, 3.7), layout="constrained")
    axes = figure.add_subplot()
    lowest, ends = 1.0, [1.0]
    for outcome, color in zip(private, PALETTE, strict=False):
        noise = outcome.setting.noise
        assert noise is not None
        epochs, mean, _, _ = _band(outcome)
        orders, divergences = renyi(noise, outcome.rate, 1)
        steps = np.rint(epochs / outcome.rate)
        spent = select(outcome.rows, "epsilon_record_rdp", "round", "worst", [outcome.name])
        today = spent.groupby("round")["value"].first()[np.rint(steps / outcome.setting.steps_per_round).astype(int)].to_numpy()
        old = [old_conversion(orders, count * divergences, config.delta) for count in steps]
        pld = outcome.spent(config, Accountant.PLD).max()
        axes.plot(today, mean, color=color, linewidth=1.6, label=outcome.name)
        axes.plot(old, mean, color=color, linewidth=0.9, linestyle=(0, (4, 2)))
        axes.plot([pld, old[-1]], [mean[-1]] * 2, color=color, linewidth=0.6)
        axes.plot(pld, mean[-1], "^", color=color, markersize=5)
        axes.plot(today[-1], mean[-1], "o", color=color, markersize=5)
        axes.plot(old[-1], mean[-1], "s", color=color, markersize=5, markerfacecolor="white")
        known = outcome.problem.known(config)
        if known.old is not None and known.accuracy is not None:
            axes.plot(known.old, known.accuracy, "D", color="black", markersize=8, markerfacecolor="none")
            ends.append(known.old)
        lowest = min(lowest, float(mean[-1]))
        ends += [pld, old[-1], today[0]]
    axes.set_xscale("log")
    axes.set_xticks([tick for tick in (0.25, 0.5, 1, 2, 3, 5, 7, 10) if 0.6 * min(ends) <= tick <= 1.4 * max(ends)])
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(_lowest(lowest), 1.0)
    styles: list[tuple[dict[str, Any], str]] = [
        ({"color": GREY, "linewidth": 1.6}, "line and dot: RDP, today's conversion"),
        ({"color": GREY, "linewidth": 0.9, "linestyle": (0, (4, 2))}, "dashes and square: RDP, old conversion"),
        ({"color": GREY, "linestyle": "", "marker": "^", "markersize": 5}, "triangle: PLD"),
        ({"color": "black", "linestyle": "", "marker": "D", "markersize": 7, "markerfacecolor": "none"},
         "published, old conversion"),
    ]
    for style, label in styles:
        axes.plot([], [], label=label, **style)
    _dress(axes, f"epsilon of an image at delta {config.delta:g}", "test accuracy, mean of seeds")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure


def _dress(axes: Axes, x: str, y: str = "", title: str = "") -> None:
    dress(axes, x, y, title)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _in_percent(values: npt.NDArray[np.float64]) -> Interval:
    return mean_interval(100 * values, bounds=(0.0, 100.0))


def _same(steps: npt.NDArray[np.int64]) -> int:
    """The number of steps, which all runs of a setting have."""
    (count,) = {*steps.tolist()}
    return int(count)
