"""What the study of differential privacy on Fed-Heart-Disease says: labels and what they stand for, the honest curve, claims,
figures."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.rule import Rule

from experiments import dp_fed_heart_disease_figures as figures
from experiments.common.report import bullets, say_where
from experiments.dp_fed_heart_disease_measured import Measured
from experiments.dp_fed_heart_disease_protocol import (
    AS_RUN,
    FEDERATED,
    INTERCEPTS,
    LOCAL,
    METRIC,
    OWN,
    POOLED,
    PUBLISHED,
    WITHOUT,
    Config,
    as_many_steps,
    at_published_rate,
    chosen,
    claims,
    half_interval,
    labelled,
    private,
    trained,
)
from experiments.flamby import opacus
from fl_jax.data import FederatedDataset
from fl_jax.privacy import PrivacyLedger, coverage
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
from fl_jax.statistics import Interval, mean_interval, paired_difference

if TYPE_CHECKING:
    from experiments.dp_fed_heart_disease import Chosen

BOUNDS = (0.0, 1.0)
_points, _plain = with_bounds(signed(1)), with_bounds(number(1))


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
    folder.save_figure("labels", figures.of_labels(study))
    folder.save_figure("budgets", figures.of_budgets(study))
    folder.save_figure("accuracy_per_site", per_site(metrics, METRIC, arms=study.shown_by_site(), bounds=BOUNDS, width=7.5))
    folder.write_summary(study.summary())
    say_where(console, folder, f"{config.seeds} starts")


class Study(Measured):
    """What is measured, as tables and sentences."""

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
            "Epsilon of all 1,500 updates, by PLD: had batches been Poisson samples (add or remove one patient), and of the "
            "shuffled batches that there are, at the worst hospital (replace one). With one generator at all hospitals, a "
            "server that sees their messages can take the noise away: there is then no epsilon")

    def _named(self, index: int) -> str:
        return f"{self.dataset.site_names[index]} ({self.dataset.train.sizes[index]})"

    def honest(self) -> Table:
        """One row an arm: plan, rate, ledger, accuracy, and what epsilon costs."""
        config, rows = self.config, []
        costs = {chosen(arm, e): self.cost(arm, e) for arm in private(self.config) for e in config.epsilons}
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

    def curve(self) -> list[str]:
        """The arms of the honest part."""
        epsilons = self.config.epsilons[::-1]
        arms = [at_published_rate(FEDERATED), *(as_many_steps(e) for e in epsilons)]
        for arm in trained(self.config):
            arms += [chosen(arm), *(chosen(arm, e) for e in epsilons if chosen(arm, e) in self.ledgers)]
        return [*arms, at_published_rate(LOCAL), at_published_rate(POOLED), chosen(POOLED)]

    def shown_by_site(self) -> list[str]:
        """The arms of the figure of hospitals."""
        first = self.config.epsilons[0]
        arms = [name for arm in trained(self.config) for name in (chosen(arm), chosen(arm, first)) if name in self.choices]
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
            f"{worst.pld / strictest[0]:.1f} times as much, and for {worst.passes:.3g} with the batches that there are. Of "
            f"all labels the least factor is {min(self.worst(label).pld / label[0] for label in config.pairs):.1f}, at the "
            f"worst hospital, {self._named(self.smallest)}.")
        shared, own = (mean_interval(self.lost(strictest, arm)) for arm in (AS_RUN, OWN))
        sentences.append(
            f"One seed for all hospitals' noise costs accuracy too: at {strictest[0]:g} and {strictest[1]:g} it is "
            f"{_signed_bounds(shared)} against no privacy, {_signed_bounds(own)} with a generator of each hospital's own, "
            f"whose noise averages out; published {signed()(PUBLISHED[strictest].difference)}.")
        for epsilon in config.epsilons:
            price = _hundredfold(mean_interval(self.cost(FEDERATED, epsilon)))
            slow = self.patients(as_many_steps(epsilon))
            steps = _hundredfold(paired_difference(self.patients(chosen(FEDERATED, epsilon)), slow))
            sentences.append(
                f"Epsilon {epsilon:g} at {config.delta:g} costs FedAvg {_plain(price)} points of accuracy over all patients; "
                f"with FLamby's number of steps and learning rate under the same budget it has {_plain(steps)} fewer.")
        if not config.quick:
            first = config.epsilons[0]
            gap, kept = (_hundredfold(paired_difference(self.patients(chosen(LOCAL, e)), self.patients(chosen(FEDERATED, e))))
                         for e in (None, first))
            own = _hundredfold(paired_difference(self.patients(chosen(INTERCEPTS, first)), self.patients(chosen(LOCAL, first))))
            sentences.append(
                f"Hospitals alone have {_plain(gap)} points more than FedAvg without privacy and {_plain(kept)} at epsilon "
                f"{first:g}: their patients are ill in very different shares ({self._shares()}), which one intercept cannot "
                f"say. With an intercept of each hospital's own, FedAvg at epsilon {first:g} has {_plain(own)} points more "
                "than hospitals alone.")
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
            f"{expected:.1f} patients that are expected in it, {noise / expected:.1f} clips on their mean, and as much on the "
            "sum as anywhere else.")
        if not config.quick:
            together, alone = (own(arm, "test", site, METRIC) for arm in (chosen(FEDERATED, first), chosen(LOCAL, first)))
            without = own(chosen(LOCAL), "test", site, METRIC)
            if isinstance(together, Interval) and isinstance(alone, Interval) and isinstance(without, Interval):
                sentence += (
                    f" Alone it has {_bounds(alone)} then, {_bounds(without)} without privacy, and in the federation "
                    f"{_bounds(together)}, on {self.dataset.test.sizes[self.smallest]} test patients.")
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
