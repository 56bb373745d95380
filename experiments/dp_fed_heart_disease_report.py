"""What the study of differential privacy on Fed-Heart-Disease says: labels and what they stand for, the honest curve, claims,
figures."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.rule import Rule

from experiments.common.report import Results, bullets, say_where
from experiments.dp_fed_heart_disease_protocol import (
    AS_RUN,
    BATCH,
    EPOCHS,
    FEDERATED,
    INTERCEPTS,
    LOCAL,
    LOCAL_PAYS,
    OWN,
    PASSES_FACTOR,
    POISSON_FACTOR,
    POOLED,
    PUBLISHED,
    ROUNDS,
    UPDATES,
    WITHOUT,
    WITHOUT_DP,
    Config,
    as_many_steps,
    at_published_rate,
    chosen,
    claims,
    cost,
    costs_at,
    costs_at_label,
    gains,
    half_interval,
    labelled,
    minus_local,
    spends,
)
from experiments.flamby import opacus
from fl_jax.data import FederatedDataset
from fl_jax.privacy import Accountant, PrivacyLedger, coverage
from fl_jax.results import (
    Column,
    RunFolder,
    Table,
    claims_table,
    comparison_table,
    judge,
    number,
    per_site,
    signed,
    with_bounds,
    with_margin,
)
from fl_jax.results.figures import PALETTE
from fl_jax.statistics import Interval, mean_interval, paired_difference

if TYPE_CHECKING:
    from experiments.dp_fed_heart_disease import Chosen

METRIC = "accuracy"
BOUNDS = (0.0, 1.0)
_points, _plain = with_bounds(signed(1)), with_bounds(number(1))
_DASH = (0, (4, 2))
_GREY = "#555555"


def conclude(
    folder: RunFolder, config: Config, dataset: FederatedDataset, metrics: pd.DataFrame, choices: "Mapping[str, Chosen]",
    ledgers: Mapping[str, PrivacyLedger],
) -> None:
    """Prints tables and their reading; writes claims, summary and figures."""
    console, study = Console(), Study(config, dataset, metrics, choices, ledgers)
    verdicts = judge("dp_fed_heart_disease", claims(config), study.measured())
    folder.write_claims(verdicts)
    for table in (study.labels(), study.true_epsilons(), study.honest(), study.by_hospital()):
        console.print("", table)
    console.print("", Rule("Reading", align="left"), bullets(study.reading()))
    console.print("", Rule("What epsilon covers", align="left"), bullets(study.covered()), "", claims_table(verdicts, "Claims"))
    folder.save_figure("labels", study.figure_of_labels())
    folder.save_figure("budgets", study.figure_of_budgets())
    folder.save_figure("accuracy_per_site", per_site(metrics, METRIC, arms=study.shown_by_site(), bounds=BOUNDS, width=7.5))
    folder.write_summary(study.summary())
    say_where(console, folder, f"{config.seeds} starts")


class Study:
    """The last round's metrics, the ledgers, what the labels' noise costs, and what follows from them."""

    def __init__(
        self, config: Config, dataset: FederatedDataset, metrics: pd.DataFrame, choices: "Mapping[str, Chosen]",
        ledgers: Mapping[str, PrivacyLedger],
    ) -> None:
        self.config, self.dataset, self.choices, self.ledgers = config, dataset, choices, ledgers
        self.results = Results(metrics)
        sizes = dataset.train.sizes
        self.largest, self.smallest = int(np.argmax(sizes)), int(np.argmin(sizes))

    def mean(self, arm: str) -> npt.NDArray[np.float64]:
        """float64[S]: the mean accuracy over hospitals, by start."""
        return self.results.values(arm, "test", "mean", METRIC)

    def patients(self, arm: str) -> npt.NDArray[np.float64]:
        """float64[S]: the accuracy over all patients, by start."""
        return self.results.values(arm, "test", "all", METRIC)

    def lost(self, label: tuple[float, float], arm: str = AS_RUN) -> npt.NDArray[np.float64]:
        """float64[S]: an arm at a label minus FedAvg without differential privacy, from the same start."""
        return self.mean(f"{arm}{labelled(*label)}") - self.mean(at_published_rate(FEDERATED))

    @cached_property
    def noises(self) -> dict[tuple[float, float], list[float]]:
        """The noise, in clips, of each hospital by label."""
        sizes = [int(size) for size in self.dataset.train.sizes]
        return {label: [opacus.noise_multiplier(*label, size, BATCH, EPOCHS) for size in sizes] for label in self.config.pairs}

    @cached_property
    def spent(self) -> dict[tuple[float, float], list[opacus.Spent]]:
        """What a label's noise costs at each hospital."""
        sizes = [int(size) for size in self.dataset.train.sizes]
        steps = ROUNDS * UPDATES
        return {
            label: [opacus.spent(noise, size, BATCH, steps, label[1]) for noise, size in zip(own, sizes, strict=True)]
            for label, own in self.noises.items()}

    def worst(self, label: tuple[float, float]) -> opacus.Spent:
        """What a label's noise costs at most, each by its own worst hospital."""
        return opacus.Spent(*(max(values) for values in zip(*self.spent[label], strict=True)))

    def ledger_epsilon(self, arm: str) -> float:
        """What an arm has spent, by PLD."""
        return self.ledgers[arm].epsilon(self.config.delta, Accountant.PLD)

    def cost(self, arm: str, epsilon: float) -> npt.NDArray[np.float64]:
        """float64[S]: the accuracy over all patients of an arm with what the grid chose without differential privacy, minus that
        within a budget."""
        return self.patients(chosen(arm)) - self.patients(chosen(arm, epsilon))

    def measured(self) -> dict[str, Any]:
        """By the text of each claim what was measured."""
        config = self.config
        found: dict[str, Any] = {WITHOUT_DP: self.mean(at_published_rate(FEDERATED))}
        for epsilon in config.labels:
            found[costs_at_label(epsilon)] = np.mean([self.lost((epsilon, delta)) for delta in config.deltas], axis=0)
        found |= {costs_at(*label): self.lost(label) for label in config.pairs}
        found[POISSON_FACTOR] = [min(self.worst(label).pld / label[0] for label in config.pairs)]
        found[PASSES_FACTOR] = [min(self.worst(label).passes / label[0] for label in config.pairs)]
        for epsilon in config.epsilons:
            for arm in (chosen(FEDERATED, epsilon), as_many_steps(epsilon)):
                found[spends(arm)] = [self.ledger_epsilon(arm) / epsilon]
        for less, more in zip(config.epsilons[:-1], config.epsilons[1:], strict=True):
            found[gains(more, less)] = self.patients(chosen(FEDERATED, more)) - self.patients(chosen(FEDERATED, less))
        found[cost(config.epsilons[-1])] = self.cost(FEDERATED, config.epsilons[-1])
        if not config.quick:
            first = config.epsilons[0]
            found[LOCAL_PAYS.format(first)] = self.cost(LOCAL, first) - self.cost(FEDERATED, first)
            for arm in (FEDERATED, INTERCEPTS):
                found[minus_local(arm, first)] = self.patients(chosen(arm, first)) - self.patients(chosen(LOCAL, first))
        wanted = {claim.claim for claim in claims(config)}
        return {text: values for text, values in found.items() if text in wanted}

    def labels(self) -> Table:
        """One row a label: accuracy and what it loses, published and here."""
        margin, difference = with_margin(), _signed_margin
        rows: list[dict[str, Any]] = [{
            "label": "without DP", "published": WITHOUT[0], "here": mean_interval(self.mean(at_published_rate(FEDERATED)))}]
        for label in self.config.pairs:
            theirs = PUBLISHED[label]
            half = half_interval(theirs.deviation)
            rows.append({
                "label": f"{label[0]:g} at {label[1]:g}",
                "noise": " to ".join(f"{side(self.noises[label]):.3g}" for side in (min, max)),
                "published": theirs.accuracy, "here": mean_interval(self.mean(f"{AS_RUN}{labelled(*label)}")),
                "theirs": f"{signed()(theirs.difference)} ± {number()(half)}",
                "lost": mean_interval(self.lost(label)), "own": mean_interval(self.lost(label, OWN))})
        columns = [
            Column("label", "label", right=False), Column("noise", "noise, clips"), Column("published", "published", number()),
            Column("here", "here", margin), Column("theirs", "Δ published"), Column("lost", "Δ here", difference),
            Column("own", "Δ own", difference),
        ]
        return comparison_table(
            rows, columns,
            "FLamby's labels (epsilon at delta): test accuracy, mean over hospitals, ± half of the 95 % interval; Δ to "
            f"without DP, paired by start; {self.config.seeds} starts here, 5 there")

    def true_epsilons(self) -> Table:
        """One row a label: what its noise costs."""
        rows = []
        for label in self.config.pairs:
            own, worst = self.spent[label], self.worst(label)
            rows.append({
                "label": f"{label[0]:g} at {label[1]:g}", "large": own[self.largest].pld, "small rdp": own[self.smallest].rdp,
                "small": own[self.smallest].pld, "times": worst.pld / label[0], "passes": worst.passes,
                "more": worst.passes / label[0]})
        large, small = (self._named(index) for index in (self.largest, self.smallest))
        columns = [
            Column("label", "label", right=False), Column("large", large, _three), Column("small rdp", f"{small}, RDP", _three),
            Column("small", small, _three), Column("times", "times the label", number(1)),
            Column("passes", "batches as they are", _three), Column("more", "times the label", number(1)),
        ]
        return comparison_table(
            rows, columns,
            "Epsilon of all 1,500 updates, by PLD: had batches been Poisson samples (add or remove one patient), and of "
            "the shuffled batches that there are, at the worst hospital (replace one). With one generator at all hospitals, a "
            "server that "
            "sees their messages can take the noise away: there is then no epsilon")

    def _named(self, index: int) -> str:
        return f"{self.dataset.site_names[index]} ({self.dataset.train.sizes[index]})"

    def honest(self) -> Table:
        """One row an arm: plan, rate, ledger, accuracy, and what epsilon costs."""
        config, rows = self.config, []
        costs = {chosen(arm, e): self.cost(arm, e) for arm in self.private() for e in config.epsilons}
        slow = self.patients(at_published_rate(FEDERATED))
        costs |= {as_many_steps(e): slow - self.patients(as_many_steps(e)) for e in config.epsilons}
        for arm in self.curve():
            choice = self.choices.get(arm)
            row: dict[str, Any] = {
                "arm": arm, "mean": mean_interval(self.mean(arm)), "all": mean_interval(self.patients(arm)),
                "worst": self.results.interval(arm, "test", "worst", METRIC)}
            if choice is not None:
                row |= {"rate": choice.rate, "plan": choice.plan.name if choice.plan else None, "chosen by": choice.score}
            if arm in self.ledgers:
                row |= {"epsilon": self.ledger_epsilon(arm), "cost": _hundredfold(mean_interval(costs[arm]))}
            rows.append(row)
        margin = with_margin()
        columns = [
            Column("arm", "", right=False), Column("plan", "steps at rate"), Column("rate", "lr", "{:.2g}".format),
            Column("epsilon", "ε", number(3)), Column("chosen by", "valid.", number()),
            Column("all", "all patients", margin), Column("mean", "mean of sites", margin),
            Column("worst", "worst", margin), Column("cost", "cost", _points),
        ]
        return comparison_table(
            rows, columns,
            f"Within a budget at delta {config.delta:g}, ε by the ledger's PLD: test accuracy ± half of the 95 % interval; cost: "
            "points over all patients, against the same without DP; valid.: accuracy on validation patients, by which lr, steps "
            "and sampling rate are chosen. At .001: FLamby's learning rate, and its number of steps")

    def trained(self) -> tuple[str, ...]:
        """How hospitals train."""
        return (FEDERATED, LOCAL) if self.config.quick else (FEDERATED, INTERCEPTS, LOCAL)

    def private(self) -> tuple[str, ...]:
        """How they train within a budget."""
        return (FEDERATED,) if self.config.quick else self.trained()

    def curve(self) -> list[str]:
        """The arms of the honest part."""
        epsilons = self.config.epsilons[::-1]
        arms = [at_published_rate(FEDERATED), *(as_many_steps(e) for e in epsilons)]
        for arm in self.trained():
            arms += [chosen(arm), *(chosen(arm, e) for e in epsilons if chosen(arm, e) in self.ledgers)]
        return [*arms, at_published_rate(LOCAL), at_published_rate(POOLED), chosen(POOLED)]

    def shown_by_site(self) -> list[str]:
        """The arms of the figure of hospitals."""
        first = self.config.epsilons[0]
        arms = [name for arm in self.trained() for name in (chosen(arm), chosen(arm, first)) if name in self.choices]
        return [*arms, chosen(POOLED)]

    def by_hospital(self) -> Table:
        """One row an arm, one column a hospital."""
        names = self.dataset.site_names
        rows = [{"arm": arm, **{site: self.results.interval(arm, "test", site, METRIC) for site in names}}
                for arm in self.shown_by_site()]
        columns = [Column("arm", "", right=False), *(Column(site, self._named(k), with_margin()) for k, site in enumerate(names))]
        return comparison_table(rows, columns, "Test accuracy at each hospital (training patients)")

    def reading(self) -> list[str]:
        """Sentences that follow from the numbers, whatever these are."""
        config, sentences = self.config, []
        strictest = (config.labels[-1], config.deltas[-1])
        worst = self.worst(strictest)
        sentences.append(
            f"A label of {strictest[0]:g} at {strictest[1]:g} stands for {worst.pld:.3g} had batches been Poisson samples, "
            f"{worst.pld / strictest[0]:.1f} times as much, and for {worst.passes:.3g} with the batches that there are. Of all "
            f"labels the "
            f"least factor is {min(self.worst(label).pld / label[0] for label in config.pairs):.1f}, at the worst hospital, "
            f"{self._named(self.smallest)}.")
        shared, own = (mean_interval(self.lost(strictest, arm)) for arm in (AS_RUN, OWN))
        sentences.append(
            f"One seed for all hospitals' noise costs accuracy too: at {strictest[0]:g} and {strictest[1]:g} it is "
            f"{_signed_bounds(shared)} "
            f"against no privacy, {_signed_bounds(own)} with a generator of each hospital's own, whose noise averages out; "
            f"published "
            f"{signed()(PUBLISHED[strictest].difference)}.")
        for epsilon in config.epsilons:
            price = _hundredfold(mean_interval(self.cost(FEDERATED, epsilon)))
            slow = self.patients(as_many_steps(epsilon))
            steps = _hundredfold(paired_difference(self.patients(chosen(FEDERATED, epsilon)), slow))
            sentences.append(
                f"Epsilon {epsilon:g} at {config.delta:g} costs FedAvg {_plain(price)} points of accuracy over all patients; "
                f"with FLamby's "
                f"number of steps and learning rate under the same budget it has {_plain(steps)} fewer.")
        if not config.quick:
            first = config.epsilons[0]
            gap, kept = (_hundredfold(paired_difference(self.patients(chosen(LOCAL, e)), self.patients(chosen(FEDERATED, e))))
                         for e in (None, first))
            own = _hundredfold(paired_difference(self.patients(chosen(INTERCEPTS, first)), self.patients(chosen(LOCAL, first))))
            sentences.append(
                f"Hospitals alone have {_plain(gap)} points more than FedAvg without privacy and {_plain(kept)} at epsilon "
                f"{first:g}: their "
                f"patients are ill in very different shares ({self._shares()}), which one intercept cannot say. With an "
                f"intercept of each "
                f"hospital's own, FedAvg at epsilon {first:g} has {_plain(own)} points more than hospitals alone.")
        scores = [(f"epsilon {e:g}", self.choices[chosen(FEDERATED, e)].score) for e in config.epsilons[::-1]]
        sentences.append(
            f"These intervals are over starts; all have the same {int(self.dataset.test.sizes.sum())} test patients, on whom two "
            f"accuracies near {self.patients(chosen(FEDERATED)).mean():.2f} are a few points apart by chance. "
            f"On validation patients of {config.tuning_seeds} splits FedAvg has "
            f"{number()(self.choices[chosen(FEDERATED)].score)} without privacy, "
            + ", ".join(f"{number()(score)} at {name}" for name, score in scores) + ", each the best of its grid.")
        loud = [self.lost(label).mean() for label in config.pairs if label[0] > 1]
        if loud:
            sentences.append(
                f"At labels above 1, of noise {min(min(self.noises[p]) for p in config.pairs):.2g} clips and more, what is lost "
                f"({number()(min(loud))} to {number()(max(loud))}) hardly changes with the noise: "
                f"the clip of {opacus.CLIP:g} takes it.")
        sentences += self._of_the_smallest()
        edges = [arm for arm, choice in self.choices.items() if choice.edge]
        if edges:
            sentences.append(
                f"The chosen learning rate is on the edge of its grid for {'; '.join(edges)}: a better one may lie beyond.")
        return sentences

    def _shares(self) -> str:
        train = self.dataset.train
        shares = [float(np.mean(train.y[low:high])) for low, high in zip(train.offsets[:-1], train.offsets[1:], strict=True)]
        return f"{min(shares):.0%} to {max(shares):.0%}"

    def _of_the_smallest(self) -> list[str]:
        """What privacy does at the smallest hospital."""
        config, site = self.config, self.dataset.site_names[self.smallest]
        first = config.epsilons[0]
        own = self.results.interval
        noise = self._noise(chosen(FEDERATED, first))
        expected = self._expected(chosen(FEDERATED, first))
        sentence = (
            f"{self._named(self.smallest)}: at epsilon {first:g} a step's noise is {noise:.1f} clips on the sum of the "
            f"{expected:.1f} patients "
            f"that are expected in it, {noise / expected:.1f} clips on their mean, and as much on the sum as anywhere else.")
        if not config.quick:
            together, alone = (own(arm, "test", site, METRIC) for arm in (chosen(FEDERATED, first), chosen(LOCAL, first)))
            without = own(chosen(LOCAL), "test", site, METRIC)
            if isinstance(together, Interval) and isinstance(alone, Interval) and isinstance(without, Interval):
                sentence += (
                    f" Alone it has {_bounds(alone)} then, {_bounds(without)} without privacy, and in the federation "
                    f"{_bounds(together)}, on "
                    f"{self.dataset.test.sizes[self.smallest]} test patients.")
        return [sentence]

    def _noise(self, arm: str) -> float:
        label = self.ledgers[arm].entries[0].cost.event
        return float(label.event.noise_multiplier)  # type: ignore[attr-defined]  # so many truncated Gaussians

    def _expected(self, arm: str) -> float:
        plan = self.choices[arm].plan
        assert plan is not None
        return plan.sampling_rate * int(self.dataset.train.sizes[self.smallest])

    def covered(self) -> list[str]:
        """What epsilon is about, and what it is not."""
        ledger = self.ledgers[chosen(FEDERATED, self.config.epsilons[0])]
        return [
            *coverage(ledger),
            ("Features are standardised by means and deviations of a hospital's training patients, which are taken to be public: "
             "a patient moves them a little and with them every other's gradient, most at the smallest hospital."),
            "Learning rates and plans were chosen by these patients, and initial weights by nobody.",
        ]

    def figure_of_labels(self) -> Figure:
        """What is lost against the label and against the true epsilon at the worst hospital: published, here, and with own
        generators."""
        figure = Figure(figsize=(9.0, 4.0), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for k, delta in enumerate(self.config.deltas):
            pairs = [(epsilon, delta) for epsilon in self.config.labels]
            shift = 1.09 ** (k - (len(self.config.deltas) - 1) / 2)
            self._losses(left, pairs, [epsilon * shift for epsilon, _ in pairs], PALETTE[k], f"delta {delta:g}")
            self._losses(right, pairs, [self.worst(label).pld for label in pairs], PALETTE[k], "")
        left.plot([], [], "D", color=_GREY, markersize=4, label="published, 5 runs")
        left.plot([], [], "o", color=_GREY, markersize=4, label=f"here, {self.config.seeds} starts")
        left.plot([], [], "x", color=_GREY, markersize=4, label="own generators")
        for axes, label in ((left, "epsilon on the label"), (right, "epsilon of 1,500 Poisson steps, worst hospital (PLD)")):
            axes.set_xscale("log")
            axes.set_xlabel(label)
            axes.axhline(0, color=_GREY, linewidth=0.8, linestyle=_DASH)
            axes.grid(axis="y", color="#E3E3E3", linewidth=0.6)
            axes.set_axisbelow(True)
        left.set_ylabel("test accuracy minus that without DP,\nmean over hospitals, with its 95 % interval")
        figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
        return figure

    def _losses(self, axes: Axes, pairs: Sequence[tuple[float, float]], x: Sequence[float], color: str, label: str) -> None:
        theirs = [PUBLISHED[pair] for pair in pairs]
        half = [half_interval(one.deviation) for one in theirs]
        axes.errorbar(x, [one.difference for one in theirs], half, fmt="D", color=color, markersize=4, linewidth=0.7, alpha=0.75)
        ours = [mean_interval(self.lost(pair)) for pair in pairs]
        bars = [(one.high - one.low) / 2 for one in ours]
        beside = [1.05 * at for at in x]
        axes.errorbar(beside, [one.mean for one in ours], bars, fmt="o-", color=color, markersize=4, linewidth=1.3)
        axes.plot(beside, [self.lost(pair, OWN).mean() for pair in pairs], "x", color=color, markersize=5)
        if label:
            axes.plot([], [], color=color, linewidth=1.6, label=label)

    def figure_of_budgets(self) -> Figure:
        """Accuracy within a budget, by epsilon, and without one: of the choice, on validation patients, and on test patients."""
        figure = Figure(figsize=(9.0, 3.8), layout="constrained")
        left, axes = figure.subplots(1, 2, sharey=True)
        epsilons = self.config.epsilons
        lines = [("FedAvg at .001, 1,500 steps", [as_many_steps(e) for e in epsilons], at_published_rate(FEDERATED))]
        lines += [(arm, [chosen(arm, e) for e in epsilons], chosen(arm)) for arm in self.private()]
        places = np.arange(len(epsilons) + 1)
        for k, (label, arms, without) in enumerate(lines):
            found = [mean_interval(self.patients(arm)) for arm in (*arms, without)]
            bars = [(one.high - one.low) / 2 for one in found]
            at = places + 0.05 * (k - (len(lines) - 1) / 2)
            means = [one.mean for one in found]
            axes.errorbar(at[:-1], means[:-1], bars[:-1], fmt="o-", color=PALETTE[k], markersize=4, label=label)
            axes.errorbar(at[-1:], means[-1:], bars[-1:], fmt="s", color=PALETTE[k], markersize=4.5)
            if without in self.choices:
                scores = [self.choices[arm].score for arm in (*arms, without)]
                left.plot(at[:-1], scores[:-1], "o-", color=PALETTE[k], markersize=4)
                left.plot(at[-1:], scores[-1:], "s", color=PALETTE[k], markersize=4.5)
        pooled = self.patients(chosen(POOLED)).mean()
        axes.axhline(pooled, color=_GREY, linewidth=0.9, linestyle=_DASH, label="pooled, no DP")
        left.axhline(self.choices[chosen(POOLED)].score, color=_GREY, linewidth=0.9, linestyle=_DASH)
        left.set_ylabel("accuracy over all patients")
        left.set_title(f"validation patients, mean of {self.config.tuning_seeds} splits: the best of each grid", fontsize=9)
        axes.set_title(f"{int(self.dataset.test.sizes.sum())} test patients, with 95 % intervals over starts", fontsize=9)
        for panel in (left, axes):
            panel.set_xticks(places, [*(f"{epsilon:g}" for epsilon in epsilons), "no DP"])
            panel.set_xlabel(f"epsilon at delta {self.config.delta:g}, of the ledger")
            panel.grid(axis="y", color="#E3E3E3", linewidth=0.6)
            panel.set_axisbelow(True)
        figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize=8)
        return figure

    def summary(self) -> dict[str, Any]:
        """Intervals of every arm and place, the labels' epsilons, the choices, and the reading."""
        places = ("mean", "worst", "all", *self.dataset.site_names)
        arms = {arm: {site: self.results.interval(arm, "test", site, METRIC)._asdict() for site in places}
                for arm in self.results.last["arm"].unique()}
        labels = {f"{label[0]:g} at {label[1]:g}": {
            "noise": dict(zip(self.dataset.site_names, self.noises[label], strict=True)),
            "epsilon": {site: own._asdict() for site, own in zip(self.dataset.site_names, self.spent[label], strict=True)},
        } for label in self.config.pairs}
        chosen_ways = {
            arm: {"rate": way.rate, "plan": way.plan.name if way.plan else None, "validation": way.score, "at_edge": way.edge}
            for arm, way in self.choices.items()}
        return {"arms": arms, "labels": labels, "choices": chosen_ways, "reading": self.reading(), "covers": self.covered(),
                "ledgers": {arm: self.ledger_epsilon(arm) for arm in self.ledgers}}


def _three(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _hundredfold(value: Interval) -> Interval:
    """In points."""
    return value._replace(mean=100 * value.mean, low=100 * value.low, high=100 * value.high)


def _signed_margin(value: Interval) -> str:
    return signed()(value.mean) if np.isnan(value.low) else f"{signed()(value.mean)} ± {number()((value.high - value.low) / 2)}"


_signed_bounds = with_bounds(signed())
_bounds = with_bounds(number(2))
