"""What the study of private chest X-rays fixes before it runs: settings, hospitals, arms with their grids, noise."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common import chest_xrays, cli, rate_grid
from experiments.common.chest_xrays import SITES, Load
from experiments.common.config import at_least_one
from fl_jax import algorithms, batches, clipping, data, gradients, models, sampling, sweep, training
from fl_jax.data import FederatedDataset, pneumonia_mnist, pooled_train
from fl_jax.errors import FlJaxError
from fl_jax.metrics import CLASSIFICATION
from fl_jax.privacy import Accountant, Budget, Guarantee, Unit, calibrate
from fl_jax.types import Batches, FederatedAlgorithm, Model, PyTree

NO_DP, CENTRALIZED, LOCAL = "no DP", "centralized", "local only"
CONSTANT, QUANTILE, SCHEDULED = "constant", "quantile", "high to low"
KINDS = (CONSTANT, QUANTILE, SCHEDULED)
RATE = "learning rate"
BOUND: Mapping[str, str] = {CONSTANT: "clip", QUANTILE: "target", SCHEDULED: "start"}
"""What the grid of each clipping has beside the learning rate."""
NO_CLIP = 1e6
"""A bound that no gradient reaches: without privacy an arm makes the same steps on the same samples, neither cut nor noised."""
FIRST_TUNING_SEED = 1000  # the seeds that are reported are 0, 1, ...
CHUNK = 128
ACCOUNTANT = Accountant.PLD


class Plan(NamedTuple):
    """An arm. kind: of its clipping, or its name where it is not private. epsilon: of a private one."""

    name: str
    kind: str
    epsilon: float | None = None


@dataclasses.dataclass(frozen=True)
class Config(cli.Common):
    """Chest X-rays at four hospitals under record-level differential privacy: what epsilon costs in AUROC, and whether a clip
    that moves wins some of it back."""

    epsilons: tuple[float, ...] = (10.0, 3.0, 1.0)
    """budgets of an image, descending"""
    delta: float = 1e-4
    """at this delta; there are 4,708 training images"""
    rounds: int = 30
    """rounds, in each of which every hospital makes one epoch in expectation"""
    rate: float = 0.125
    """probability that an image is in a step: 8 steps an epoch"""
    microbatch: int = 16
    """gradients of so many images are in memory at a time"""
    size_ratio: float = 2.0
    """the largest hospital's images over the smallest's; sizes fall geometrically"""
    case_mix: float = 1.0
    """log-odds of pneumonia are spread over plus and minus this"""
    gain: float = 0.3
    """standard deviation of the log gain of a hospital's X-rays (all but the first)"""
    offset: float = 0.5
    """the same of the offset, in standard deviations of a pixel"""
    noise: float = 0.2
    """standard deviation of each pixel's noise, everywhere, in the same unit"""
    plain_rates: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8)
    """SGD rates to try without privacy"""
    private_rates: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """SGD rates to try with a constant bound and with a schedule"""
    quantile_rates: tuple[float, ...] = (2.0, 4.0, 8.0, 16.0)
    """the same with the bound that follows a quantile, which ends far lower"""
    clips: tuple[float, ...] = (0.3, 1.0)
    """constant bounds to try"""
    targets: tuple[float, ...] = (0.3, 0.5)
    """quantiles of the norms to follow"""
    starts: tuple[float, ...] = (0.6, 2.0)
    """bounds from which to fall: twice the constant ones, so that they are the same in the mean over steps"""
    fall: float = 0.1
    """the schedule's last bound over its first, on half a cosine over all steps"""
    initial: float = 1.0
    """the first bound of the one that follows a quantile"""
    lowest: float = 0.03
    """below which that one does not fall"""
    highest: float = 10.0
    """above which it does not rise: where noise makes gradients longer, it would for ever"""
    bound_rate: float = 0.2
    """how fast that one moves: its eta"""
    count_noise: float = 0.05
    """standard deviation of the noise on the number of norms within it, in expected batches of a mean hospital"""
    seeds: int = 10
    """seeds of the results"""
    tuning_seeds: int = 2
    """seeds of the grids, which are others"""
    evaluate_every: int = 10
    """measure after so many rounds"""
    baselines: bool = True
    """also centralized and local-only training without privacy"""
    chosen: tuple[tuple[float, ...], ...] = ()
    """hyper-parameters that were chosen before, a tuple for each arm in the order of `arms`; () tries the grids"""

    def __post_init__(self) -> None:
        at_least_one(self, "rounds", "seeds", "tuning_seeds", "evaluate_every", "microbatch")
        if not self.epsilons or [*self.epsilons] != sorted({*self.epsilons}, reverse=True):
            raise FlJaxError(f"epsilons must descend, and are {list(self.epsilons)}.")
        sizes = {kind: len(rate_grid.points(self.axes(kind))) for kind in (*KINDS, NO_DP)}
        if len({*sizes.values()}) > 1 and not self.chosen:
            raise FlJaxError(f"Every arm must have a grid of the same size, but these have {sizes}.")
        if self.chosen and [len(values) for values in self.chosen] != [len(self.axes(plan.kind)) for plan in self.arms]:
            names = [plan.name for plan in self.arms]
            raise FlJaxError(f"chosen must have a learning rate, and a bound where there is one, for each of {names}.")

    @classmethod
    def quick_defaults(cls) -> "Config":
        """Epsilon 3 alone, with what the full form chose, fewer rounds and seeds, and no baselines."""
        return cls(
            quick=True, epsilons=(3.0,), rounds=10, evaluate_every=10, seeds=4, baselines=False,
            chosen=((0.2,), (4.0, 0.3), (4.0, 0.3), (4.0, 0.6)))

    def axes(self, kind: str) -> dict[str, tuple[float, ...]]:
        """The grid of a clipping or, for any other name, of an arm without privacy."""
        if kind not in KINDS:
            return {RATE: self.plain_rates}
        rates = self.quantile_rates if kind == QUANTILE else self.private_rates
        return {RATE: rates, BOUND[kind]: {CONSTANT: self.clips, QUANTILE: self.targets, SCHEDULED: self.starts}[kind]}

    @property
    def arms(self) -> "list[Plan]":
        """What is compared: without privacy, and with every clipping at every epsilon."""
        plain = (NO_DP, CENTRALIZED, LOCAL) if self.baselines else (NO_DP,)
        return [Plan(name, name) for name in plain] + [
            Plan(arm_name(kind, epsilon), kind, epsilon) for epsilon in self.epsilons for kind in KINDS]

    @property
    def steps(self) -> int:
        """Steps of a hospital in all rounds."""
        return self.rounds * round(1 / self.rate)


