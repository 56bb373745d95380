"""What experiments/niid_bench.py states before it runs: settings, how images are dealt, the arms, published numbers, claims."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import optax

from experiments.common import arms, cli, mnist
from experiments.common.config import at_least_one
from fl_jax import algorithms, batches, data, models, training
from fl_jax.core import Engine
from fl_jax.data import FederatedDataset
from fl_jax.data.partition import spread_log_odds
from fl_jax.errors import FlJaxError
from fl_jax.results import Claim, Direction
from fl_jax.transforms import add_term
from fl_jax.types import Batches, FederatedAlgorithm, Model

FEDAVG, SCAFFOLD, FEDPROX, FEDNOVA, LOCAL, CENTRAL = "FedAvg", "SCAFFOLD", "FedProx", "FedNova", "local only", "centralized"
IMAGES: Mapping[str, mnist.Load] = mnist.IMAGES | {"pneumoniamnist": data.pneumonia_mnist}
NAMES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "pneumoniamnist": "PneumoniaMNIST"}
PUBLISHED_ROUNDS = 50
SHORT_ROUNDS, SHORT_SHARE = 5, 0.25
ON_GPU = ("--table", "--rounds", f"{PUBLISHED_ROUNDS}", "--share", "1", "--seeds", "3", "--lanes", "10")
"""The published form, as arguments."""


class Cell(NamedTuple):
    """A row of the published table: which images, and how they are dealt (keys of IMAGES and PARTITIONS)."""

    images: str
    partition: str


@dataclasses.dataclass(frozen=True)
class Config(cli.Common):
    """FedAvg, SCAFFOLD, FedProx and FedNova on images that ten silos hold with label skew, as NIID-Bench compares them."""

    table: bool = False
    """the four published rows that are claimed, whatever images and partition say"""
    images: Literal["fashion_mnist", "mnist", "pneumoniamnist"] = "fashion_mnist"
    """which images"""
    partition: Literal[
        "dirichlet", "iid", "classes", "dirichlet_per_client", "shards", "case_mix", "sizes_dirichlet", "sizes_lognormal"] = "dirichlet"
    """how they are dealt, see fl_jax.data.partition: dirichlet is by class; the last two differ in size alone"""
    alpha: float = 0.5
    """of the partitions with a Dirichlet distribution"""
    classes: int = 2
    """classes, or shards of the images sorted by class, of a client"""
    sigma: float = 1.0
    """of sizes_lognormal: standard deviation of the log size"""
    log_odds: float = 1.0
    """of case_mix, for images of two classes: log-odds are spread over plus and minus this"""
    clients: int = 10
    """clients, all of them in every round"""
    share: float = SHORT_SHARE
    """of the training images, drawn by chance; all of them in the published form"""
    rounds: int = SHORT_ROUNDS
    """rounds; 50 in the published form"""
    evaluate_every: int = 1
    """measure after so many rounds; the best measurement counts, as published"""
    seeds: int = 3
    """seeds; each draws partition and initial weights anew"""
    epochs: int = 10
    """passes of a client over its images in a round"""
    batch_size: int = 64
    """images in a step"""
    rate: float = 0.01
    """learning rate of the clients' SGD"""
    momentum: float = 0.9
    """of the clients' SGD, from 0 in every round"""
    weight_decay: float = 1e-5
    """of the clients' SGD"""
    mu: float = 0.01
    """FedProx's"""
    arms: tuple[str, ...] = (FEDAVG, SCAFFOLD, FEDPROX, FEDNOVA, LOCAL, CENTRAL)
    """what is trained; FedAvg among it"""
    lanes: int = 1
    """clients that step side by side on a device: 1 is fastest on a CPU; what comes of it is the same"""

    def __post_init__(self) -> None:
        at_least_one(self, "classes", "clients", "rounds", "evaluate_every", "seeds", "epochs", "batch_size", "lanes")
        if not 0 < self.share <= 1:
            raise FlJaxError(f"share must be above 0 and at most 1, and is {self.share}.")
        if not 0 <= self.momentum < 1:
            raise FlJaxError(f"momentum must be at least 0 and below 1, and is {self.momentum}.")
        if FEDAVG not in self.arms or len({*self.arms}) < len(self.arms) or not {*self.arms} <= {*ARMS}:
            raise FlJaxError(f"arms must be some of {'; '.join(ARMS)}, each once and FedAvg among them, and are {'; '.join(self.arms)}.")

    @classmethod
    def quick_defaults(cls) -> "Config":
        """A fortieth of MNIST, four rounds, measured at the last, three arms."""
        return cls(quick=True, images="mnist", share=0.025, rounds=4, evaluate_every=4, arms=(FEDAVG, SCAFFOLD, LOCAL))

    @property
    def cells(self) -> tuple[Cell, ...]:
        """What is run, a row of the table each."""
        return tuple(PUBLISHED) if self.table else (Cell(self.images, self.partition),)

    @property
    def is_published(self) -> bool:
        """Whether its accuracies are those of the published table: all is as published but seeds, arms and the choice of cells."""
        free = {"quick", "out", "resume", "devices", "tensorboard", "table", "images", "partition", "rounds", "share", "seeds", "arms", "lanes"}
        fields = [field for field in dataclasses.fields(self) if field.name not in free]
        return (not self.quick and self.rounds == PUBLISHED_ROUNDS and self.share == 1
                and all(getattr(self, field.name) == field.default for field in fields))


