"""Which gap? How much of what FedAvg lacks against pooled training is BatchNorm's handling, how much budget, how much heterogeneity.

Comparisons of federated with centralized training mix three things that differ between the two: what a code does with BatchNorm
(FLamby, arXiv 2210.04620, and PFLlib, arXiv 2312.04992, exchange trained parameters only, so that statistics silently stay local; others
average them), how many steps each makes (few rounds against training to convergence), and that sites differ. Here each is a
switch. The gap of a federation is the AUROC of centralized training, with the steps of all sites in the long run, minus that of
FedAvg, mean over hospitals, on the same images:

    policy         BatchNorm averaged  ->  statistics local, recalibrated at each site, or whole layers local (FedBN)
    budget         short, so many rounds of one epoch  ->  long; the gap is always to centralized training of the long run
    heterogeneity  hospitals of different case mix and calibration  ->  hospitals that are alike

The gap with nothing mended, minus the one with everything mended, is shared out to the three switches by Shapley values: the mean over
the six orders in which they can be mended (Shapley 1953). So the shares add up, whatever the interactions, which a table of
all cells shows. What remains is federation itself.

    python -m experiments.which_gap
    python -m experiments.which_gap --quick    # 8 rounds, 4 seeds, a fifth of the images, three arms, rates as the full form chose

PneumoniaMNIST at four simulated hospitals (experiments/common/chest_xrays.py), measured by a quarter of the training images, held out anew
in each seed, and by the official test images, which are not of the population that is trained on. A first run had those alone, and a
short budget of 6 rounds: no gap was left there to divide (-.1 [-1.8, +1.6] points), the policy's share was +.8 [+.4, +1.2] of it. A CNN
with BatchNorm behind each convolution. Learning rates: centralized, local and federated training each from a stated grid of the same
size, for either kind of hospitals, by the official validation images after the long budget, on federations of other seeds without test images;
all policies share FedAvg's, since they train alike but for FedBN. The short budget is the beginning of the same runs; what rates of its
own would have been worth is told.

2 CPU cores: 35 minutes of processor time in full, 6 of them compilation. Expected, on held-out images, of a gap of 1.1 [.3, 1.9] points of
AUROC: policy .6 [.3, .9], heterogeneity .5 [.0, .9], budget .3 [.1, .4], and -.2 [-.4, -.1] remain; on the official test images of
.6 [-.3, 1.5]: policy .9 [.6, 1.3], budget .4 [.1, .8], heterogeneity -.1 [-.9, .8]. So nothing clears 0 everywhere but policy and budget. Where
hospitals differ, local statistics, recalibration and FedBN are 1.0 to 1.1 points above averaging (official: 1.1 to 1.8), and no policy matters
where they are alike; averaged, FedAvg is no better than a hospital's own model (-.1 [-.8, .7]), with any of the three it is (+.9 to +1.1).
What AUROC does not see: at the threshold of one half local statistics alone cost 1.6 points of accuracy against averaging, FedBN gains 2.4.
One chosen rate lies on the edge of its grid, that of centralized training where hospitals are alike, .01.
Data: `python -m fl_jax.data prepare pneumoniamnist`.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import pandas as pd

from experiments import which_gap_report
from experiments.common import cli, rate_grid
from experiments.common.chest_xrays import Load
from experiments.common.reproduction import Reproduction, judged
from experiments.which_gap_protocol import (
    FEDERATED,
    FIRST_TUNING_SEED,
    LONG,
    MENDED,
    METRIC,
    RATE,
    TRAINERS,
    Cell,
    Config,
    arm_of,
    federations,
    kind,
    network,
    study_of,
)
from experiments.which_gap_report import Gaps, Grids, Tried, claims, stated
from fl_jax import training
from fl_jax.data import pneumonia_mnist
from fl_jax.results import RunFolder
from fl_jax.types import Model

NAME = "which_gap"
REPRODUCTION = Reproduction(claims, datasets=("pneumoniamnist",))


def run(config: Config, images: Load = pneumonia_mnist) -> None:
    """Runs the study and prints its report; writes a run folder. images: PneumoniaMNIST, or what stands in for it in a test."""
    with cli.run_folder(config, NAME) as folder:
        model = network(config)
        tried = {} if config.chosen else tune(config, model, images, folder)
        chosen = rates(config, tried)
        gaps = Gaps(measure(config, model, chosen, images, folder), config)
        verdicts = judged(NAME, stated(config), gaps)
        folder.write_claims(verdicts)
        example = federations(config, images, [0], tuning=False)[False, 0]
        which_gap_report.conclude(folder, example, gaps, tried, chosen, verdicts)


def tune(config: Config, model: Model, images: Load, folder: RunFolder | None = None) -> Grids:
    """The grid of every trainer on validation images, by arm and cell: what each rate is worth after the short budget and after the long one."""
    dealt = federations(config, images, [FIRST_TUNING_SEED + i for i in range(config.tuning_seeds)], tuning=True)
    draws, axes = list(dealt), {RATE: config.rates}
    points, owners = rate_grid.labels(axes, range(len(draws)))
    names = {arm: f"grid of {arm}" for arm in TRAINERS if arm in config.arms}
    fits = training.fit(
        study_of(config, model, list(dealt.values())), [arm_of(config, model, arm, name=name) for arm, name in names.items()],
        [draws[i][1] for i in owners], rate_grid.rows(axes, _runs(draws)),
        variants=[f", {kind(draws[i][0])}{point}" for i, point in zip(owners, points, strict=True)],
        folder=folder, resume=config.resume, may_diverge=True)
    tried: dict[str, dict[Cell, Tried]] = {}
    for arm, name in names.items():
        tried[arm] = {}
        for budget, rounds in config.budgets.items():
            rows = fits[name].rows[fits[name].rows["round"] <= rounds]
            for alike in (False, True):
                scores = rate_grid.validation_scores(axes, rows, f"{name}, {kind(alike)}", METRIC, site="mean", after=rounds - 1)
                tried[arm][Cell(budget, alike)] = Tried(scores, rate_grid.choose(axes, scores))
    return tried


def measure(
    config: Config, model: Model, chosen: Mapping[str, Mapping[bool, float]], images: Load, folder: RunFolder | None = None
) -> pd.DataFrame:
    """Trains every arm with its rates for all seeds and both kinds of hospitals, and measures it by held-out and by test images after either
    budget."""
    dealt = federations(config, images, range(config.seeds), tuning=False)
    draws = list(dealt)
    hyper = {arm: {RATE: jnp.asarray([chosen[arm][alike] for alike, _ in draws], jnp.float32)} for arm in config.arms}
    fits = training.fit(
        study_of(config, model, list(dealt.values())), [arm_of(config, model, arm, name=arm, own=True) for arm in config.arms],
        [seed for _, seed in draws], _runs(draws)._replace(hyper=hyper), variants=[f", {kind(alike)}" for alike, _ in draws], folder=folder,
        resume=config.resume)
    return pd.concat([fit.rows for fit in fits.values()], ignore_index=True)


def _runs(draws: list[tuple[bool, int]]) -> training.Runs:
    """One run a draw: initial weights and batches are the seed's, whatever the hospitals."""
    return training.seeds_of([seed for _, seed in draws], stacked=True)


def rates(config: Config, tried: Grids) -> dict[str, dict[bool, float]]:
    """The learning rate of every arm, by whether hospitals are alike: the best after the long budget, of which the short one is the beginning.
    The policies train alike but for FedBN: they have FedAvg's."""
    if config.chosen:
        own = {arm: dict(zip((False, True), values, strict=True)) for arm, values in zip(TRAINERS, config.chosen, strict=True)}
    else:
        own = {arm: {alike: of[Cell(LONG, alike)].choice.point[RATE] for alike in (False, True)} for arm, of in tried.items()}
    return own | dict.fromkeys(MENDED, own[FEDERATED])


if __name__ == "__main__":
    cli.main(run, Config)
