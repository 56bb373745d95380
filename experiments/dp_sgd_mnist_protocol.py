"""What experiments/dp_sgd_mnist.py states before it runs: settings, published numbers, claims; epsilon by both conversions."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import dp_accounting
import numpy as np
import numpy.typing as npt
import pandas as pd
from dp_accounting import rdp

from experiments.common import cli
from experiments.common.config import at_least_one
from fl_jax.errors import FlJaxError
from fl_jax.privacy import Accountant, PrivacyLedger
from fl_jax.results import Claim, Direction, last_round, select

RECORDS = 60_000
"""Training images, by which the published steps and rate are counted."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One training, from the first weights to the last."""

    noise: float | None
    """noise multiplier, in clips; None trains with the plain gradient, neither clipped nor noised"""
    rate: float
    """learning rate of SGD"""
    clip: float
    """bound on the L2 norm of an image's gradient"""
    epochs: int
    """passes over the training images, in expectation; 0 leaves the setting out"""
    steps_per_round: int
    """a divisor of the number of steps: what the one site does in a round"""
    evaluate_every: int
    """measure after so many rounds"""
    seeds: int
    """how many runs; a seed draws initial weights, samples and noise"""

    def __post_init__(self) -> None:
        at_least_one(self, "steps_per_round", "evaluate_every", "seeds")
        if self.noise is not None and not 0 < self.noise < math.inf:
            raise FlJaxError(f"noise must be above 0 and finite, or None for the plain gradient, and is {self.noise}.")


@dataclasses.dataclass(frozen=True)
class Config(cli.Common):
    """DP-SGD on MNIST at one place: test accuracy and epsilon of the settings that TensorFlow Privacy's tutorial publishes."""

    batch: int = 256
    """images that a step expects; each is in it by a coin of probability batch / (number of images)"""
    delta: float = 1e-5
    """epsilon is stated at this delta"""
    microbatch: int = 16
    """gradients of so many images are in memory at a time"""
    failure: float = 1e-15
    """probability that more images come up in a private step than it has room for, which delta pays"""
    plain_failure: float = 1e-3
    """the same without privacy, where nothing pays, and a step costs as much as it has room for"""
    strict: Setting = Setting(1.3, 0.25, 1.5, 15, 185, 1, 4)
    """the least epsilon"""
    default: Setting = Setting(1.1, 0.15, 1.0, 60, 178, 1, 4)
    """the tutorial's default"""
    loose: Setting = Setting(0.7, 0.25, 1.5, 45, 2, 117, 4)
    """the largest epsilon; its 10,546 steps are twice a prime"""
    plain: Setting = Setting(None, 0.1, 1.0, 20, 109, 2, 2)
    """what the tutorial publishes without privacy"""
    strict_plain: Setting = Setting(None, 0.25, 1.5, 15, 185, 1, 2)
    """the strict setting without noise and clip"""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.microbatch < 1:
            raise FlJaxError(f"batch and microbatch must be 1 or more, and are {self.batch} and {self.microbatch}.")
        if not 0 < self.delta < 1:
            raise FlJaxError(f"delta must lie between 0 and 1, and is {self.delta}.")

    @classmethod
    def quick_defaults(cls) -> "Config":
        """The tutorial's default for two epochs, whose accuracy and epsilon it publishes too."""
        full = cls()
        two_epochs = dataclasses.replace(full.default, epochs=2, steps_per_round=117, evaluate_every=2, seeds=2)
        left_out = ("strict", "loose", "plain", "strict_plain")
        return cls(
            quick=True, default=two_epochs, **{field: dataclasses.replace(getattr(full, field), epochs=0) for field in left_out})


class Published(NamedTuple):
    """What is published of a setting. accuracy: of test images after the last step. old, today: epsilon at delta 1e-5 by each
    conversion; None where there is none. early: of one run at an early epoch."""

    accuracy: float | None = None
    old: float | None = None
    today: float | None = None
    early: bool = False


NOTHING = Published()