class Deal(NamedTuple):
    """A way to deal images. name: for str.format with the configuration. deal: (config, rng, labels) -> client of each image."""

    name: str
    deal: Callable[[Config, np.random.Generator, npt.NDArray[np.int32]], npt.NDArray[np.int64]]


PARTITIONS: Mapping[str, Deal] = {
    "iid": Deal("IID", lambda of, rng, y: data.iid(rng, len(y), of.clients)),
    "dirichlet": Deal("Dir({0.alpha:g})", lambda of, rng, y: data.dirichlet_per_class(rng, y, of.clients, of.alpha)),
    "classes": Deal("{0.classes} classes", lambda of, rng, y: data.classes_per_client(rng, y, of.clients, of.classes)),
    "dirichlet_per_client": Deal(
        "Dir({0.alpha:g}) per client", lambda of, rng, y: data.dirichlet_per_client(rng, y, of.clients, of.alpha)),
    "shards": Deal("{0.classes} shards", lambda of, rng, y: data.shards(rng, y, of.clients, of.classes)),
    "case_mix": Deal("case mix {0.log_odds:g}", lambda of, rng, y: data.case_mix(
        rng, y, np.bincount(np.arange(len(y)) % of.clients), spread_log_odds(of.log_odds, of.clients))),
    "sizes_dirichlet": Deal("sizes Dir({0.alpha:g})", lambda of, rng, y: data.quantity_dirichlet(rng, len(y), of.clients, of.alpha)),
    "sizes_lognormal": Deal(
        "sizes lognormal({0.sigma:g})", lambda of, rng, y: data.quantity_lognormal(rng, len(y), of.clients, of.sigma)),
}


def label(config: Config, cell: Cell) -> str:
    """A cell as tables call it, e.g. "Fashion-MNIST, Dir(0.5)"."""
    return f"{NAMES[cell.images]}, {PARTITIONS[cell.partition].name.format(config)}"


def federation(config: Config, cell: Cell, seed: int, load: mnist.Load) -> FederatedDataset:
    """The training images at the clients; the official test set dealt to them evenly, by chance, so that it is together the metrics' "all".

    A model of a client's own is thus tested on a random part of it.
    """
    count = round(config.share * len(load("train").y))
    return mnist.to_measure(mnist.some(load, count, seed), partition(config, cell), seed)


def partition(config: Config, cell: Cell) -> mnist.Partition:
    """How a cell's images are dealt."""
    return lambda rng, labels: PARTITIONS[cell.partition].deal(config, rng, labels)


