"""What fedprox_recovers states before it runs: settings, how records are simulated, arms with their grids, claims."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from experiments.common import arms, cli, rate_grid
from experiments.common.config import at_least_one
from fl_jax import algorithms, batches, data, models, training
from fl_jax.data import FederatedDataset, standardize_features
from fl_jax.errors import FlJaxError
from fl_jax.results import Claim, Direction
from fl_jax.types import Batches, FederatedAlgorithm, Model, PyTree

LOCAL, CENTRALIZED, FEDAVG, FEDPROX, SCAFFOLD = "local only", "centralized", "FedAvg", "FedProx", "SCAFFOLD"
DITTO, FEDPER, MR_MTL, TUNED = "Ditto", "FedPer", "MR-MTL", "FedAvg, fine-tuned"
PERSONAL = (DITTO, FEDPER, MR_MTL, TUNED)
RATE, STRENGTH = "learning rate", "strength"
WITH_STRENGTH = (FEDPROX, DITTO, MR_MTL)
LINEAR, NETWORK = "logistic regression", "network"
"""The models: one that cannot say that age changes what a measurement means, and one that can."""
GROUPS = ((20, 35), (35, 50), (50, 65), (65, 80), (80, 95))
"""Years of age of each site's patients; the last site takes no part in training."""
FIRST_TUNING_SEED = 1000  # the seeds that are reported are 0, 1, ...


@dataclasses.dataclass(frozen=True)
class Config(cli.Common):
    """Sites of different ages: FedAvg, FedProx, SCAFFOLD and personalised algorithms beside local-only and centralized training."""

    rounds: int = 30
    """rounds"""
    evaluate_every: int = 5
    """measure after so many rounds; the last measurement counts"""
    epochs: int = 5
    """passes over a site's records in a round"""
    batch_size: int = 20
    """records in a step"""
    models: tuple[str, ...] = (LINEAR, NETWORK)
    """logistic regression, network, or both"""
    hidden: int = 16
    """units of the network's one hidden layer"""
    patients: int = 400
    """of each site, half of them for testing, or for validation in the grid"""
    support: int = 200
    """of the unseen site's, by which it may adapt"""
    measurements: int = 8
    """features beside the age"""
    interaction: float = 0.5
    """size, a decade and a half of age from 50, of the age's part in the coefficients, against 1 of what is the same at any age"""
    rates: tuple[float, ...] = rate_grid.decades(*range(-12, 0), parts=4)
    """SGD rates to try, of arms without a strength"""
    few_rates: tuple[float, ...] = rate_grid.decades(-5, -4, -3, -2)
    """the same of FedProx, Ditto and MR-MTL"""
    strengths: tuple[float, ...] = (0.01, 0.1, 1.0)
    """proximal strengths to try with each of these"""
    seeds: int = 10
    """seeds of the results"""
    tuning_seeds: int = 3
    """seeds of the grid, which are others"""
    arms: tuple[str, ...] = (LOCAL, CENTRALIZED, FEDAVG, FEDPROX, SCAFFOLD, DITTO, FEDPER, MR_MTL, TUNED)
    """what is trained; local only, FedAvg, FedProx, SCAFFOLD and a personalised one among it. FedPer, whose head is all of it, not with
    logistic regression"""
    chosen: tuple[tuple[float, ...], ...] = ()
    """learning rate, and strength where there is one, of each arm of each model, chosen before; () tries the grid"""

    def __post_init__(self) -> None:
        at_least_one(self, "rounds", "evaluate_every", "epochs", "batch_size", "hidden", "measurements", "seeds", "tuning_seeds")
        if self.patients < 20:
            raise FlJaxError(f"patients must be at least 20, so that a site has records of each split, and is {self.patients}.")
        if not 0 <= self.support < self.patients:
            raise FlJaxError(f"support must leave some of the {self.patients} patients of the unseen site to test, and is {self.support}.")
        if len(self.rates) != len(self.few_rates) * len(self.strengths):
            raise FlJaxError("Every arm must have a grid of the same size: give as many rates as few_rates times strengths.")
        needed = {LOCAL, FEDAVG, FEDPROX, SCAFFOLD}
        if not needed <= {*self.arms} <= {*ARMS} or len({*self.arms}) < len(self.arms) or not {*self.arms} & {*PERSONAL}:
            raise FlJaxError(f"arms must be some of {'; '.join(ARMS)}, each once, with {', '.join(sorted(needed))} and a personalised one among "
                             f"them, and are {'; '.join(self.arms)}.")
        if not {*self.models} <= {LINEAR, NETWORK} or len({*self.models}) != len(self.models) or not self.models:
            raise FlJaxError(f"models must be {LINEAR}, {NETWORK} or both, and are {'; '.join(self.models)}.")
        if self.chosen and [len(point) for point in self.chosen] != [len(self.axes(arm)) for model in self.models for arm in self.arms_of(model)]:
            raise FlJaxError("chosen must have a learning rate for each arm of each model, and a strength too for FedProx, Ditto and MR-MTL.")

    @classmethod
    def quick_defaults(cls) -> "Config":
        """Four seeds, one model, five arms, with learning rates and strengths that the full form chose."""
        return cls(
            quick=True, seeds=4, evaluate_every=30, models=(LINEAR,), arms=(LOCAL, FEDAVG, FEDPROX, SCAFFOLD, DITTO),
            chosen=((0.0178,), (0.0178,), (0.0316, 1.0), (0.0178,), (0.0316, 0.1)))

    def arms_of(self, model: str) -> tuple[str, ...]:
        """The arms that a model has."""
        return tuple(arm for arm in self.arms if model == NETWORK or arm != FEDPER)

    def axes(self, arm: str) -> dict[str, tuple[float, ...]]:
        """The grid of an arm, for rate_grid."""
        return {RATE: self.few_rates, STRENGTH: self.strengths} if arm in WITH_STRENGTH else {RATE: self.rates}


