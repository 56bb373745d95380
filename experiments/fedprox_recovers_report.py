"""What the study of sites of different ages says: claims, a table per site, figures."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd
from rich.console import Console

from experiments.common import rate_grid
from experiments.common.report import Results, bullets, say_where
from experiments.common.reproduction import judged
from fl_jax.results import (
    Claim,
    Column,
    Direction,
    RunFolder,
    Table,
    claims_table,
    comparison_table,
    curves,
    per_site,
    signed,
    with_bounds,
    with_margin,
)

if TYPE_CHECKING:
    from experiments.fedprox_recovers import Config

METRIC = "auroc"
LOCAL, CENTRALIZED, FEDAVG, FEDPROX, SCAFFOLD = "local only", "centralized", "FedAvg", "FedProx", "SCAFFOLD"
DITTO, FEDPER, MR_MTL, TUNED = "Ditto", "FedPer", "MR-MTL", "FedAvg, fine-tuned"
ARMS = (LOCAL, CENTRALIZED, FEDAVG, FEDPROX, SCAFFOLD, DITTO, FEDPER, MR_MTL, TUNED)
PERSONAL = (DITTO, FEDPER, MR_MTL, TUNED)
_difference = with_bounds(signed())
Choices = Mapping[str, rate_grid.Choice]


class Measured:
    """The test AUROC of all arms. best: the personalised arm with the best validation AUROC."""

    def __init__(self, metrics: pd.DataFrame, chosen: Choices) -> None:
        self.results = Results(metrics)
        self.sites = [site for site in self.results.last["site"].unique() if site.startswith("age ")]
        self.best = max(PERSONAL, key=lambda arm: chosen[arm].score)

    def minus(self, arm: str, other: str, site: str = "mean") -> npt.NDArray[np.float64]:
        """float64[S]: arm - other in the same seed."""
        return self.results.values(arm, "test", site, METRIC) - self.results.values(other, "test", site, METRIC)

    def least_gain(self) -> npt.NDArray[np.float64]:
        """float64[S]: what the best personalised arm gains over local training where its mean gain over seeds is the least."""
        return min((self.minus(self.best, LOCAL, site) for site in self.sites), key=np.mean)

    def table(self) -> Table:
        """One row an arm: AUROC at each site, their mean, the worst one, and the mean beside local training's."""
        rows = [{"arm": arm, **{site: self.results.interval(arm, "test", site, METRIC) for site in (*self.sites, "mean", "worst")},
                 "gain": self.results.difference(arm, LOCAL, "test", "mean", METRIC)} for arm in ARMS]
        columns = [Column("arm", "", right=False), *(Column(site, site, with_margin()) for site in (*self.sites, "mean", "worst")),
                   Column("gain", "Δ local only", _difference)]
        return comparison_table(rows, columns, "Test AUROC after the last round; ± half of the 95 % interval over seeds; Δ paired by seed")


def claims(config: "Config") -> list[Claim]:
    """What the configuration is to show."""
    return [claim for claim, _ in _stated(config)]


def _stated(config: "Config") -> Iterator[tuple[Claim, Callable[[Measured], npt.NDArray[np.float64]]]]:
    tolerance = 0.02 if config.quick else 0.0
    reason = "three seeds of few rounds, which differ by .02" if config.quick else "the sign is what the issue asks for"

    def claim(text: str, direction: Direction, allowed: float = tolerance, why: str = reason) -> Claim:
        return Claim(text, "own bar, stated before the run", 0.0, direction, allowed, why, quick=config.quick)

    yield claim("FedAvg minus local only, mean AUROC", Direction.AT_MOST), lambda found: found.minus(FEDAVG, LOCAL)
    yield claim("FedProx minus FedAvg, mean AUROC", Direction.AT_LEAST), lambda found: found.minus(FEDPROX, FEDAVG)
    yield claim(
        "best personalised minus local only, AUROC at the site of least gain", Direction.AT_LEAST, max(tolerance, 0.005),
        reason if config.quick else "the least of four sites' mean gains: noise of .005 a site takes it below 0"), Measured.least_gain


def conclude(folder: RunFolder, config: "Config", chosen: Choices, metrics: pd.DataFrame) -> None:
    """Prints the table and its reading; writes claims, summary and figures."""
    console, measured = Console(), Measured(metrics, chosen)
    verdicts = judged("fedprox_recovers", _stated(config), measured)
    folder.write_claims(verdicts)
    console.print("", measured.table())
    points = [f"{arm}: {rate_grid.suffix(choice.point)[2:]}, validation {choice.score:.3f}"
              f"{', on the edge of its grid: ' + ', '.join(choice.edges) if choice.edges else ''}." for arm, choice in chosen.items()]
    console.print(bullets([*points, f"Best personalised arm on validation records: {measured.best}."]))
    console.print("", claims_table(verdicts, "Claims"))
    folder.save_figure("auroc_per_site", per_site(metrics, METRIC, arms=ARMS, bounds=(0, 1)))
    folder.save_figure("auroc_over_rounds", curves(metrics, METRIC, "test", arms=ARMS, bounds=(0, 1)))
    folder.write_summary({
        "best_personalised": measured.best,
        "arms": {arm: {"point": choice.point, "validation": choice.score, "edges": list(choice.edges)} for arm, choice in chosen.items()}})
    say_where(console, folder, f"{config.seeds} seeds")
