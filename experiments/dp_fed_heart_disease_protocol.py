"""What the study of record-level differential privacy on Fed-Heart-Disease states beforehand: published numbers, settings,
claims."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from scipy import stats

from experiments.common import cli
from experiments.common.config import at_least_one
from experiments.flamby import opacus
from experiments.flamby.protocol import FIRST_SEED
from fl_jax.errors import FlJaxError
from fl_jax.results import Claim, Direction

RUNS = 5
"""FLamby's runs of each label."""
WITHOUT = (0.7125, 0.0238)
"""Mean and standard deviation over FLamby's runs of the mean accuracy over hospitals, without differential privacy."""
_ONE_INTERCEPT = (
    "between 38 and 100 % of a hospital's training patients are ill, which one intercept for all cannot say: on validation "
    "patients at epsilon 1 FedAvg has .750, local only .787, and FedAvg with each hospital's own intercept .799 (without DP "
    ".760, .821, .815)")
_TEST_PATIENTS = (
    "the bar allows for the choice alone, not for who the 254 test patients are: 3 of them are the difference; on the validation "
    "patients of twenty splits the best of the grid has .757 at epsilon 10 and 3 alike, .750 at 1 and .760 without DP")
SOURCE = "github.com/owkin/FLamby, flamby/dp_example"


class Published(NamedTuple):
    """Over FLamby's runs of a label. accuracy: the mean over hospitals. difference, deviation: mean and standard deviation of its
    difference from the run without differential privacy that began at the same weights."""

    accuracy: float
    difference: float
    deviation: float


PUBLISHED: Mapping[tuple[float, float], Published] = {
    (50, 0.1): Published(0.7036, -0.0089, 0.0257),
    (50, 0.01): Published(0.7026, -0.0099, 0.0245),
    (50, 0.001): Published(0.6995, -0.0129, 0.0217),
    (50, 0.0001): Published(0.7016, -0.0109, 0.0331),
    (10, 0.1): Published(0.6978, -0.0147, 0.0226),
    (10, 0.01): Published(0.6999, -0.0126, 0.0317),
    (10, 0.001): Published(0.6981, -0.0144, 0.0253),
    (10, 0.0001): Published(0.7004, -0.0120, 0.0350),
    (5, 0.1): Published(0.7049, -0.0076, 0.0171),
    (5, 0.01): Published(0.7004, -0.0121, 0.0249),
    (5, 0.001): Published(0.6997, -0.0128, 0.0232),
    (5, 0.0001): Published(0.7036, -0.0089, 0.0303),
    (1, 0.1): Published(0.7031, -0.0094, 0.0267),
    (1, 0.01): Published(0.7059, -0.0066, 0.0287),
    (1, 0.001): Published(0.7015, -0.0110, 0.0304),
    (1, 0.0001): Published(0.6853, -0.0272, 0.0367),
    (0.1, 0.1): Published(0.7108, -0.0017, 0.0194),
    (0.1, 0.01): Published(0.6673, -0.0452, 0.0405),
    (0.1, 0.001): Published(0.6292, -0.0833, 0.0826),
    (0.1, 0.0001): Published(0.6056, -0.1069, 0.1033),
}
"""By label, epsilon and delta."""
OVER_DELTAS: Mapping[float, tuple[float, float]] = {
    50: (-0.0106, 0.0260), 10: (-0.0134, 0.0282), 5: (-0.0103, 0.0236), 1: (-0.0135, 0.0278), 0.1: (-0.0593, 0.0549)}
"""By the label's epsilon: mean and standard deviation over the runs of the difference, which is a mean over the four deltas."""

FEDERATED, LOCAL, POOLED = "FedAvg", "local only", "pooled"
INTERCEPTS = "own intercepts"
"""FedAvg whose hospitals each keep an intercept."""
AS_RUN, OWN = "as FLamby", "as FLamby, own generators"
METRIC = "accuracy"
RATE, EPSILON = "learning rate", "epsilon"
BATCH, UPDATES, ROUNDS, EPOCHS = 4, 100, 15, 15
PUBLISHED_RATE = 0.001


class Plan(NamedTuple):
    """How a hospital's budget is spent. sampling_rate: of the Poisson samples, the same at all hospitals. steps: in a round."""

    sampling_rate: float
    steps: int

    @property
    def name(self) -> str:
        """As it is called in tables."""
        return f"{ROUNDS * self.steps} at {self.sampling_rate:.2g}"


AS_MANY_STEPS = Plan(4 * BATCH / 486, UPDATES)
"""FLamby's number of steps, and its batch of 4 as the mean over the hospitals, which have 486 training patients together."""