def federation(config: Config, seed: int, *, tuning: bool) -> FederatedDataset:
    """Sites of one age group each, and an unseen one of the oldest. tuning: half of the records are for validation and none for testing, else
    the other way round; then there is no unseen site either."""
    rng = np.random.default_rng(seed)
    site = np.repeat(np.arange(len(GROUPS)), config.patients)
    low, high = np.array(GROUPS, np.float64)[site].T
    age = rng.uniform(low, high)
    x = rng.standard_normal((len(site), config.measurements))
    same, of_age = (w / np.linalg.norm(w) for w in rng.standard_normal((2, config.measurements)))
    log_odds = 2 * (x @ same + config.interaction * (age - 50) / 15 * (x @ of_age))
    y = (rng.uniform(size=len(site)) < 1 / (1 + np.exp(-log_odds))).astype(np.int32)
    names = [f"age {low} to {high}" for low, high in GROUPS]
    kept = site < len(GROUPS) - 1 if tuning else np.ones(len(site), bool)
    dataset = data.from_arrays(
        np.column_stack([age, x])[kept], y[kept], site[kept], name="age groups", seed=rng, validation=0.5 if tuning else 0.0,
        test=0.0 if tuning else 0.5, site_names=names[: site[kept].max() + 1], unseen=() if tuning else names[-1:], num_classes=2,
        notes=("All records are simulated.",))
    return data.with_support(standardize_features(dataset), config.support, rng)


def model_of(config: Config, name: str) -> Model:
    """Logistic regression of age and measurements, or a network with one hidden layer, normalised by LayerNorm."""
    module = models.LogisticRegression(2) if name == LINEAR else models.TabularNet(2, config.hidden, models.layer_norm)
    return models.bridge(module, jax.ShapeDtypeStruct((1, 1 + config.measurements), jnp.float32), models.softmax_cross_entropy)


class Given(NamedTuple):
    """What the arms have in common, and a point of one's grid. work: what a site does in a round."""

    model: Model
    work: Batches
    point: Mapping[str, Any]

    @property
    def sgd(self) -> optax.GradientTransformation:
        """SGD with the point's rate."""
        return optax.sgd(self.point[RATE])


