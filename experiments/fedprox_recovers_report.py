"""What fedprox_recovers says: AUROC per site with differences from local training, a reading, figures."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from experiments.common import rate_grid
from experiments.common.report import Results, bullets, say_where
from experiments.fedprox_recovers_protocol import CENTRALIZED, FEDAVG, LOCAL, PERSONAL, SCAFFOLD, Config
from fl_jax.data import FederatedDataset, describe
from fl_jax.results import (
    Column,
    RunFolder,
    Table,
    Verdict,
    claims_table,
    comparison_table,
    curves,
    per_site,
    signed,
    with_bounds,
    with_margin,
)
from fl_jax.statistics import Interval

METRIC = "auroc"
_difference = with_bounds(signed())
Choices = Mapping[str, rate_grid.Choice]


class Measured(Results):
    """The test AUROC of all arms with one model. best: the personalised arm with the best validation AUROC, where several were trained."""

    def __init__(self, arms: Sequence[str], dataset: FederatedDataset, metrics: pd.DataFrame, chosen: Choices) -> None:
        super().__init__(metrics)
        self.arms, self.sites, self.unseen, self.chosen = tuple(arms), dataset.site_names, dataset.unseen_names[0], chosen
        self.best = max((arm for arm in self.arms if arm in PERSONAL), key=lambda arm: chosen[arm].score)

    def minus(self, arm: str, other: str, site: str = "mean") -> npt.NDArray[np.float64]:
        """float64[S]: arm - other in the same seed."""
        return self.values(arm, "test", site, METRIC) - self.values(other, "test", site, METRIC)

    def gain(self, arm: str, other: str, site: str = "mean") -> Interval:
        """The mean of that, with its interval."""
        return self.difference(arm, other, "test", site, METRIC)

    def least_gain(self) -> npt.NDArray[np.float64]:
        """float64[S]: what the best personalised arm gains over local training where its mean gain over seeds is the least."""
        return min((self.minus(self.best, LOCAL, site) for site in self.sites), key=np.mean)


def conclude(
    folder: RunFolder, config: Config, dataset: FederatedDataset, found: Mapping[str, Measured], verdicts: Sequence[Verdict]
) -> None:
    """Prints tables and their reading; writes summary and figures. found: by model."""
    console, sentences = Console(), [sentence for model, measured in found.items() for sentence in reading(model, measured)]
    sentences.append("All records are simulated: how FedAvg fares depends on how much age changes what a measurement means.")
    console.print(Text("\n" + describe(dataset) + "\n"), soft_wrap=True)
    for model, measured in found.items():
        title = f"{model}, {config.rounds} rounds, {config.seeds} seeds"
        console.print(per_age(title, measured), "", gains(title, measured), "")
        folder.save_figure(f"auroc_per_site_{model.split()[0]}", per_site(measured.metrics, METRIC, arms=measured.arms, bounds=(0, 1), width=7.5))
        folder.save_figure(
            f"auroc_over_rounds_{model.split()[0]}",
            curves(measured.metrics, METRIC, "test", arms=measured.arms, bounds=(0, 1), size=(7.0, 3.8)))
    console.print(Rule("Reading", align="left"), bullets(sentences), "", claims_table(verdicts, "Claims"))
    folder.write_summary({"reading": sentences, "models": {model: {
        "best_personalised": measured.best,
        "arms": {arm: {"point": choice.point, "validation": choice.score, "edges": list(choice.edges)} for arm, choice in measured.chosen.items()}}
        for model, measured in found.items()}})
    say_where(console, folder, f"{config.seeds} seeds")


def per_age(title: str, measured: Measured) -> Table:
    """One row an arm: AUROC at each site, their mean, the worst one, and the unseen site."""
    places = [*(("test", site) for site in (*measured.sites, "mean", "worst")), ("unseen", measured.unseen)]
    rows: list[dict[str, Any]] = [
        {"arm": arm} | {site: measured.interval(arm, split, site, METRIC) for split, site in places} for arm in measured.arms]
    columns = [Column("arm", "", right=False),
               *(Column(site, f"{site} (unseen)" if split == "unseen" else site, with_margin()) for split, site in places)]
    return comparison_table(rows, columns, f"Test AUROC, {title}; ± half of the 95 % interval")


def gains(title: str, measured: Measured) -> Table:
    """One row an arm: what it has more than local training at each site."""
    places = (*measured.sites, "mean")
    rows: list[dict[str, Any]] = [
        {"arm": arm} | {site: measured.gain(arm, LOCAL, site) for site in places} for arm in measured.arms if arm != LOCAL]
    columns = [Column("arm", "", right=False), *(Column(site, site, _difference) for site in places)]
    return comparison_table(rows, columns, f"AUROC minus that of a site's own model, paired by seed, with the 95 % interval: {title}")


def reading(model: str, measured: Measured) -> Iterator[str]:
    """Sentences that follow from the numbers, whatever these are."""
    below = [site for site in measured.sites if measured.gain(FEDAVG, LOCAL, site).high < 0]
    yield (f"{model}: FedAvg against a site's own model {_difference(measured.gain(FEDAVG, LOCAL))} in the mean; clearly below it at "
           f"{', '.join(below) if below else 'no site'}.")
    others = [arm for arm in measured.arms if arm not in (LOCAL, CENTRALIZED, FEDAVG)]
    yield f"{model}, against FedAvg, mean of the sites: {', '.join(f'{arm} {_difference(measured.gain(arm, FEDAVG))}' for arm in others)}."
    recovered = [arm for arm in others if all(measured.gain(arm, LOCAL, site).low > 0 for site in measured.sites)]
    yield f"{model}: clearly above a site's own model at every site: {', '.join(recovered) if recovered else 'none'}."
    if CENTRALIZED in measured.arms:
        yield (f"{model}: all records at one place have {_difference(measured.gain(CENTRALIZED, LOCAL))} against a site's own model; FedAvg has "
               f"{_difference(measured.gain(FEDAVG, CENTRALIZED))} against that, SCAFFOLD {_difference(measured.gain(SCAFFOLD, CENTRALIZED))}.")
    scores = {arm: float(measured.values(arm, "unseen", measured.unseen, METRIC).mean()) for arm in measured.arms}
    best = max(scores, key=scores.__getitem__)
    yield (f"{model}: at the unseen site, older than all, {best} is best ({scores[best]:.3f}; FedAvg {scores[FEDAVG]:.3f}, local models "
           f"{scores[LOCAL]:.3f}).")
    if not np.isnan(measured.chosen[FEDAVG].score):
        points = [f"{arm} {rate_grid.suffix(choice.point)[2:]} ({choice.score:.3f}{', edge' if choice.edges else ''})" for arm, choice in
                  measured.chosen.items()]
        yield f"{model}, chosen with its validation AUROC: {'; '.join(points)}."