class Given(NamedTuple):
    """What the arms have in common. work: what a client does in a round."""

    config: Config
    model: Model
    work: Batches
    engine: Engine

    def sgd(self) -> optax.GradientTransformation:
        """The clients' optimizer."""
        of = self.config
        return optax.chain(optax.add_decayed_weights(of.weight_decay), optax.sgd(of.rate, of.momentum))

    def corrected_sgd(self) -> optax.GradientTransformation:
        """The same for SCAFFOLD, whose correction the published code adds to the step, after the momentum."""
        of = self.config
        return optax.chain(
            optax.add_decayed_weights(of.weight_decay), optax.trace(of.momentum), add_term(), optax.scale_by_learning_rate(of.rate))


ARMS: Mapping[str, Callable[[Given], FederatedAlgorithm]] = {
    FEDAVG: lambda of: algorithms.fedavg(of.model, of.sgd(), of.work, engine=of.engine),
    SCAFFOLD: lambda of: algorithms.scaffold(of.model, of.config.rate, of.work, optimizer=of.corrected_sgd(), engine=of.engine),
    FEDPROX: lambda of: algorithms.fedprox(of.model, of.sgd(), of.work, of.config.mu, engine=of.engine),
    FEDNOVA: lambda of: algorithms.fednova(
        of.model, of.config.rate, of.work, momentum=of.config.momentum, optimizer=of.sgd(), engine=of.engine),
    LOCAL: lambda of: algorithms.local_only(of.model, of.sgd(), of.work, engine=of.engine),
    CENTRAL: lambda of: algorithms.centralized(of.model, of.sgd(), algorithms.pooled_batches(of.work)),
}


def network(num_classes: int) -> Model:
    """The published CNN, on pixels in [0, 1]."""
    return mnist.classifier(models.NIIDBenchCNN(num_classes))


def arm_of(name: str, config: Config, model: Model, cell: Cell) -> training.Arm:
    """One of ARMS in a cell, all clients in each round, weighted by their images; centralized training makes as many steps as they make
    together."""
    work = batches.epochs(config.epochs, config.batch_size)
    given, called = Given(config, model, work, Engine(config.lanes)), f"{name}, {label(config, cell)}"
    if name == CENTRAL:
        return arms.at_one_place(called, lambda hyper: ARMS[name](given), work)
    return arms.everyone(called, lambda hyper: ARMS[name](given))


FEDERATED = (FEDAVG, SCAFFOLD, FEDPROX, FEDNOVA)
PUBLISHED: Mapping[Cell, Mapping[str, float]] = {
    Cell(images, partition): dict(zip(FEDERATED, accuracies, strict=True)) for images, partition, accuracies in (
        ("mnist", "dirichlet", (0.9889, 0.9907, 0.9902, 0.9803)), ("mnist", "classes", (0.9686, 0.9692, 0.9685, 0.9665)),
        ("fashion_mnist", "iid", (0.8923, 0.8933, 0.8942, 0.8936)), ("fashion_mnist", "dirichlet", (0.8809, 0.8844, 0.8815, 0.8822)))}
"""Test accuracy, the best of 50 rounds, by cell and arm."""
SOURCE = "arXiv 2102.02079, Table III, as reproduced by Flower's niid_bench"
TOLERANCE = {"iid": 0.01, "dirichlet": 0.01, "classes": 0.03}
NOT_PUBLISHED = f"{PUBLISHED_ROUNDS} rounds of all rows are a GPU's work: give {' '.join(ON_GPU)}"


class Accuracies(Protocol):
    """What a claim is measured on, float64[S] by seed."""

    def values(self, cell: Cell, arm: str) -> npt.NDArray[np.float64]:
        """The test accuracy of an arm."""

    def difference(self, cell: Cell, arm: str, other: str) -> npt.NDArray[np.float64]:
        """arm - other in the same seed."""


Law = Callable[[Accuracies], npt.NDArray[np.float64]]


class Bar(NamedTuple):
    """Our own: what an arm is to reach at least, or to have more than another one, and why."""

    arm: str
    other: str
    bar: float
    reason: str


