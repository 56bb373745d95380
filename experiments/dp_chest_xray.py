"""Private chest X-rays: how much AUROC does epsilon 3 cost, and does a clip that moves win a point of it back?

PneumoniaMNIST, its official splits at four simulated hospitals of different size, case mix and calibration; a fifth one,
which takes no part in training, measures the test images anew. The small CNN on which DP-SGD is compared, 30 rounds of one
epoch at every hospital, without privacy and at epsilon 10, 3 and 1 for an image (delta 1e-4), with a constant clip, one that
follows a quantile of the gradients' norms (Andrew et al. 2021, arXiv 1905.03871), and one that falls from high to low on half
a cosine. Local-only and centralized training without privacy beside them, with as many steps.

    python -m experiments.dp_chest_xray
    python -m experiments.dp_chest_xray --quick    # epsilon 3, 10 rounds, 4 seeds, what the full form chose

Reports of federated chest X-ray studies put the cost of an epsilon near 3 at 2 to 6 points of AUROC. Every arm tries a grid
of 8 points (4 learning rates x 2 clips, targets or starts; without privacy 8 learning rates) on federations of other seeds,
which have no test image, and is chosen by the AUROC of the official validation images after the last round. Which values are
in the grids was seen on one of those seeds, by validation images too. Choosing looks at validation images without noise:
epsilon does not count it.
An image is in a step by a coin of probability 1/8, at every hospital, and at one hospital only: epsilon is that of 240 such
steps, the same at all four but for how rarely a sample is cut. All three clippings have the noise that epsilon needs; of a
quantile's a little goes into its count.

2 CPU cores that other work shared: full 85 minutes, 55 of processor time. Found, ten seeds, in points of AUROC on the
official test images: epsilon 10 costs 1.0, 3 costs 2.1 [1.0, 3.2] and 1 costs 8.3 with a constant clip; at epsilon 3 the
quantile wins .5 [-.5, 1.5] of it back and the schedule .1 [-1.0, 1.2], at epsilon 1 4.1 [1.6, 6.7] and 5.2 [1.5, 8.9].
Data: `python -m fl_jax.data prepare pneumoniamnist`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from experiments import dp_chest_xray_report
from experiments.common import cli, rate_grid
from experiments.common.reproduction import Reproduction
from experiments.dp_chest_xray_protocol import (
    FIRST_TUNING_SEED,
    KINDS,
    NO_DP,
    Config,
    Load,
    arm_of,
    classifier,
    promise,
    study_of,
    to_choose,
    to_measure,
)
from fl_jax import training
from fl_jax.data import pneumonia_mnist
from fl_jax.results import RunFolder
from fl_jax.types import Model


class Tried(NamedTuple):
    """An arm's grid. scores: validation AUROC float64[G, S]. choice: the best point."""

    axes: Mapping[str, Sequence[float]]
    scores: npt.NDArray[np.float64]
    choice: rate_grid.Choice


def run(config: Config, images: Load = pneumonia_mnist) -> None:
    """Runs the study and prints its report; writes a run folder. images: PneumoniaMNIST, or what stands in for it in a test."""
    with cli.run_folder(config, "dp_chest_xray") as folder:
        model = classifier()
        tried = {} if config.chosen else tune(config, model, images, folder)
        chosen = rates(config, tried)
        fits = measure(config, model, chosen, images, folder)
        dp_chest_xray_report.conclude(folder, config, to_measure(config, 0, images), tried, chosen, fits)


def tune(config: Config, model: Model, images: Load, folder: RunFolder | None = None) -> dict[str, Tried]:
    """Every arm's grid on validation images, by the arm's name. Arms with the same axes are compiled side by side."""
    seeds = [FIRST_TUNING_SEED + i for i in range(config.tuning_seeds)]
    federations = [to_choose(config, seed, images) for seed in seeds]
    study, num_records = study_of(config, model, federations), len(federations[0].train.y)
    tried = {}
    for kind in (NO_DP, *KINDS):
        plans = [plan for plan in config.arms if plan.kind == kind or (kind == NO_DP and plan.epsilon is None)]
        axes, names = config.axes(kind), {plan.name: f"grid of {plan.name}" for plan in plans}
        variants, labels = rate_grid.labels(axes, seeds)
        fits = training.fit(
            study, [arm_of(config, model, plan, num_records, name=names[plan.name]) for plan in plans], labels,
            rate_grid.rows(axes, training.seeds_of(seeds, stacked=True)), variants=variants, folder=folder, resume=config.resume,
            may_diverge=True)
        for plan, name in names.items():
            scores = rate_grid.validation_scores(axes, fits[name].rows, name, "auroc", after=config.rounds - 1)
            tried[plan] = Tried(axes, scores, rate_grid.choose(axes, scores))
    return tried


def rates(config: Config, tried: Mapping[str, Tried]) -> dict[str, dict[str, float]]:
    """The hyper-parameters of every arm: what its grid says, or what was chosen before."""
    if config.chosen:
        return {plan.name: dict(zip(config.axes(plan.kind), values, strict=True))
                for plan, values in zip(config.arms, config.chosen, strict=True)}
    return {plan.name: tried[plan.name].choice.point for plan in config.arms}


def measure(
    config: Config, model: Model, chosen: Mapping[str, Mapping[str, float]], images: Load, folder: RunFolder | None = None
) -> dict[str, training.Fit]:
    """Trains every arm with its hyper-parameters for all seeds, with its ledger, and measures it by the test images."""
    seeds = list(range(config.seeds))
    federations = [to_measure(config, seed, images) for seed in seeds]
    num_records = len(federations[0].train.y)
    hyper = {arm: {name: jnp.full(len(seeds), value, jnp.float32) for name, value in of.items()} for arm, of in chosen.items()}
    return training.fit(
        study_of(config, model, federations), [arm_of(config, model, plan, num_records, own=True) for plan in config.arms], seeds,
        training.seeds_of(seeds, stacked=True)._replace(hyper=hyper), folder=folder, resume=config.resume, may_diverge=True,
        privacy={plan.name: promise(config) for plan in config.arms if plan.epsilon is not None})


REPRODUCTION = Reproduction(dp_chest_xray_report.claims, datasets=("pneumoniamnist",))

if __name__ == "__main__":
    cli.main(run, Config)
