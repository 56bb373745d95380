"""What which_gap states before it runs: settings, hospitals, arms with their BatchNorm policy, the cells that are compared."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.common import arms, chest_xrays, cli, mnist, rate_grid
from experiments.common.chest_xrays import Hospitals, Load
from experiments.common.config import at_least_one
from fl_jax import algorithms, batches, data, models, norms, sweep, training
from fl_jax.data import FederatedDataset
from fl_jax.errors import FlJaxError
from fl_jax.metrics import CLASSIFICATION
from fl_jax.norms import NormPolicy
from fl_jax.types import FederatedAlgorithm, Model, PyTree

METRIC = "auroc"
METRICS = {METRIC: "AUROC", "accuracy": "accuracy"}
RATE = "learning rate"
SHORT, LONG = "short", "long"
HELD_OUT, OFFICIAL = "validation", "test"
"""What is measured on, by the name of its split: images held out from the training ones, and the official test images."""
IMAGES = {HELD_OUT: "held-out images", OFFICIAL: "official test images"}
FEDERATED, LOCAL, CENTRALIZED = "FedAvg", "local only", "centralized"
MENDED = ("FedAvg, statistics local", "FedAvg, recalibrated", "FedBN")
TRAINERS = (FEDERATED, LOCAL, CENTRALIZED)
POLICIES: Mapping[str, NormPolicy] = {
    FEDERATED: norms.AVERAGED, MENDED[0]: norms.LOCAL_STATISTICS, MENDED[1]: norms.RECALIBRATED, MENDED[2]: norms.LOCAL}
"""FedAvg's arms, and what each does with BatchNorm."""
FIRST_TUNING_SEED = 1000  # the seeds that are reported are 0, 1, ...
CHUNK = 128


class Cell(NamedTuple):
    """How an arm was trained. budget: SHORT or LONG. alike: whether the hospitals are."""

    budget: str
    alike: bool


def kind(alike: bool) -> str:
    """What the two kinds of hospitals are called."""
    return "hospitals alike" if alike else "hospitals differ"


@dataclasses.dataclass(frozen=True)
class Config(cli.Common):
    """How much of the gap between FedAvg and pooled training is BatchNorm policy, how much budget, how much heterogeneity."""

    short: int = 3
    """rounds of the short budget"""
    long: int = 24
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
    held_out: float = 0.25
    """share of the training images that are held out, anew in each seed, to measure by"""
    rates: tuple[float, ...] = rate_grid.decades(-4, -3, -2, -1, 0)
    """SGD rates to try, with every trainer"""
    seeds: int = 10
    """seeds of the results"""
    tuning_seeds: int = 2
    """seeds of the grid, which are others"""
    images: int = 0
    """use only so many training images; 0: all"""
    arms: tuple[str, ...] = (*POLICIES, LOCAL, CENTRALIZED)
    """what is trained; FedAvg, the mended policy and centralized training among it"""
    mended: str = MENDED[1]
    """the policy that counts as mended"""
    chosen: tuple[tuple[float, float], ...] = ()
    """learning rates that were chosen before, of FedAvg, local and centralized training: each where hospitals differ and where they are
    alike; () tries the grid"""

    def __post_init__(self) -> None:
        at_least_one(self, "short", "batch_size", "width", "seeds", "tuning_seeds")
        if self.long <= self.short:
            raise FlJaxError(f"The long budget must be more than the {self.short} rounds of the short one, and is {self.long}.")
        if self.long % self.short:
            raise FlJaxError(f"The long budget must be a multiple of the short one's {self.short} rounds, and is {self.long}.")
        if not 0 < self.held_out < 1:
            raise FlJaxError(f"held_out must be between 0 and 1, and is {self.held_out}.")
        if self.mended not in MENDED:
            raise FlJaxError(f"mended must be one of {'; '.join(MENDED)}, and is {self.mended}.")
        if not {FEDERATED, self.mended, CENTRALIZED} <= {*self.arms} <= {*POLICIES, LOCAL, CENTRALIZED} or len({*self.arms}) < len(self.arms):
            raise FlJaxError(f"arms must be some of {'; '.join((*POLICIES, LOCAL, CENTRALIZED))}, each once, {FEDERATED}, {self.mended} and "
                             f"{CENTRALIZED} among them, and are {'; '.join(self.arms)}.")
        if self.chosen and len(self.chosen) != len(TRAINERS):
            raise FlJaxError(f"chosen needs two learning rates for each of {', '.join(TRAINERS)}.")

    @classmethod
    def quick_defaults(cls) -> "Config":
        """A fifth of the images, fewer rounds and seeds, a smaller network, three arms, with rates that the full form chose."""
        return cls(quick=True, short=2, long=8, seeds=4, images=1000, width=4, arms=(FEDERATED, MENDED[1], CENTRALIZED),
                   chosen=((0.316, 0.316), (0.316, 0.316), (0.0316, 0.01)))

    @property
    def budgets(self) -> dict[str, int]:
        """Rounds of each."""
        return {SHORT: self.short, LONG: self.long}

    @property
    def mendable(self) -> tuple[str, ...]:
        """The arms that could count as mended."""
        return tuple(arm for arm in self.arms if arm in MENDED)

    def hospitals(self, alike: bool) -> Hospitals:
        """How the hospitals differ, or that they do not."""
        if alike:
            return Hospitals(self.size_ratio, 0.0, 0.0, 0.0, self.noise)
        return Hospitals(self.size_ratio, self.case_mix, self.gain, self.offset, self.noise)


def network(config: Config) -> Model:
    """A CNN with BatchNorm behind each convolution, on grey images in [-1, 1)."""
    example = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.uint8)
    return models.bridge(models.NormedCNN(2, config.width), example, models.softmax_cross_entropy, preprocess=models.images_uint8)


def federations(config: Config, images: Load, seeds: Sequence[int], *, tuning: bool) -> dict[tuple[bool, int], FederatedDataset]:
    """The hospitals by (alike, seed), of either kind. tuning: with the official validation images, and without any test images."""
    load = mnist.some(images, config.images, 0) if config.images else images

    def dealt(alike: bool, seed: int) -> FederatedDataset:
        hospitals = config.hospitals(alike)
        if tuning:
            return chest_xrays.to_choose(hospitals, seed, load)
        return chest_xrays.to_measure(hospitals, seed, load, config.held_out)

    return {(alike, seed): dealt(alike, seed) for alike in (False, True) for seed in seeds}


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
        return arms.at_one_place(name, build, work)
    return arms.everyone(name, build)


def study_of(config: Config, model: Model, datasets: Sequence[FederatedDataset]) -> training.Study:
    """What all arms share: measured after the short and the long budget, and every so many rounds as the short one has."""
    first = datasets[0]
    return training.Study(
        model, data.stack(datasets), first.site_names, first.unseen_names, config.long, config.short, chunk=CHUNK,
        metrics={name: CLASSIFICATION[name] for name in METRICS}, mesh=sweep.run_mesh())