class Problem(NamedTuple):
    """A setting and what is published of it in the form `of`. field: of Config."""

    field: str
    of: Setting
    published: Published = NOTHING

    def setting(self, config: Config) -> Setting:
        """What a configuration makes of it."""
        setting: Setting = getattr(config, self.field)
        return setting

    def name(self, config: Config) -> str:
        """Of the arm, in tables."""
        setting = self.setting(config)
        epochs = f"{setting.epochs} epoch{'s' * (setting.epochs != 1)}"
        if setting.noise is None:
            return f"no privacy, rate {short(setting.rate)}, {epochs}"
        return f"noise {short(setting.noise)}, {epochs}"

    def known(self, config: Config) -> Published:
        """What is published of what a configuration makes of it: whatever a round is, and however many seeds there are."""
        setting = self.setting(config)
        one, other = ((each.noise, each.rate, each.clip) for each in (setting, self.of))
        same = one == other and config.batch == Config.batch
        if same and setting.epochs == self.of.epochs:
            found = self.published
        elif same and self.field == "default" and setting.epochs in EARLY:
            found = EARLY[setting.epochs]
        else:
            return NOTHING
        return found if config.delta == Config.delta else found._replace(old=None, today=None)


_FULL = Config()
EARLY: Mapping[int, Published] = {1: Published(0.774, 1.03, early=True), 2: Published(0.877, 1.11, early=True)}
"""Of the default setting after so many epochs."""
PROBLEMS = (
    Problem("strict", _FULL.strict, Published(0.950, 1.19, 0.954)),
    Problem("default", _FULL.default, Published(0.966, 3.01, 2.597)),
    Problem("loose", _FULL.loose, Published(0.970, 7.10, 6.319)),
    Problem("plain", _FULL.plain, Published(0.990)),
    Problem("strict_plain", _FULL.strict_plain),
)
README = "TensorFlow Privacy, tutorials/README.md"
POINT = 0.01
_OWN_LEDGER = "of the run's own ledger: three decimals, and the delta that a batch's capacity costs is less"
_ONE_RUN = (
    "one published run, on a slope of ten points an epoch, from weights that are not published: half an epoch to either side. "
    "Without noise and clip it would be above it")
_MEAN_OF_RUNS = (
    "half a point: published to a tenth, the mean of 10 runs whose standard deviation is below .3, which gives a mean of few "
    "seeds a standard error of .15 to .2; initial weights are not published")


def short(value: float) -> str:
    """A setting's number in a name: 1.3, .7."""
    return f"{value:g}".removeprefix("0") or "0"


def problems(config: Config) -> list[Problem]:
    """Those that are not left out."""
    return [problem for problem in PROBLEMS if problem.setting(config).epochs > 0]


def rounds_of(setting: Setting, config: Config, num_records: int = RECORDS) -> int:
    """In how many rounds a setting makes its steps. Raises FlJaxError where these are not whole rounds."""
    steps = steps_of(setting, config, num_records)
    if steps < 1 or steps % setting.steps_per_round:
        raise FlJaxError(f"{setting.epochs} epochs of {num_records} images are {steps} steps, which are not whole rounds of "
                         f"{setting.steps_per_round}: give a divisor.")
    return steps // setting.steps_per_round


def steps_of(setting: Setting, config: Config, num_records: int = RECORDS) -> int:
    """As the published ones are counted: 3,515, 14,062 and 10,546."""
    return setting.epochs * num_records // config.batch