@dataclasses.dataclass(frozen=True)
class Config(cli.Common):
    """Record-level differential privacy on Fed-Heart-Disease: FLamby's curve with its true epsilon, and the honest curve."""

    seeds: int = 50
    """initialisations, PyTorch's of seeds 42, 43, ..., all in one program"""
    labels: tuple[float, ...] = (50.0, 10.0, 5.0, 1.0, 0.1)
    """which of FLamby's epsilons"""
    deltas: tuple[float, ...] = (0.1, 0.01, 0.001, 0.0001)
    """which of FLamby's deltas"""
    epsilons: tuple[float, ...] = (1.0, 3.0, 10.0)
    """budgets of the honest curve, ascending"""
    delta: float = 0.001
    """delta of the honest curve: half of 1 / 486, the number of training patients, and a fifth of 1 / 199, of the largest
    hospital"""
    sampling_rates: tuple[float, ...] = (AS_MANY_STEPS.sampling_rate, 0.25, 1.0)
    """rates of Poisson samples to choose from"""
    steps: tuple[int, ...] = (UPDATES, 20, 4)
    """steps a round that go with each of them"""
    rates: tuple[float, ...] = (0.001, 0.00316, 0.01, 0.0316, 0.1, 0.316, 1.0, 3.16)
    """learning rates to choose from"""
    validation: float = 0.25
    """share of a hospital's training patients that choices are made by"""
    tuning_seeds: int = 20
    """splits, each with its own initialisation, that choices are made by"""

    def __post_init__(self) -> None:
        at_least_one(self, "seeds", "tuning_seeds")
        unknown = [(e, d) for e in self.labels for d in self.deltas if (e, d) not in PUBLISHED]
        if unknown or not self.labels or not self.deltas:
            raise FlJaxError(
                f"FLamby has published no result for epsilon and delta {unknown[:1]}: give labels of 50, 10, 5, 1, .1 and "
                "deltas of .1, .01, .001, .0001.")
        if len(self.sampling_rates) != len(self.steps) or not self.steps:
            raise FlJaxError("Each of sampling_rates needs its number of steps a round: give equally many of both.")
        if list(self.epsilons) != sorted({*self.epsilons}) or len(self.epsilons) < 2:
            raise FlJaxError(f"epsilons must ascend, and there must be two or more, and they are {self.epsilons}.")

    @classmethod
    def quick_defaults(cls) -> "Config":
        """The two outermost labels at the smallest delta, two budgets, one plan, and fewer rates and initialisations."""
        return cls(
            quick=True, seeds=10, labels=(50.0, 0.1), deltas=(0.0001,), epsilons=(1.0, 10.0),
            sampling_rates=(AS_MANY_STEPS.sampling_rate,), steps=(AS_MANY_STEPS.steps,), rates=(0.00316, 0.01, 0.0316),
            tuning_seeds=5)

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """The labels, epsilon and delta."""
        return [(epsilon, delta) for epsilon in self.labels for delta in self.deltas]

    @property
    def plans(self) -> list[Plan]:
        """What the honest curve chooses from."""
        return [Plan(*plan) for plan in zip(self.sampling_rates, self.steps, strict=True)]

    @property
    def torch_seeds(self) -> list[int]:
        """The seeds of the runs."""
        return list(range(FIRST_SEED, FIRST_SEED + self.seeds))


def noises(label: tuple[float, float], sizes: Iterable[int]) -> list[float]:
    """FLamby's noise, in clips, at hospitals of so many training patients, that goes with a label, epsilon and delta."""
    return [opacus.noise_multiplier(*label, int(size), BATCH, EPOCHS) for size in sizes]


def trained(config: Config) -> tuple[str, ...]:
    """How hospitals train, together or alone."""
    return (FEDERATED, LOCAL) if config.quick else (FEDERATED, INTERCEPTS, LOCAL)


def private(config: Config) -> tuple[str, ...]:
    """How they train within a budget."""
    return (FEDERATED,) if config.quick else trained(config)


def labelled(epsilon: float, delta: float) -> str:
    """What the rows of a label add to the name of their arm."""
    return f", label {epsilon:g} at {delta:g}"


def budgeted(epsilon: float) -> str:
    """What the rows of a budget add to the name of their arm."""
    return f", epsilon {epsilon:g}"


def chosen(arm: str, epsilon: float | None = None) -> str:
    """The arm with what the grid chose, without differential privacy or within a budget."""
    return f"{arm}{', no DP' if epsilon is None else budgeted(epsilon)}"


def as_many_steps(epsilon: float) -> str:
    """The arm within a budget that makes as many steps as FLamby, at its learning rate."""
    return f"{FEDERATED} at .001{budgeted(epsilon)}"


def at_published_rate(arm: str) -> str:
    """The arm without differential privacy at FLamby's learning rate."""
    return f"{arm} at .001, no DP"


def half_interval(deviation: float) -> float:
    """Half of the 95 % interval of a mean over FLamby's runs."""
    return round(float(stats.t.ppf(0.975, RUNS - 1) * deviation / math.sqrt(RUNS)), 4)