_TWO_DEALS = "images held back from the training images of two other deals, seeds 1000 and 1001, have {}; "
_EARLY = "deals differ by .02 so early"
SHORT = (
    Bar(FEDAVG, "", 0.78, _TWO_DEALS.format(".821 and .818") + _EARLY),
    Bar(SCAFFOLD, "", 0.80, _TWO_DEALS.format(".829 and .842") + _EARLY),
    Bar(FEDPROX, "", 0.78, _TWO_DEALS.format(".820 and .814") + _EARLY),
    Bar(FEDNOVA, "", 0.77, _TWO_DEALS.format(".826 and .811") + _EARLY),
    Bar(SCAFFOLD, FEDAVG, 0.0, _TWO_DEALS.format(".009 and .025") + "the published difference is .0035 after 50 rounds"),
    Bar(FEDAVG, LOCAL, 0.15, _TWO_DEALS.format(".261 and .242") + "a client lacks classes"))
"""Of the full form without arguments."""
QUICK = (
    Bar(FEDAVG, "", 0.62, _TWO_DEALS.format(".727 and .826") + "rounds and deals differ by .1 so early"),
    Bar(SCAFFOLD, "", 0.68, _TWO_DEALS.format(".781 and .852") + "rounds and deals differ by .1 so early"),
    Bar(SCAFFOLD, FEDAVG, 0.0, _TWO_DEALS.format(".055 and .026") + "without its correction SCAFFOLD is FedAvg"),
    Bar(FEDAVG, LOCAL, 0.05, _TWO_DEALS.format(".223 and .306") + "a client lacks classes"))
"""Of the quick form."""


def claims(config: Config) -> list[Claim]:
    """What the configuration is to show, and what is published beyond it."""
    return [*(claim for claim, _ in stated(config)), *unmeasured(config)]


def unmeasured(config: Config) -> list[Claim]:
    """The published claims that the configuration does not measure; the quick form does not speak of them."""
    measured = {claim.claim for claim, _ in stated(config)}
    return [] if config.quick else [
        claim for cell in PUBLISHED for claim, _ in _published(Config(), cell, FEDERATED) if claim.claim not in measured]


def stated(config: Config) -> Iterator[tuple[Claim, Law]]:
    """The claims that the configuration measures, each with the function that does, one value a seed."""
    for cell in config.cells:
        if config.is_published and cell in PUBLISHED:
            yield from _published(config, cell, config.arms)
        else:
            yield from _own(config, cell)


def _published(config: Config, cell: Cell, arms: tuple[str, ...]) -> Iterator[tuple[Claim, Law]]:
    why = {
        0.01: "deals differ by up to .0045 there (standard deviation of three), and initial weights and the last batch of an epoch differ",
        0.03: "which clients share a class decides: the spread of three deals is .005 there and 2.5 points on Fashion-MNIST"}
    tolerance = TOLERANCE[cell.partition]
    for arm in arms:
        if arm in PUBLISHED[cell]:
            yield Claim(
                f"{arm}, {label(config, cell)}, {PUBLISHED_ROUNDS} rounds", SOURCE, PUBLISHED[cell][arm], Direction.WITHIN, tolerance,
                why[tolerance], digits=4), _accuracy(cell, arm)


def _own(config: Config, cell: Cell) -> Iterator[tuple[Claim, Law]]:
    """Bars of our own: of the quick form and of the full one, as they are without arguments but for seeds and arms."""
    usual = Config.quick_defaults() if config.quick else Config()
    as_usual = dataclasses.replace(config, **{name: getattr(usual, name) for name in ("out", "resume", "devices", "tensorboard", "seeds", "arms", "lanes")})
    for arm, other, bar, reason in (QUICK if config.quick else SHORT) if as_usual == usual else ():
        if {arm, other or arm} <= {*config.arms}:
            what = f"{arm} minus {other}" if other else arm
            yield Claim(
                f"{what}, {label(config, cell)}, {config.rounds} rounds", "our own bar", bar, Direction.AT_LEAST, 0.0, reason,
                quick=config.quick), _difference(cell, arm, other) if other else _accuracy(cell, arm)


def _accuracy(cell: Cell, arm: str) -> Law:
    return lambda measured: measured.values(cell, arm)


def _difference(cell: Cell, arm: str, other: str) -> Law:
    return lambda measured: measured.difference(cell, arm, other)