def renyi(noise: float, rate: float, steps: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Orders and Renyi divergences, float64[A], of so many steps of DP-SGD on Poisson samples: by dp_accounting alone, at its own
    orders, with nothing of a ledger."""
    accountant = rdp.RdpAccountant()
    accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)), steps)
    return np.asarray(accountant.orders, np.float64), np.asarray(accountant.rdp, np.float64)


def old_conversion(orders: npt.NDArray[np.float64], divergences: npt.NDArray[np.float64], delta: float) -> float:
    """That of the published numbers: the least of divergence + log(1 / delta) / (order - 1) (Mironov 2017, proposition 3)."""
    usable = (orders > 1) & np.isfinite(divergences)
    return float(np.min(divergences[usable] + math.log(1 / delta) / (orders[usable] - 1)))


def todays_conversion(orders: npt.NDArray[np.float64], divergences: npt.NDArray[np.float64], delta: float) -> float:
    """dp_accounting's: proposition 12 of Canonne, Kamath & Steinke 2020, at the order where it is least."""
    return float(rdp.compute_epsilon(orders, divergences, delta)[0])


class Outcome(NamedTuple):
    """What came of a problem. name: of its arm. rate: the probability of the coins. rows: the metrics of its runs. ledgers: what
    each run has spent, () without privacy."""

    problem: Problem
    setting: Setting
    name: str
    rate: float
    rows: pd.DataFrame
    ledgers: tuple[PrivacyLedger, ...]

    def accuracy(self) -> npt.NDArray[np.float64]:
        """float64[S]: of all test images after the last round, seeds ascending."""
        rows = last_round(select(self.rows, "accuracy", "test", "all", [self.name]))
        return rows.sort_values("seed")["value"].to_numpy(np.float64)

    def steps(self) -> npt.NDArray[np.int64]:
        """int64[S]: the steps that each run made, as it counted them, seeds ascending."""
        return select(self.rows, "steps", "round", "all", [self.name]).groupby("seed")["value"].sum().to_numpy(np.int64)

    def old(self, config: Config) -> npt.NDArray[np.float64]:
        """float64[S]: epsilon by the old conversion of the steps that each run made."""
        assert self.setting.noise is not None
        steps, where = np.unique(self.steps(), return_inverse=True)
        return np.array([old_conversion(*renyi(self.setting.noise, self.rate, int(n)), config.delta) for n in steps])[where]

    def spent(self, config: Config, accountant: Accountant = Accountant.RDP) -> npt.NDArray[np.float64]:
        """float64[S]: epsilon of each run's own ledger, by RDP under today's conversion."""
        return np.array([ledger.epsilon(config.delta, accountant) for ledger in self.ledgers])


Law = Callable[[Mapping[str, Outcome]], npt.NDArray[np.float64]]


def claims(config: Config) -> list[Claim]:
    """What the configuration is to show."""
    return [claim for claim, _ in stated(config)]


def stated(config: Config) -> Iterator[tuple[Claim, Law]]:
    """Each claim with the function that measures it on the outcomes, by the problem's field, one value a seed."""
    for problem in problems(config):
        yield from _stated(problem, config)


def _stated(problem: Problem, config: Config) -> Iterator[tuple[Claim, Law]]:
    field, name, setting, known = problem.field, problem.name(config), problem.setting(config), problem.known(config)
    quick, source = known.early, f"{README}, {'expected output' if known.early else 'table'}"
    if known.accuracy is not None:
        yield Claim(
            f"{name}: test accuracy", source, known.accuracy, Direction.WITHIN, POINT * (5 if quick else 0.5),
            _ONE_RUN if quick else _MEAN_OF_RUNS, quick=quick, digits=4), lambda outcomes: outcomes[field].accuracy()
    if known.old is None or setting.noise is None:
        return
    today = known.today
    if today is None:
        today = todays_conversion(*renyi(setting.noise, config.batch / RECORDS, steps_of(setting, config)), config.delta)
    yield Claim(
        f"{name}: ε, today's conversion", "dp-accounting 0.6.0, RDP at its default orders", today, Direction.WITHIN, 1e-3 * today,
        _OWN_LEDGER, quick=quick, digits=4), lambda outcomes: outcomes[field].spent(config)
    yield Claim(
        f"{name}: ε, old conversion", source, known.old, Direction.WITHIN, 0.005, "two decimals are published", quick=quick,
        digits=4), lambda outcomes: outcomes[field].old(config)