# The texts of claims, by which their measurements are found.
WITHOUT_DP = "mean accuracy without DP"
POISSON_FACTOR = "least true epsilon / label, had batches been Poisson"
PASSES_FACTOR = "least true epsilon / label, batches as they are"
LOCAL_PAYS = "cost of epsilon {:g} to local only minus that to FedAvg"


def costs_at_label(epsilon: float) -> str:
    """The claim about all deltas of a label's epsilon."""
    return f"label {epsilon:g}: accuracy minus that without DP"


def costs_at(epsilon: float, delta: float) -> str:
    """The claim about one label."""
    return f"label {epsilon:g} at {delta:g}: accuracy minus that without DP"


def spends(arm: str) -> str:
    """The claim about an arm's ledger."""
    return f"ledger / budget, {arm}"


def gains(more: float, less: float) -> str:
    """The claim that more epsilon is more accuracy."""
    return f"accuracy at epsilon {more:g} minus epsilon {less:g}"


def minus_local(arm: str, epsilon: float) -> str:
    """The claim that others' patients help, within a budget."""
    return f"{arm} minus {LOCAL}, epsilon {epsilon:g}"


def cost(epsilon: float) -> str:
    """The claim about what a budget costs."""
    return f"cost of epsilon {epsilon:g}: accuracy without DP minus with it"


def claims(config: Config) -> list[Claim]:
    """What a configuration is to show."""
    return [*_published(config), *_true(), *_honest(config)]


def _published(config: Config) -> Iterator[Claim]:
    five = f"half the 95 % interval of {RUNS} published runs"
    yield Claim(WITHOUT_DP, SOURCE, WITHOUT[0], Direction.WITHIN, half_interval(WITHOUT[1]), f"{five}, of other starts", digits=4)
    whole = {*config.deltas} == {0.1, 0.01, 0.001, 0.0001}
    for epsilon in config.labels if whole else ():
        mean, deviation = OVER_DELTAS[epsilon]
        yield Claim(costs_at_label(epsilon), SOURCE, mean, Direction.WITHIN, half_interval(deviation),
                    f"{five}, each a mean over the deltas", digits=4)
    for label in config.pairs:
        if label == (0.1, 0.0001) or not whole:
            published = PUBLISHED[label]
            yield Claim(costs_at(*label), SOURCE, published.difference, Direction.WITHIN, half_interval(published.deviation),
                        five, digits=4)


def _true() -> Iterator[Claim]:
    yield Claim(
        POISSON_FACTOR, "own bar", 2.8, Direction.AT_LEAST, 0.0,
        "at the smallest hospital 1,500 steps are 12.5 times the 120 that the noise is for: epsilon grows by the root, 3.5, "
        "where noise is much, and by more where it is little; labels are by RDP, a fifth too large where noise is much", digits=1)
    yield Claim(
        PASSES_FACTOR, "own bar", 20.0, Direction.AT_LEAST, 0.0,
        "188 passes of Gaussian noise of 45 clips, two clips for a replaced record, are one of mu = .61, whose epsilon is "
        "2.13 at 1e-4: 21 times the label of .1", digits=1)


def _honest(config: Config) -> Iterator[Claim]:
    for epsilon in config.epsilons:
        for arm in (chosen(FEDERATED, epsilon), as_many_steps(epsilon)):
            yield Claim(spends(arm), "own bar", 0.995, Direction.WITHIN, 0.005,
                        "calibrated to 1 part in 1,000 from below, and the ledger counts all steps", digits=4)
    slack, reason = (0.02, "ten starts and five splits to choose by, which differ by about .02") if config.quick else (
        0.005, "a choice by few validation patients can cost this much; the order must show in the mean")
    for less, more in zip(config.epsilons[:-1], config.epsilons[1:], strict=True):
        missed = _TEST_PATIENTS if (less, more) == (3.0, 10.0) and not config.quick else ""
        yield Claim(
            gains(more, less), "own bar", 0.0, Direction.AT_LEAST, slack, reason, expected=not missed, cause=missed,
            quick=config.quick)
    first, last = config.epsilons[0], config.epsilons[-1]
    yield Claim(
        cost(last), "own bar", 0.0, Direction.WITHIN, 0.03, "about one standard error of an accuracy on the 254 test patients",
        quick=config.quick)
    if config.quick:
        return
    yield Claim(
        LOCAL_PAYS.format(first), "own bar", 0.0, Direction.AT_LEAST, 0.0,
        "the noise on a sum is the same at 30 patients as at 199, and FedAvg averages four of them")
    yield Claim(
        minus_local(FEDERATED, first), "own bar", 0.0, Direction.AT_LEAST, 0.0,
        "within a budget there is more to gain from others' patients than without one", expected=False, cause=_ONE_INTERCEPT)
    yield Claim(
        minus_local(INTERCEPTS, first), "own bar", 0.0, Direction.AT_LEAST, 0.0,
        "13 of the 14 weights are shared and averaged, and the one in which hospitals differ most is not")
