"""Sites whose patients differ in age: does FedAvg fall below a site's own model there, and which algorithm recovers?

The motive of FedProx (Li et al. 2020, arXiv 1812.06127), of SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378) and of personalised
algorithms, of which each mends something else. All records are simulated: four sites, each with the patients of one age group and as many
of them, and a fifth site, older than all, that takes no part. The log-odds of the outcome are 2 (b + interaction * age c)' x, where b and c,
of length 1, are drawn anew in every seed: what a measurement means changes with age, which hardly varies within a site. Two models:

    logistic regression   one for all ages cannot be right: FedAvg loses to a site's own model, and so does training on all records
    network               one for all ages can be right: what FedAvg loses there is how it gets there

FedAvg, FedProx, SCAFFOLD, Ditto, FedPer, MR-MTL and fine-tuned FedAvg stand beside local-only and centralized training of as many steps, in
AUROC per site.

    python -m experiments.fedprox_recovers            # 10 seeds
    python -m experiments.fedprox_recovers --quick    # 4 seeds, logistic regression, five arms, rates as the full form chose

Every arm has a grid of twelve points (learning rates, or rates times strengths), judged by the validation AUROC of other seeds, which have
no test records. The size of the interaction was chosen on such seeds too, as one at which FedAvg falls below a site's own model with
logistic regression. Intervals are over seeds, differences are paired by seed.

2 CPU cores: 20 minutes of processor time in full, most of it compilation of 34 programs. Expected, mean of the four sites: with logistic
regression FedAvg is .040 [.034, .047] of AUROC below a site's own model, .099 at the youngest site, where training on all records is as far
below: FedProx and SCAFFOLD change nothing about that (.000), Ditto, MR-MTL and fine-tuning win it back (.862 against .861 of local training) and
gain at two sites what they lose at the others, .005 at most. With the network FedAvg is above a site's own model (+.008 [.001, .016]) and
.002 below training on all records, which SCAFFOLD wins back (+.002 [.001, .004] against FedAvg) and FedProx does not. So FedProx recovers
nothing here; what does depends on whether one model can be right for all. At the unseen site fine-tuning on 200 records gives .919 with
logistic regression, where FedAvg's model has .801. FedProx's strength lies on the edge of its grid with both models, without any effect.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import pandas as pd

from experiments import fedprox_recovers_report
from experiments.common import cli, rate_grid
from experiments.common.reproduction import Reproduction, judged
from experiments.fedprox_recovers_protocol import (
    FIRST_TUNING_SEED,
    WITH_STRENGTH,
    Config,
    arm_of,
    claims,
    federation,
    model_of,
    stated,
)
from experiments.fedprox_recovers_report import METRIC, Choices, Measured
from fl_jax import data, sweep, training
from fl_jax.data import FederatedDataset
from fl_jax.metrics import CLASSIFICATION
from fl_jax.results import RunFolder
from fl_jax.types import Model

NAME = "fedprox_recovers"
REPRODUCTION = Reproduction(claims)


def run(config: Config) -> None:
    """Runs the study and prints its report; writes a run folder."""
    with cli.run_folder(config, NAME) as folder:
        points, found = given(config), {}
        datasets = [federation(config, seed, tuning=False) for seed in range(config.seeds)]
        for name in config.models:
            model, arms = model_of(config, name), config.arms_of(name)
            chosen = points.get(name) or tune(config, name, model, folder)
            found[name] = Measured(arms, datasets[0], measure(config, name, model, chosen, datasets, folder), chosen)
        verdicts = judged(NAME, stated(config), found)
        folder.write_claims(verdicts)
        fedprox_recovers_report.conclude(folder, config, datasets[0], found, verdicts)


def given(config: Config) -> Mapping[str, Choices]:
    """The points that the configuration names, by model; they have no score here."""
    rest, found = iter(config.chosen), {}
    for name in config.models if config.chosen else ():
        found[name] = {arm: rate_grid.Choice(dict(zip(config.axes(arm), next(rest), strict=True)), float("nan"), ()) for arm in config.arms_of(name)}
    return found


def tune(config: Config, name: str, model: Model, folder: RunFolder | None = None) -> Choices:
    """Every arm's best point with a model, by the mean over sites of the validation AUROC after the last round."""
    seeds = [FIRST_TUNING_SEED + i for i in range(config.tuning_seeds)]
    study = study_of(config, model, [federation(config, seed, tuning=True) for seed in seeds])
    arms, found = config.arms_of(name), {}
    for together in ([arm for arm in arms if arm not in WITH_STRENGTH], [arm for arm in arms if arm in WITH_STRENGTH]):
        axes, grids = config.axes(together[0]), {arm: f"grid of {arm}, {name}" for arm in together}
        variants, owners = rate_grid.labels(axes, seeds)
        fits = training.fit(
            study, [arm_of(config, model, arm, grid) for arm, grid in grids.items()], owners,
            rate_grid.rows(axes, training.seeds_of(seeds, stacked=True)), variants=variants, folder=folder, resume=config.resume,
            may_diverge=True)
        for arm, grid in grids.items():
            scores = rate_grid.validation_scores(axes, fits[grid].rows, grid, METRIC, site="mean", after=config.rounds - 1)
            found[arm] = rate_grid.choose(axes, scores)
    return {arm: found[arm] for arm in arms}


def measure(
    config: Config, name: str, model: Model, chosen: Choices, datasets: Sequence[FederatedDataset], folder: RunFolder | None = None
) -> pd.DataFrame:
    """Trains every arm with its choice in all seeds, and measures it by the test records; rows by the arms' names alone."""
    seeds, names = list(range(len(datasets))), {f"{arm}, {name}": arm for arm in config.arms_of(name)}
    hyper = {arm: {axis: jnp.full(len(seeds), value, jnp.float32) for axis, value in choice.point.items()} for arm, choice in chosen.items()}
    fits = training.fit(
        study_of(config, model, datasets), [arm_of(config, model, arm, full, own=True) for full, arm in names.items()], seeds,
        training.seeds_of(seeds, stacked=True)._replace(hyper=hyper), folder=folder, resume=config.resume)
    return pd.concat([fit.rows.assign(arm=names[full]) for full, fit in fits.items()], ignore_index=True)


def study_of(config: Config, model: Model, federations: Sequence[FederatedDataset]) -> training.Study:
    """What all arms share."""
    first = federations[0]
    return training.Study(
        model, data.stack(federations), first.site_names, first.unseen_names, config.rounds, config.evaluate_every,
        metrics={METRIC: CLASSIFICATION[METRIC]}, mesh=sweep.run_mesh())


if __name__ == "__main__":
    cli.main(run, Config)
