"""Where adaptive server optimizers beat FedAvg, and where they do not: Fashion-MNIST, with label skew and without.

Reddi et al. 2021, "Adaptive federated optimization" (arXiv 2003.00295): FedAvg with an SGD server (both learning rates tuned),
FedAvgM, FedAdagrad, FedAdam and FedYogi, with the paper's momentum .9, beta2 .99 and tau .001, in the shape of its CIFAR-10
federation: 500 clients of Dir(.1) over labels (Hsu et al. 2019, arXiv 1909.06335), 10 of them a round, one epoch in batches of
20. Beside it the same clients without skew, and plain averaging (server rate 1).

    python -m experiments.server_optimizers            # Dir(.1) and IID
    python -m experiments.server_optimizers --quick    # Dir(.1), a small grid, fewer rounds and units

Every method tries equally many pairs of client and server rate, on federations of their own that hold back a tenth of each
client's images; a pair is chosen by the accuracy on these in the last fifth of the rounds, and those federations have no test
images. What is reported is the accuracy on the official test set in the last fifth of the rounds, of fresh seeds, each with its
own partition, initial weights and cohorts, which the methods share. All points of a grid are rows of one program a method.

2 CPU cores: 20 minutes of processor time in full, quick 47 s, most of it compilation; 3.7 GB of memory. Expected, test accuracy with
Dir(.1) / without skew: FedAvg .718 / .836 (best server rate: 1 in both), FedAvgM .728 / .856, FedAdagrad .758 / .846, FedAdam .730 / .859,
FedYogi .742 / .859. With skew only FedAdagrad is clearly above FedAvg (+.039), the others by .01 to .02 with intervals that reach below
0; without skew all are, by .011 to .024, since they train faster. Of the chosen rates one is on the edge of its grid, FedAvgM's client
rate without skew, .0316; with .01 no server rate of the grid is better there (.861 against .862 on validation images).
Data: `python -m fl_jax.data prepare fashion_mnist`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
import pandas as pd

from experiments import server_optimizers_report
from experiments.common import cli, mnist, rate_grid
from experiments.common.config import at_least_one
from experiments.common.reproduction import Reproduction
from experiments.server_optimizers_report import CLIENT, FEDAVG, IID, PLAIN, SERVER, skewed
from fl_jax import algorithms, batches, data, models, sampling, sweep, training
from fl_jax.data import FederatedDataset
from fl_jax.errors import FlJaxError
from fl_jax.metrics import CLASSIFICATION
from fl_jax.results import RunFolder
from fl_jax.types import Array, Batches, FederatedAlgorithm, Model, PyTree

FIRST_TUNING_SEED = 1000  # the seeds that are reported are 0, 1, ...
CHUNK = 500

Build = Callable[[Model, optax.GradientTransformation, Batches, Array], FederatedAlgorithm]

METHODS: Mapping[str, Build] = {
    FEDAVG: lambda model, client, work, rate: algorithms.fedavg(model, client, work, server=optax.sgd(rate)),
    "FedAvgM": lambda model, client, work, rate: algorithms.fedavgm(model, client, work, server_learning_rate=rate, momentum=0.9),
    "FedAdagrad": lambda model, client, work, rate: algorithms.fedadagrad(model, client, work, server_learning_rate=rate),
    "FedAdam": lambda model, client, work, rate: algorithms.fedadam(model, client, work, server_learning_rate=rate),
    "FedYogi": lambda model, client, work, rate: algorithms.fedyogi(model, client, work, server_learning_rate=rate),
}


@dataclasses.dataclass(frozen=True)
class Config(cli.Common):
    """Adaptive server optimizers, momentum and FedAvg, their two learning rates tuned alike, with label skew and without."""

    images: Literal["fashion_mnist", "mnist"] = "fashion_mnist"
    """which images"""
    clients: int = 500
    """clients that share the training images"""
    alpha: float = 0.1
    """of the Dirichlet distribution of a client's labels"""
    iid: bool = True
    """also clients without skew"""
    cohort: int = 10
    """clients in a round"""
    batch_size: int = 20
    """images in a step of a client's one epoch"""
    hidden: int = 200
    """units of each of the network's two hidden layers"""
    rounds: int = 150
    """rounds"""
    evaluate_every: int = 5
    """measure after so many rounds"""
    last: float = 0.2
    """the share of the rounds, the last ones, whose mean accuracy counts"""
    methods: tuple[str, ...] = tuple(METHODS)
    """which of FedAvg, FedAvgM, FedAdagrad, FedAdam and FedYogi; FedAvg among them"""
    seeds: int = 5
    """seeds of the results"""
    tuning_seeds: int = 1
    """seeds of the grid, which are others; of one, the best few pairs are told apart by its cohorts' noise"""
    validation: float = 0.1
    """share of a client's images that the grid is judged by"""
    client_rates: tuple[float, ...] = rate_grid.decades(-3, -2, -1, 0)
    """SGD rates of the clients to try, with every method"""
    fedavg_rates: tuple[float, ...] = rate_grid.decades(-1, 0, 1, 2)
    """server rates to try; 1, which is plain averaging, among them"""
    fedavgm_rates: tuple[float, ...] = rate_grid.decades(-2, -1, 0, 1)
    """the same of FedAvgM, whose momentum multiplies a rate by 10 in the long run"""
    fedadagrad_rates: tuple[float, ...] = rate_grid.decades(-5, -4, -3, -2)
    """the same of FedAdagrad"""
    fedadam_rates: tuple[float, ...] = rate_grid.decades(-6, -5, -4, -3)
    """the same of FedAdam"""
    fedyogi_rates: tuple[float, ...] = rate_grid.decades(-6, -5, -4, -3)
    """the same of FedYogi"""
    target: float = 0.7
    """the test accuracy to which rounds are counted"""

    def __post_init__(self) -> None:
        at_least_one(self, "clients", "cohort", "batch_size", "hidden", "rounds", "evaluate_every", "seeds", "tuning_seeds")
        for name in ("last", "validation", "target"):
            if not 0 < getattr(self, name) < 1:
                raise FlJaxError(f"{name} must be between 0 and 1, and is {getattr(self, name)}.")
        if FEDAVG not in self.methods or len({*self.methods}) < len(self.methods) or not {*self.methods} <= {*METHODS}:
            known = ", ".join(METHODS)
            raise FlJaxError(f"methods must be some of {known}, FedAvg among them, each once, and are {self.methods}.")
        sizes = {method: len(rate_grid.points(self.axes(method))) for method in self.methods}
        if len({*sizes.values()}) > 1:
            raise FlJaxError(
                f"Every method must have a grid of the same size, but these have {sizes}: give equally many server rates.")
        if 1.0 not in self.fedavg_rates:
            raise FlJaxError(f"fedavg_rates must have 1, which is plain averaging, and are {self.fedavg_rates}.")

    @classmethod
    def quick_defaults(cls) -> "Config":
        """Two rates of each, a smaller network, a fifth of the rounds; no clients without skew, no FedYogi, FedAdam's like."""
        return cls(
            quick=True, iid=False, rounds=30, seeds=3, hidden=50, methods=(FEDAVG, "FedAvgM", "FedAdagrad", "FedAdam"),
            client_rates=rate_grid.decades(-3, -2), fedavg_rates=rate_grid.decades(-1, 0), fedavgm_rates=rate_grid.decades(-2, -1),
            fedadagrad_rates=rate_grid.decades(-4, -3), fedadam_rates=rate_grid.decades(-5, -4))

    def axes(self, method: str) -> dict[str, tuple[float, ...]]:
        """The grid of a method, for rate_grid."""
        return {CLIENT: self.client_rates, SERVER: getattr(self, f"{method.lower()}_rates")}

    @property
    def partitions(self) -> dict[str, mnist.Partition]:
        """How images are dealt, by what that is called."""
        found: dict[str, mnist.Partition] = {
            skewed(self): lambda rng, labels: data.dirichlet_per_client(rng, labels, self.clients, self.alpha)}
        return found | ({IID: lambda rng, labels: data.iid(rng, len(labels), self.clients)} if self.iid else {})

    @property
    def counted_after(self) -> int:
        """The round after which accuracies count."""
        return self.rounds - max(1, round(self.last * self.rounds))


