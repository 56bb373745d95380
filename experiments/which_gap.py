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
    python -m experiments.which_gap --quick    # fewer rounds and seeds, a third of the images, rates as the full form chose

PneumoniaMNIST, its official splits, at four simulated hospitals (experiments/common/chest_xrays.py). A CNN with BatchNorm behind each
convolution. Learning rates: centralized, local and federated training each from a stated grid of the same size, for either
kind of hospitals, by validation images after the long budget on federations of other seeds without test images; all policies share
FedAvg's, since they train alike but for FedBN. Which policy counts as mended is chosen on those validation images too. The short
budget is the beginning of the same runs; what rates of its own would have been worth is told.
Not recorded yet: neither form has been run to its end, so that there are no expected numbers here, and STUDIES does not have it.
Data: `python -m fl_jax.data prepare pneumoniamnist`.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
import pandas as pd

from experiments import which_gap_report
from experiments.common import chest_xrays, cli, rate_grid
from experiments.common.chest_xrays import Hospitals, Load
from experiments.common.config import at_least_one
from experiments.common.reproduction import Reproduction
from experiments.which_gap_report import (
    CENTRALIZED,
    FEDERATED,
    LOCAL,
    LONG,
    MENDED,
    METRIC,
    METRICS,
    RATE,
    SHORT,
    TRAINERS,
    Cell,
    Tried,
    kind,
)
from fl_jax import algorithms, batches, data, models, norms, sampling, sweep, training
from fl_jax.data import FederatedDataset, Source, pneumonia_mnist, pooled_train
from fl_jax.errors import FlJaxError
from fl_jax.metrics import CLASSIFICATION
from fl_jax.norms import NormPolicy
from fl_jax.results import RunFolder
from fl_jax.types import FederatedAlgorithm, Model, PyTree

FIRST_TUNING_SEED = 1000  # the seeds that are reported are 0, 1, ...
CHUNK = 128
POLICIES: Mapping[str, NormPolicy] = {
    FEDERATED: norms.AVERAGED, MENDED[0]: norms.LOCAL_STATISTICS, MENDED[1]: norms.RECALIBRATED, MENDED[2]: norms.LOCAL}
"""FedAvg's arms, and what each does with BatchNorm."""


@dataclasses.dataclass(frozen=True)
class Config(cli.Common):
    """How much of the gap between FedAvg and pooled training is BatchNorm policy, how much budget, how much heterogeneity."""

    short: int = 10
    """rounds of the short budget"""
    long: int = 40
    """rounds of the long one, and of centralized training"""
    batch_size: int = 32
    """images in a step; a round is one epoch at every hospital"""
    width: int = 8
    """channels of the first convolution"""
    size_ratio: float = 2.0
    """the largest hospital's images over the smallest's, also where hospitals are alike"""
    case_mix: float = 1.0
    """log-odds of pneumonia are spread over plus and minus this where hospitals differ"""
    gain: float = 0.3
    """standard deviation of the log gain of a hospital's X-rays there"""
    offset: float = 0.5
    """the same of the offset, in standard deviations of a pixel"""
    noise: float = 0.2
    """standard deviation of each pixel's noise, everywhere, in the same unit"""
    rates: tuple[float, ...] = rate_grid.decades(-4, -3, -2, -1)
    """SGD rates to try, with every trainer"""
    seeds: int = 10
    """seeds of the results"""
    tuning_seeds: int = 2
    """seeds of the grid, which are others"""
    images: int = 0
    """use only so many training images; 0: all"""
    chosen: tuple[tuple[float, float], ...] = ()
    """learning rates that were chosen before, of FedAvg, local and centralized training: each where hospitals differ and where they are
    alike; () tries the grid"""
    mended: str = ""
    """the policy that counts as mended, chosen before; "" with `chosen` left out"""

    def __post_init__(self) -> None:
        at_least_one(self, "short", "batch_size", "width", "seeds", "tuning_seeds")
        if self.long <= self.short:
            raise FlJaxError(f"The long budget must be more than the {self.short} rounds of the short one, and is {self.long}.")
        if self.chosen and (len(self.chosen) != len(TRAINERS) or self.mended not in MENDED):
            raise FlJaxError(f"chosen needs two learning rates for each of {', '.join(TRAINERS)}, and mended one of {', '.join(MENDED)}.")
        if self.long % self.short:
            raise FlJaxError(f"The long budget must be a multiple of the short one's {self.short} rounds, and is {self.long}.")

    @classmethod
    def quick_defaults(cls) -> "Config":
        """A third of the images, half the rounds, four seeds, with rates that the full form chose."""
        return cls(
            quick=True, short=4, long=16, seeds=4, images=1600, chosen=((0.03, 0.03), (0.1, 0.1), (0.03, 0.03)), mended=MENDED[1])

    @property
    def budgets(self) -> dict[str, int]:
        """Rounds of each."""
        return {SHORT: self.short, LONG: self.long}

    def hospitals(self, alike: bool) -> Hospitals:
        """How the hospitals differ, or that they do not."""
        if alike:
            return Hospitals(self.size_ratio, 0.0, 0.0, 0.0, self.noise)
        return Hospitals(self.size_ratio, self.case_mix, self.gain, self.offset, self.noise)


def run(config: Config, images: Load = pneumonia_mnist) -> None:
    """Runs the study and prints its report; writes a run folder. images: PneumoniaMNIST, or what stands in for it in a test."""
    with cli.run_folder(config, "which_gap") as folder:
        model, load = network(config), some(images, config)
        tried = {} if config.chosen else tune(config, model, load, folder)
        chosen, mended = rates(config, tried), mended_policy(config, tried)
        metrics = measure(config, model, chosen, load, folder)
        example = chest_xrays.to_measure(config.hospitals(False), 0, load)
        which_gap_report.conclude(folder, config, example, metrics, tried, chosen, mended)


