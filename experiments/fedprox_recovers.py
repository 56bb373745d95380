"""Sites whose patients differ in age: does FedAvg fall below a site's own model there, and which algorithm recovers?

The motive of FedProx (Li et al. 2020, arXiv 1812.06127) and of personalised algorithms. All records are simulated: four sites, each with
the patients of one age group and as many of them. The log-odds of the outcome are (b + interaction * age c)' x, so that what a measurement
means changes with age; b and c are drawn anew in every seed, and the age, which the network sees, hardly varies within a site.
FedAvg, FedProx, SCAFFOLD, Ditto, FedPer, MR-MTL and fine-tuned FedAvg beside local-only and centralized training of as many steps.

    python -m experiments.fedprox_recovers            # 10 seeds
    python -m experiments.fedprox_recovers --quick    # 3 seeds, fewer rounds and points

Every arm has a grid of six points (learning rates, or rates times strengths), judged by the validation AUROC of other seeds, which have
no test records of the results. Intervals are over seeds, differences are paired by seed.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

from experiments import fedprox_recovers_report
from experiments.common import cli, rate_grid
from experiments.common.config import at_least_one
from experiments.common.reproduction import Reproduction
from experiments.fedprox_recovers_report import ARMS, CENTRALIZED, DITTO, FEDAVG, FEDPER, FEDPROX, LOCAL, METRIC, MR_MTL, SCAFFOLD
from fl_jax import algorithms, batches, data, models, sampling, sweep, training
from fl_jax.data import FederatedDataset, pooled_train, standardize_features
from fl_jax.errors import FlJaxError
from fl_jax.metrics import CLASSIFICATION
from fl_jax.results import RunFolder
from fl_jax.types import FederatedAlgorithm, Model, PyTree

FIRST_TUNING_SEED = 1000  # the seeds that are reported are 0, 1, ...
RATE, STRENGTH = "learning rate", "strength"
GROUPS = ((20, 35), (35, 50), (50, 65), (65, 80))
"""Years of age of each site's patients."""
WITH_STRENGTH = (FEDPROX, DITTO, MR_MTL)


@dataclasses.dataclass(frozen=True)
class Config(cli.Common):
    """Sites of different ages: FedAvg, FedProx, SCAFFOLD and personalised algorithms beside local-only and centralized training."""

    rounds: int = 30
    """rounds"""
    evaluate_every: int = 5
    """measure after so many rounds"""
    epochs: int = 5
    """passes over a site's records in a round"""
    batch_size: int = 20
    """records in a step"""
    hidden: int = 16
    """units of the network's one hidden layer"""
    patients: int = 800
    """of each site, half of them for testing, or for validation in the grid"""
    measurements: int = 8
    """features beside the age"""
    interaction: float = 2.0
    """size of the age's part in the coefficients, against 1 of what is the same at any age"""
    rates: tuple[float, ...] = rate_grid.decades(-4, -3, -2, -1, 0, 1)
    """SGD rates to try, of arms without a strength"""
    few_rates: tuple[float, ...] = rate_grid.decades(-3, -2, -1)
    """the same of FedProx, Ditto and MR-MTL"""
    strengths: tuple[float, ...] = (0.1, 1.0)
    """proximal strengths to try with each of these"""
    seeds: int = 10
    """seeds of the results"""
    tuning_seeds: int = 3
    """seeds of the grid, which are others"""

    def __post_init__(self) -> None:
        at_least_one(self, "rounds", "evaluate_every", "epochs", "batch_size", "hidden", "measurements", "seeds", "tuning_seeds")
        if self.patients < 20:
            raise FlJaxError(f"patients must be at least 20, so that a site has records of each split, and is {self.patients}.")
        if len(self.rates) != len(self.few_rates) * len(self.strengths):
            raise FlJaxError("Every arm must have a grid of the same size: give as many rates as few_rates times strengths.")

    @classmethod
    def quick_defaults(cls) -> "Config":
        """Three seeds, a third of the rounds, two points of a grid."""
        return cls(quick=True, rounds=10, seeds=3, tuning_seeds=1, rates=rate_grid.decades(-2, -1), few_rates=rate_grid.decades(-2),
                   strengths=(0.1, 1.0))

    def axes(self, arm: str) -> dict[str, tuple[float, ...]]:
        """The grid of an arm, for rate_grid."""
        return {RATE: self.few_rates, STRENGTH: self.strengths} if arm in WITH_STRENGTH else {RATE: self.rates}


def federation(config: Config, seed: int, *, tuning: bool) -> FederatedDataset:
    """Sites of one age group each. tuning: half of the records are for validation and none for testing, else the other way round."""
    rng = np.random.default_rng(seed)
    site = np.repeat(np.arange(len(GROUPS)), config.patients)
    low, high = np.array(GROUPS, np.float64)[site].T
    age = rng.uniform(low, high)
    x = rng.standard_normal((len(site), config.measurements))
    same, of_age = (w / np.linalg.norm(w) for w in rng.standard_normal((2, config.measurements)))
    decades = (age - 50) / 15
    log_odds = 2 * (x @ same + config.interaction * decades * (x @ of_age))
    y = (rng.uniform(size=len(site)) < 1 / (1 + np.exp(-log_odds))).astype(np.int32)
    dataset = data.from_arrays(
        np.column_stack([age, x]), y, site, name="age groups", seed=rng, validation=0.5 if tuning else 0.0, test=0.0 if tuning else 0.5,
        site_names=[f"age {low} to {high}" for low, high in GROUPS], num_classes=2, notes=("All records are simulated.",))
    return standardize_features(dataset)