class Draw(NamedTuple):
    """A federation of one seed. partition: what that is called."""

    partition: str
    seed: int
    dataset: FederatedDataset


class Tried(NamedTuple):
    """A method's grid under a partition. scores: validation accuracy float64[G, S]. choice: the best point."""

    axes: Mapping[str, Sequence[float]]
    scores: npt.NDArray[np.float64]
    choice: rate_grid.Choice


def run(config: Config) -> None:
    """Runs the study and prints its report; writes a run folder."""
    with cli.run_folder(config, "server_optimizers") as folder:
        model = mnist.classifier(models.TwoNN(hidden=config.hidden))
        tried = tune(config, model, folder)
        chosen = rates(config, tried)
        draws, metrics = measure(config, model, chosen, folder)
        server_optimizers_report.conclude(folder, config, tried, chosen, draws, metrics)


def tune(config: Config, model: Model, folder: RunFolder | None = None) -> dict[str, dict[str, Tried]]:
    """Every method's grid on validation images: by partition and method."""
    images = mnist.IMAGES[config.images]
    seeds = [FIRST_TUNING_SEED + i for i in range(config.tuning_seeds)]
    draws = [Draw(name, seed, mnist.to_choose(images, partition, seed, config.validation))
             for name, partition in config.partitions.items() for seed in seeds]
    study = study_of(config, model, draws)
    tried: dict[str, dict[str, Tried]] = {name: {} for name in config.partitions}
    for method in config.methods:
        axes, arm = config.axes(method), f"grid of {method}"
        points, owners = rate_grid.labels(axes, range(len(draws)))
        fit = training.fit(
            study, [arm_of(config, model, arm, method)], [draws[i].seed for i in owners], rate_grid.rows(axes, _runs(draws)),
            variants=[f", {draws[i].partition}{point}" for i, point in zip(owners, points, strict=True)],
            folder=folder, resume=config.resume, may_diverge=True)[arm]
        for name in config.partitions:
            scores = rate_grid.validation_scores(axes, fit.rows, f"{arm}, {name}", "accuracy", after=config.counted_after)
            tried[name][method] = Tried(axes, scores, rate_grid.choose(axes, scores))
    return tried