def network(config: Config) -> Model:
    """A CNN with BatchNorm behind each convolution, on grey images in [-1, 1)."""
    example = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.uint8)
    return models.bridge(models.NormedCNN(2, config.width), example, models.softmax_cross_entropy, preprocess=models.images_uint8)


def some(images: Load, config: Config) -> Load:
    """The images; of the training ones only so many, the first: their order is that of their digests, as good as chance."""

    def load(split: str) -> Source:
        source = images(split)
        return source._replace(x=source.x[: config.images], y=source.y[: config.images]) if config.images and split == "train" else source

    return load


def tune(config: Config, model: Model, images: Load, folder: RunFolder | None = None) -> dict[str, dict[Cell, Tried]]:
    """The grid of every arm on validation images, by arm and cell: what each rate is worth after the short budget and after the long one."""
    seeds = [FIRST_TUNING_SEED + i for i in range(config.tuning_seeds)]
    draws, runs = _draws(seeds)
    study = study_of(config, model, [chest_xrays.to_choose(config.hospitals(alike), seed, images) for alike, seed in draws])
    axes = {RATE: config.rates}
    points, owners = rate_grid.labels(axes, range(len(draws)))
    names = {arm: f"grid of {arm}" for arm in (*POLICIES, LOCAL, CENTRALIZED)}
    fits = training.fit(
        study, [arm_of(config, model, arm, name=name) for arm, name in names.items()], [draws[i][1] for i in owners],
        rate_grid.rows(axes, runs), variants=[f", {kind(draws[i][0])}{point}" for i, point in zip(owners, points, strict=True)],
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
    """Trains every arm with its rates for all seeds and both kinds of hospitals, and measures it by the test images after either budget."""
    draws, runs = _draws(range(config.seeds))
    study = study_of(config, model, [chest_xrays.to_measure(config.hospitals(alike), seed, images) for alike, seed in draws])
    arms = (*POLICIES, LOCAL, CENTRALIZED)
    hyper = {arm: {RATE: jnp.asarray([chosen[arm][alike] for alike, _ in draws], jnp.float32)} for arm in arms}
    fits = training.fit(
        study, [arm_of(config, model, arm, name=arm, own=True) for arm in arms], [seed for _, seed in draws],
        runs._replace(hyper=hyper), variants=[f", {kind(alike)}" for alike, _ in draws], folder=folder, resume=config.resume)
    return pd.concat([fit.rows for fit in fits.values()], ignore_index=True)


def arm_of(config: Config, model: Model, arm: str, *, name: str, own: bool = False) -> training.Arm:
    """A policy or a baseline as an arm. own: whether the hyper-parameters are those of several arms."""
    work = batches.epochs(1, config.batch_size)

    def build(hyper: PyTree) -> FederatedAlgorithm:
        optimizer = optax.sgd((hyper[arm] if own else hyper)[RATE])
        if arm == CENTRALIZED:
            return algorithms.centralized(model, optimizer, algorithms.pooled_batches(work))
        if arm == LOCAL:
            return algorithms.local_only(model, optimizer, work)
        return algorithms.fedavg(model, optimizer, work, norms=POLICIES[arm])

    if arm == CENTRALIZED:
        return training.Arm(name, build, lambda sites: algorithms.matched_budget(sampling.everyone(), work, sites), pooled_train)
    return training.Arm(name, build, lambda sites: sampling.everyone())


def study_of(config: Config, model: Model, federations: Sequence[FederatedDataset]) -> training.Study:
    """What all arms share: measured after the short and the long budget, and every so many rounds as the short one has."""
    first = federations[0]
    return training.Study(
        model, data.stack(federations), first.site_names, first.unseen_names, config.long, config.short, chunk=CHUNK,
        metrics={name: CLASSIFICATION[name] for name in METRICS}, mesh=sweep.run_mesh())


def _draws(seeds: Sequence[int]) -> tuple[list[tuple[bool, int]], training.Runs]:
    """(alike, seed) of each run, and the runs: initial weights and batches are the seed's, whatever the hospitals."""
    draws = [(alike, seed) for alike in (False, True) for seed in seeds]
    return draws, training.seeds_of([seed for _, seed in draws], stacked=True)


def rates(config: Config, tried: Mapping[str, Mapping[Cell, Tried]]) -> dict[str, dict[bool, float]]:
    """The learning rate of every arm, by whether hospitals are alike: the best after the long budget, of which the short one is the beginning.
    The policies train alike but for FedBN: they have FedAvg's."""
    if config.chosen:
        own = {arm: dict(zip((False, True), values, strict=True)) for arm, values in zip(TRAINERS, config.chosen, strict=True)}
    else:
        own = {arm: {alike: tried[arm][Cell(LONG, alike)].choice.point[RATE] for alike in (False, True)} for arm in TRAINERS}
    return own | dict.fromkeys(MENDED, own[FEDERATED])


def mended_policy(config: Config, tried: Mapping[str, Mapping[Cell, Tried]]) -> str:
    """The policy, of those that do not average all, with the best validation AUROC at hospitals that differ, after the long budget and at
    FedAvg's rate."""
    if config.chosen:
        return config.mended
    cell = Cell(LONG, False)
    point = rate_grid.points({RATE: config.rates}).index(tried[FEDERATED][cell].choice.point)
    return max(MENDED, key=lambda arm: tried[arm][cell].scores[point].mean())


REPRODUCTION = Reproduction(which_gap_report.claims, datasets=("pneumoniamnist",))

if __name__ == "__main__":
    cli.main(run, Config)