def run(config: Config) -> None:
    """Runs the study and prints its report; writes a run folder."""
    with cli.run_folder(config, "fedprox_recovers") as folder:
        chosen = tune(config, folder)
        fedprox_recovers_report.conclude(folder, config, chosen, measure(config, chosen, folder))


def tune(config: Config, folder: RunFolder | None = None) -> dict[str, rate_grid.Choice]:
    """Every arm's best point, by the mean over sites of the validation AUROC after the last round."""
    seeds = [FIRST_TUNING_SEED + i for i in range(config.tuning_seeds)]
    study = study_of(config, [federation(config, seed, tuning=True) for seed in seeds])
    found = {}
    for axes, arms in ((config.axes(FEDAVG), [arm for arm in ARMS if arm not in WITH_STRENGTH]), (config.axes(DITTO), WITH_STRENGTH)):
        variants, owners = rate_grid.labels(axes, seeds)
        fits = training.fit(
            study, [arm_of(config, study.model, arm, f"grid of {arm}") for arm in arms], owners,
            rate_grid.rows(axes, training.seeds_of(seeds, stacked=True)), variants=variants, folder=folder, resume=config.resume,
            may_diverge=True)
        for arm in arms:
            name = f"grid of {arm}"
            scores = rate_grid.validation_scores(axes, fits[name].rows, name, METRIC, site="mean", after=config.rounds - 1)
            found[arm] = rate_grid.choose(axes, scores)
    return {arm: found[arm] for arm in ARMS}


def measure(config: Config, chosen: Mapping[str, rate_grid.Choice], folder: RunFolder | None = None) -> pd.DataFrame:
    """Trains every arm with its choice in all seeds, and measures it by the test records."""
    seeds = list(range(config.seeds))
    study = study_of(config, [federation(config, seed, tuning=False) for seed in seeds])
    hyper = {arm: {name: jnp.full(len(seeds), value, jnp.float32) for name, value in chosen[arm].point.items()} for arm in ARMS}
    fits = training.fit(
        study, [arm_of(config, study.model, arm, arm, own=True) for arm in ARMS], seeds,
        training.seeds_of(seeds, stacked=True)._replace(hyper=hyper), folder=folder, resume=config.resume)
    return pd.concat([fit.rows for fit in fits.values()], ignore_index=True)


def study_of(config: Config, federations: Sequence[FederatedDataset]) -> training.Study:
    """What all arms share."""
    first = federations[0]
    example = jax.ShapeDtypeStruct((1, first.train.x.shape[1]), jnp.float32)
    model = models.bridge(models.TabularNet(2, config.hidden, models.layer_norm), example, models.softmax_cross_entropy)
    return training.Study(
        model, data.stack(federations), first.site_names, (), config.rounds, config.evaluate_every,
        metrics={METRIC: CLASSIFICATION[METRIC]}, mesh=sweep.run_mesh())


def arm_of(config: Config, model: Model, arm: str, name: str, *, own: bool = False) -> training.Arm:
    """An algorithm as an arm. own: whether the hyper-parameters are those of all arms, by their names."""
    work = batches.epochs(config.epochs, config.batch_size)

    def build(hyper: PyTree) -> FederatedAlgorithm:
        point = hyper[arm] if own else hyper
        optimizer = optax.sgd(point[RATE])
        if arm == LOCAL:
            return algorithms.local_only(model, optimizer, work)
        if arm == CENTRALIZED:
            return algorithms.centralized(model, optimizer, algorithms.pooled_batches(work))
        if arm == FEDAVG:
            return algorithms.fedavg(model, optimizer, work)
        if arm == FEDPROX:
            return algorithms.fedprox(model, optimizer, work, point[STRENGTH])
        if arm == SCAFFOLD:
            return algorithms.scaffold(model, point[RATE], work)
        if arm == DITTO:
            return algorithms.ditto(model, optimizer, work, point[STRENGTH])
        if arm == FEDPER:
            return algorithms.fedper(model, optimizer, work, algorithms.layers("Dense_1"))
        if arm == MR_MTL:
            return algorithms.mr_mtl(model, optimizer, work, point[STRENGTH])
        return algorithms.fedavg_tuned(model, optimizer, work, work)

    if arm == CENTRALIZED:
        return training.Arm(name, build, lambda sites: algorithms.matched_budget(sampling.everyone(), work, sites), pooled_train)
    return training.Arm(name, build, lambda sites: sampling.everyone())


REPRODUCTION = Reproduction(fedprox_recovers_report.claims)

if __name__ == "__main__":
    cli.main(run, Config)