ARMS: Mapping[str, Callable[[Given], FederatedAlgorithm]] = {
    LOCAL: lambda of: algorithms.local_only(of.model, of.sgd, of.work),
    CENTRALIZED: lambda of: algorithms.centralized(of.model, of.sgd, algorithms.pooled_batches(of.work)),
    FEDAVG: lambda of: algorithms.fedavg(of.model, of.sgd, of.work),
    FEDPROX: lambda of: algorithms.fedprox(of.model, of.sgd, of.work, of.point[STRENGTH]),
    SCAFFOLD: lambda of: algorithms.scaffold(of.model, of.point[RATE], of.work),
    DITTO: lambda of: algorithms.ditto(of.model, of.sgd, of.work, of.point[STRENGTH]),
    FEDPER: lambda of: algorithms.fedper(of.model, of.sgd, of.work, algorithms.layers("Dense_1")),
    MR_MTL: lambda of: algorithms.mr_mtl(of.model, of.sgd, of.work, of.point[STRENGTH]),
    TUNED: lambda of: algorithms.fedavg_tuned(of.model, of.sgd, of.work, of.work),
}


def arm_of(config: Config, model: Model, arm: str, name: str, *, own: bool = False) -> training.Arm:
    """One of ARMS, all sites in each round; centralized training makes as many steps as they make together. own: whether the
    hyper-parameters are those of several arms, by their names."""
    work = batches.epochs(config.epochs, config.batch_size)

    def build(hyper: PyTree) -> FederatedAlgorithm:
        return ARMS[arm](Given(model, work, hyper[arm] if own else hyper))

    if arm == CENTRALIZED:
        return arms.at_one_place(name, build, work)
    return arms.everyone(name, build)


class Scores(Protocol):
    """What a claim is measured on, float64[S] by seed. best: the personalised arm that is best on validation records."""

    best: str

    def minus(self, arm: str, other: str) -> npt.NDArray[np.float64]:
        """arm - other in the same seed, mean of the sites."""

    def least_gain(self) -> npt.NDArray[np.float64]:
        """What the best personalised arm gains over local training where it gains least."""


Law = Callable[[Mapping[str, Scores]], npt.NDArray[np.float64]]
"""What was measured with each model -> one value a seed."""


def claims(config: Config) -> list[Claim]:
    """What the configuration is to show."""
    return [claim for claim, _ in stated(config)]


def stated(config: Config) -> Iterator[tuple[Claim, Law]]:
    """The claims, each with the function that measures it, one value a seed."""
    tolerance, reason = (0.01, "four seeds, whose mean differences vary by .01") if config.quick else (
        0.002, "a sign; what two arms that tie choose on their grids makes .002")

    def claim(text: str, source: str, direction: Direction, allowed: float = tolerance, why: str = reason) -> Claim:
        return Claim(f"{text}, AUROC", source, 0.0, direction, allowed, why, quick=config.quick)

    for model in config.models:
        if model == LINEAR:
            yield claim(
                f"FedAvg minus local only, {model}, mean of the sites", "arXiv 2002.04758 (Yu et al.: sites that gain nothing), section 1",
                Direction.AT_MOST), _minus(model, FEDAVG, LOCAL)
        yield claim(
            f"FedProx minus FedAvg, {model}, mean of the sites", "arXiv 1812.06127 (FedProx), section 5.2", Direction.AT_LEAST,
        ), _minus(model, FEDPROX, FEDAVG)
        yield claim(
            f"SCAFFOLD minus FedAvg, {model}, mean of the sites", "arXiv 1910.06378 (SCAFFOLD), section 7", Direction.AT_LEAST,
        ), _minus(model, SCAFFOLD, FEDAVG)
        yield claim(
            f"best personalised minus FedAvg, {model}, mean of the sites", "arXiv 2012.04221 (Ditto), section 4", Direction.AT_LEAST,
        ), _minus(model, None, FEDAVG)
        yield claim(
            f"best personalised minus local only, {model}, the site of least gain", "own bar", Direction.AT_LEAST, max(tolerance, 0.005),
            reason if config.quick else "the least of four sites' mean gains: noise of .005 a site takes it below 0",
        ), _least_gain(model)


def _minus(model: str, arm: str | None, other: str) -> Law:
    """arm: None for the personalised one that is best on validation records."""
    return lambda found: found[model].minus(arm or found[model].best, other)


def _least_gain(model: str) -> Law:
    return lambda found: found[model].least_gain()