def arm_name(kind: str, epsilon: float) -> str:
    """What a private arm is called."""
    return f"{kind}, ε {epsilon:g}"


def site_sizes(config: Config, num_records: int) -> np.ndarray:
    """int64[4]: how many of so many images each hospital has."""
    return chest_xrays.site_sizes(config.size_ratio, num_records)


def hospitals(config: Config) -> chest_xrays.Hospitals:
    """How they differ."""
    return chest_xrays.Hospitals(config.size_ratio, config.case_mix, config.gain, config.offset, config.noise)


def to_measure(config: Config, seed: int, images: Load = pneumonia_mnist) -> FederatedDataset:
    """The federation of a seed with test images; see chest_xrays."""
    return chest_xrays.to_measure(hospitals(config), seed, images)


def to_choose(config: Config, seed: int, images: Load = pneumonia_mnist) -> FederatedDataset:
    """The federation of a seed with validation images in their place."""
    return chest_xrays.to_choose(hospitals(config), seed, images)


def classifier() -> Model:
    """The CNN of DP-SGD comparisons for two classes, 25,746 parameters, on pixels in [-1, 1)."""
    example = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.uint8)
    return models.bridge(models.DPSGDCNN(2), example, models.softmax_cross_entropy, preprocess=models.images_uint8)


def work_of(config: Config, num_records: int) -> Batches:
    """One epoch of Poisson samples at each hospital of a federation with so many training images."""
    return batches.poisson_epochs(config.rate, 1, int(site_sizes(config, num_records).max()))


def noise_of(config: Config, epsilon: float, num_records: int) -> float:
    """The noise multiplier, in clips, with which an image spends epsilon at most, and hardly less at the largest hospital, whose
    samples may be cut with the largest probability."""
    return _noise(config.rate, config.rounds, config.delta, epsilon, int(site_sizes(config, num_records).max()))


@functools.cache
def _noise(rate: float, rounds: int, delta: float, epsilon: float, largest: int) -> float:
    work = batches.poisson_epochs(rate, 1, largest)
    return calibrate(Budget(epsilon, delta, ACCOUNTANT), rounds, lambda event: work.account(event, largest))


def promise(config: Config) -> list[Guarantee]:
    """What a private arm promises: epsilon is what comes of it."""
    return [Guarantee(Unit.RECORD, config.delta, name="image", accountant=ACCOUNTANT)]


def clipping_of(config: Config, kind: str, bound: float | jax.Array, num_records: int) -> clipping.Clipping:
    """The clipping of a kind, with the value that its grid gives it."""
    if kind == CONSTANT:
        return clipping.constant(bound)
    if kind == QUANTILE:
        expected = config.rate * num_records / len(SITES)
        return clipping.quantile(
            config.initial, config.count_noise * expected, target=bound, learning_rate=config.bound_rate, lowest=config.lowest,
            highest=config.highest)
    return clipping.scheduled(optax.cosine_decay_schedule(bound, config.steps, alpha=config.fall))  # type: ignore[arg-type]


def arm_of(config: Config, model: Model, plan: Plan, num_records: int, *, name: str = "", own: bool = False) -> training.Arm:
    """A plan for so many training images as an arm. name: what it is called; default: the plan's. own: whether the runs'
    hyper-parameters are those of several arms, by the plan's name."""
    kind = plan.kind
    pooled = kind == CENTRALIZED
    work = batches.poisson_epochs(config.rate / len(SITES), 1, num_records) if pooled else work_of(config, num_records)
    noise = 0.0 if plan.epsilon is None else noise_of(config, plan.epsilon, num_records)
    trainer = {LOCAL: algorithms.local_only, CENTRALIZED: algorithms.centralized}.get(kind, algorithms.fedavg)

    def build(hyper: PyTree) -> FederatedAlgorithm:
        values = hyper[plan.name] if own else hyper
        clip = clipping.constant(NO_CLIP) if plan.epsilon is None else clipping_of(config, kind, values[BOUND[kind]], num_records)
        gradient = gradients.private(model, clip, noise, microbatch=config.microbatch)
        return trainer(model, optax.sgd(values[RATE]), work, gradient=gradient)

    if pooled:  # an epoch of all images is as many steps as the four hospitals make together
        return training.Arm(name or plan.name, build, lambda sites: sampling.everyone(), pooled_train)
    return training.Arm(name or plan.name, build, lambda sites: sampling.everyone())


def study_of(config: Config, model: Model, federations: Sequence[FederatedDataset]) -> training.Study:
    """What all arms share."""
    first = federations[0]
    return training.Study(
        model, data.stack(federations), first.site_names, first.unseen_names, config.rounds, config.evaluate_every, chunk=CHUNK,
        metrics={"auroc": CLASSIFICATION["auroc"]}, mesh=sweep.run_mesh())
