"""What a study of FLamby's protocol says: published beside measured, budgets, left-out sites, a reading, figures, claims."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.rule import Rule

from experiments.common.report import Results, bullets, say_where
from experiments.flamby.data import torch_linear
from experiments.flamby.protocol import (
    NOT_PASSED_ON,
    POOLED,
    POOLED_OWN_SCALE,
    Config,
    Protocol,
    centralized,
    local_only,
    over_all,
    over_published,
)
from fl_jax.data import FederatedDataset
from fl_jax.results import (
    Column,
    RunFolder,
    Table,
    claims_table,
    comparison_table,
    curves,
    judge,
    number,
    per_site,
    signed,
    with_bounds,
    with_margin,
)
from fl_jax.results.figures import PALETTE
from fl_jax.statistics import mean_interval, paired_difference

RANGE = (0.0, 1.0)
FEWEST = 12  # of fewer runs a quarter says nothing
_difference = with_bounds(signed())


def conclude(folder: RunFolder, protocol: Protocol, config: Config, dataset: FederatedDataset, metrics: pd.DataFrame) -> None:
    """Prints tables and their reading; writes claims, summary and figures."""
    console, study = Console(), Study(protocol, config, dataset, metrics)
    verdicts = judge(protocol.name, protocol.claims(config), {
        text: values for arm in protocol.bars
        for text, values in ((over_all(arm), study.mean(arm)), (over_published(arm), study.published_seeds(arm)))})
    folder.write_claims(verdicts)
    tables = [study.overview(), study.by_site(), *([study.left_out()] if config.leave_out else [])]
    for table in tables:
        console.print("", table)
    console.print("", Rule("Reading", align="left"), bullets(study.reading()), "", claims_table(verdicts, "Claims"))

    arms = [arm for arm in study.arms if arm in protocol.rates.of_sites()]
    folder.save_figure("published", study.figure())
    folder.save_figure("over_rounds", curves(metrics, protocol.metric, "test", arms=arms, bounds=RANGE))
    folder.save_figure("per_site", per_site(metrics, protocol.metric, arms=[*arms, POOLED], bounds=RANGE))
    if config.leave_out:
        folder.save_figure("left_out", per_site(metrics, protocol.metric, "unseen", arms=[*arms, POOLED], bounds=RANGE))
    folder.write_summary(study.summary())
    say_where(console, folder, f"{config.seeds} seeds")


class Study:
    """The last round's metrics of all arms, and what follows from them."""

    def __init__(self, protocol: Protocol, config: Config, dataset: FederatedDataset, metrics: pd.DataFrame) -> None:
        self.protocol, self.config, self.dataset = protocol, config, dataset
        self.results = Results(metrics)
        self.arms = list(dict.fromkeys(metrics["arm"]))

    def mean(self, arm: str) -> npt.NDArray[np.float64]:
        """float64[S]: the metric's mean over the sites' test sets, by seed."""
        return self.results.values(arm, "test", "mean", self.protocol.metric)

    def published_seeds(self, arm: str) -> npt.NDArray[np.float64]:
        """The same of the seeds that FLamby ran."""
        return self.mean(arm)[:len(self.protocol.published[arm])]

    def of_a_run(self, arm: str, published: str) -> float:
        """The largest difference of a run of an arm from the published run that started at the same weights."""
        theirs = np.asarray(self.protocol.published[published])[:self.config.seeds]
        return float(np.abs(self.mean(arm)[:len(theirs)] - theirs).max())

    def overview(self) -> Table:
        """One row an arm: published, measured, and the difference to the arms with the same budget."""
        rows, rates = [], self.protocol.rates.of_sites()
        for arm in self.arms:
            row: dict[str, Any] = {
                "arm": arm, "all": mean_interval(self.mean(arm)),
                "worst": self.results.interval(arm, "test", "worst", self.protocol.metric)}
            if arm in self.protocol.published:
                published = mean_interval(self.protocol.published[arm])
                row |= {"published": published, "same": mean_interval(self.published_seeds(arm)), "run": self.of_a_run(arm, arm)}
            if arm in rates and self.config.matched:
                row |= {name: paired_difference(self.mean(arm), self.mean(other(rates[arm])))
                        for name, other in (("central", centralized), ("local", local_only))}
            rows.append(row)
        margin = with_margin()
        columns = [
            Column("arm", "", right=False), Column("published", "published, 5 runs", margin),
            Column("same", "same 5 starts", margin), Column("run", "most a run differs", number()),
            Column("all", f"{self.config.seeds} starts", margin), Column("worst", "worst site", margin),
        ]
        title = f"{self.protocol.metric}, mean over the sites' test sets ± half of the 95 % interval"
        if self.config.matched:
            columns += [Column("central", "Δ centralized", _difference), Column("local", "Δ local only", _difference)]
            title += "; Δ to arms with the same learning rate and budget, paired by seed"
        return comparison_table(rows, columns, title)

    def by_site(self) -> Table:
        """One row an arm, one column a site."""
        return self._sites("test", self.arms, "at each site's test set")

    def left_out(self) -> Table:
        """The same of models that were trained without the site, on all of its records."""
        have = self.results.last[self.results.last["split"] == "unseen"]["arm"].unique()
        arms = [arm for arm in self.arms if arm in have and self._everywhere(arm)]
        return self._sites("unseen", arms, "at each site when it was left out of training (all of its records)")

    def _everywhere(self, arm: str) -> bool:
        rows = self.results.last[(self.results.last["split"] == "unseen") & (self.results.last["arm"] == arm)]
        return set(self.dataset.site_names) <= {*rows["site"]}

    def _sites(self, split: str, arms: Sequence[str], where: str) -> Table:
        rows, names = [], self.dataset.site_names
        for arm in arms:
            values = np.stack([self.results.values(arm, split, site, self.protocol.metric) for site in names])
            row = {site: mean_interval(own) for site, own in zip(names, values, strict=True)}
            rows.append({"arm": arm, **row, "mean": mean_interval(np.nanmean(values, axis=0))})
        columns = [Column("arm", "", right=False), *(Column(site, site, with_margin()) for site in (*names, "mean"))]
        return comparison_table(rows, columns, f"{self.protocol.metric} {where}")

    def reading(self) -> list[str]:
        """Sentences that follow from the numbers, whatever these are."""
        alone, passed_on = (self.of_a_run(arm, NOT_PASSED_ON) for arm in (NOT_PASSED_ON, "cyclic"))
        cyclic = (
            f"FLamby's Cyclic hands no model on: a run of the same here differs from the published one by {alone:.3f} at most, "
            f"one of cyclic weight transfer by {passed_on:.3f}.")
        return [*self._gap_of_pooled(), cyclic, *self._start()]

    def _gap_of_pooled(self) -> list[str]:
        """How much of the distance from FedAvg to pooled training is due to other settings."""
        published = np.mean(self.protocol.published[POOLED]) - np.mean(self.protocol.published["FedAvg"])
        starts = len(self.protocol.published[POOLED])
        found = self.mean(POOLED) - self.mean("FedAvg")
        whole = (
            f"Pooled training against FedAvg: published {published:+.3f}; here by FLamby's protocol {found[:starts].mean():+.3f} "
            f"at the same starts, {_difference(mean_interval(found))} at all.")
        sentences = [whole]
        other = centralized(self.protocol.rates.fedavg)
        if other in self.arms:
            same, rest = (paired_difference(self.mean(a), self.mean(b)) for a, b in ((other, "FedAvg"), (POOLED, other)))
            gap = mean_interval(found)
            share = f", {rest.mean / gap.mean:.0%} of the difference" if gap.low > 0 or gap.high < 0 else ""
            settings = f"Adam{' and one scale for all' if self._two_scales() else ''}"
            sentences.append(
                f"Centralized training with FedAvg's SGD, as many updates, and each site's scale is {_difference(same)} against "
                f"it: the other {_difference(rest)} is protocol ({settings}){share}.")
        if self._two_scales():
            scale = paired_difference(self.mean(POOLED), self.mean(POOLED_OWN_SCALE))
            sentences.append(f"Of that, one scale for all instead of each site's own is {_difference(scale)}.")
        return sentences

    def _two_scales(self) -> bool:
        return POOLED_OWN_SCALE in self.arms

    def _start(self) -> list[str]:
        """What of the initial weights decides how FedAdam ends: the weight that goes with it most, if that says something."""
        names = self.dataset.feature_names
        weights = np.stack([torch_linear(seed, len(names))[0] for seed in self.config.torch_seeds])
        values = self.mean("FedAdam")
        if self.config.seeds < FEWEST or np.ptp(values) == 0:
            return []
        related = np.array([np.corrcoef(column, values)[0, 1] for column in weights.T])
        most = int(np.abs(related).argmax())
        lowest = weights[:, most] <= np.quantile(weights[:, most], 0.25)
        low, others = mean_interval(values[lowest]), mean_interval(values[~lowest])
        if low.low <= others.high and others.low <= low.high:
            return []
        sentence = (
            f"FedAdam depends on where it starts. The initial weight of {names[most]} goes with the result most (correlation "
            f"{related[most]:.2f}): where it is in its lowest quarter, the mean is {low.mean:.3f}, elsewhere {others.mean:.3f}. "
            f"{lowest[:5].sum()} of FLamby's own five starts {'is' if lowest[:5].sum() == 1 else 'are'} in that quarter.")
        return [sentence]

    def summary(self) -> dict[str, Any]:
        """Intervals of every arm and place, differences, and the reading."""
        places = [("test", site) for site in ("mean", "worst", "all", *self.dataset.site_names)]
        metrics = list(self.protocol.metrics)
        return {
            "arms": {arm: {metric: {site: self.results.interval(arm, split, site, metric)._asdict() for split, site in places}
                           for metric in metrics} for arm in self.arms},
            "published": {arm: list(values) for arm, values in self.protocol.published.items()},
            "reading": self.reading(), "notes": list(self.dataset.notes),
        }

    def figure(self) -> Figure:
        """Each arm's published runs, the same starts here, and all starts."""
        arms = [arm for arm in self.arms if arm in self.protocol.published]
        figure = Figure(figsize=(6.0, 1.3 + 0.33 * len(arms)), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        rng = np.random.default_rng(0)  # dots beside one another
        for y, arm in enumerate(arms):
            every = self.mean(arm)
            places = y + rng.uniform(0.05, 0.32, len(every))
            axes.plot(every, places, ".", color=PALETTE[0], alpha=0.25, markersize=4, markeredgewidth=0)
            same = self.published_seeds(arm)
            axes.plot(same, np.full(len(same), y), "o", color=PALETTE[0], markersize=4)
            published = self.protocol.published[arm]
            axes.plot(published, np.full(len(published), y - 0.22), "D", color=PALETTE[1], markersize=3.5)
            axes.plot([every.mean()] * 2, [y, y + 0.36], color=PALETTE[0], linewidth=1.5)
            axes.plot([np.mean(published)] * 2, [y - 0.36, y], color=PALETTE[1], linewidth=1.5)
        axes.plot([], [], "D", color=PALETTE[1], markersize=3.5, label="published runs")
        axes.plot([], [], "o", color=PALETTE[0], markersize=4, label="here, the same starts")
        axes.plot([], [], ".", color=PALETTE[0], alpha=0.4, label=f"here, {self.config.seeds} starts")
        axes.set_yticks(range(len(arms)), arms)
        axes.set_ylim(len(arms) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(f"{self.protocol.metric} (test, mean of sites); line: mean of runs")
        figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
        return figure