def rates(config: Config, tried: Mapping[str, Mapping[str, Tried]]) -> dict[str, dict[str, dict[str, float]]]:
    """The rates of every arm under every partition: by arm and partition. Plain averaging has its best client rate."""
    found = {method: {name: dict(of[method].choice.point) for name, of in tried.items()} for method in config.methods}
    found[PLAIN] = {}
    for name, of in tried.items():
        axes, scores, _ = of[FEDAVG]
        plain = np.array([point[SERVER] == 1.0 for point in rate_grid.points(axes)])
        found[PLAIN][name] = rate_grid.choose({CLIENT: axes[CLIENT], SERVER: (1.0,)}, scores[plain]).point
    return found


def measure(
    config: Config, model: Model, chosen: Mapping[str, Mapping[str, Mapping[str, float]]], folder: RunFolder | None = None
) -> tuple[list[Draw], pd.DataFrame]:
    """Trains every arm with its rates for all seeds and partitions, and measures it by the test images."""
    images = mnist.IMAGES[config.images]
    draws = [Draw(name, seed, mnist.to_measure(images, partition, seed))
             for name, partition in config.partitions.items() for seed in range(config.seeds)]
    hyper = {arm: {rate: jnp.asarray([of[draw.partition][rate] for draw in draws], jnp.float32) for rate in (CLIENT, SERVER)}
             for arm, of in chosen.items()}
    arms = [arm_of(config, model, arm, FEDAVG if arm == PLAIN else arm, own=arm) for arm in chosen]
    fits = training.fit(
        study_of(config, model, draws), arms, [draw.seed for draw in draws], _runs(draws)._replace(hyper=hyper),
        variants=[f", {draw.partition}" for draw in draws], folder=folder, resume=config.resume)
    return draws, pd.concat([fit.rows for fit in fits.values()], ignore_index=True)


def study_of(config: Config, model: Model, draws: Sequence[Draw]) -> training.Study:
    """What all arms share: clients for training; for validation and test a "site" for each class of the images.

    The test images are one set, however they are dealt, and are there once.
    """
    datasets = [draw.dataset for draw in draws]
    names = datasets[0].class_names
    splits = mnist.stacked(datasets)._replace(
        validation=mnist.by_class([dataset.validation for dataset in datasets], len(names)),
        test=mnist.by_class([datasets[0].test], len(names)))
    return training.Study(
        model, splits, names, (), config.rounds, config.evaluate_every, chunk=CHUNK,
        metrics={"accuracy": CLASSIFICATION["accuracy"]}, mesh=sweep.run_mesh())


def arm_of(config: Config, model: Model, name: str, method: str, own: str | None = None) -> training.Arm:
    """A method as an arm. own: the key of its rates where the hyper-parameters are those of several arms."""

    def build(hyper: PyTree) -> FederatedAlgorithm:
        rates = hyper if own is None else hyper[own]
        return METHODS[method](model, optax.sgd(rates[CLIENT]), batches.epochs(1, config.batch_size), rates[SERVER])

    return training.Arm(name, build, lambda sites: sampling.fixed_size(config.cohort, config.clients))


def _runs(draws: Sequence[Draw]) -> training.Runs:
    """One run a draw; initial weights and cohorts are the seed's, whatever the partition."""
    return training.seeds_of([draw.seed for draw in draws], stacked=True)


REPRODUCTION = Reproduction(server_optimizers_report.claims, datasets=("fashion_mnist",))

if __name__ == "__main__":
    cli.main(run, Config)
