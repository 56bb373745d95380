"""A bound that follows the median norm against fixed ones: federated learning on MNIST with client-level privacy.

Andrew, Thakkar, McMahan & Ramaswamy 2021, "Differentially private learning with adaptive clipping" (arXiv 1905.03871): the bound
moves by C <- C exp(-eta (b - gamma)), b the noisy share of updates within it, with the paper's gamma = .5, eta = .2, C0 = .1,
noise on the count of a twentieth of the expected cohort, and server momentum .9. Here 1,000 users of 60 images, whose mix of
digits is drawn from Dir(.5, ..., .5); each takes part in a round by a coin of probability .1; the 2NN, one epoch in batches of
10, 100 rounds; as much noise as (2, 1e-5) needs by RDP for hiding a whole user.

    python -m experiments.adaptive_clipping
    python -m experiments.adaptive_clipping --quick      # three clips, fewer rounds, the rates that the full form chose
    python -m experiments.adaptive_clipping --no-skew    # images dealt by chance

Coins, and not cohorts of a fixed size, since it is adding or removing a user that they hide, by one clip: replacing one in a
fixed cohort moves the sum by two, and needs twice the noise. What a private mean divides by is 100, whoever came. The users' rate
is chosen without privacy, and the server rate of each bound from one grid for all, by held-out images of another seed; the claims
are about test images of ten more. The guarantee covers the models that are sent, not these choices nor the metrics.

2 CPU cores that other work shared: full 22 minutes, quick 68 s of processor time. Expected, test accuracy after round 100: fixed
clips .03, .1 and .3 .899, 1 .880, 3 .787; median bound .894; without privacy .978. The median bound is .005 [.004, .006] below
the best fixed clip, cuts half of the updates from round 22 on, and is .65 then. Clips below all norms are alike: only the product
of clip and server rate counts there, and at one server rate, .056, the five clips have .60, .77, .87, .88 and .74 on validation
images. A bound that adapts follows the norms that its own noise makes: with a server rate of .18 or more it grows without end.
Data: `python -m fl_jax.data prepare mnist`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
import pandas as pd

from experiments import adaptive_clipping_report
from experiments.adaptive_clipping_protocol import CLIENT, CLIP, FIXED, MEDIAN, PLAIN, SERVER, bounds, claims
from experiments.common import cli, mnist, rate_grid
from experiments.common.config import at_least_one
from experiments.common.reproduction import Reproduction
from fl_jax import aggregators, algorithms, batches, clipping, data, models, sampling, sweep, training
from fl_jax.data import FederatedDataset
from fl_jax.errors import FlJaxError
from fl_jax.metrics import CLASSIFICATION
from fl_jax.privacy import Budget, Guarantee, PrivacyLedger, Unit, calibrate
from fl_jax.results import RunFolder
from fl_jax.types import Aggregator, FederatedAlgorithm, Model, PyTree, Sampling, Sites

FIRST_TUNING_SEED = 1000  # the seeds that are reported are 0, 1, ...
CHUNK = 500


@dataclasses.dataclass(frozen=True)
class Config(cli.Common):
    """A clip that adapts to the median norm against fixed ones, in DP-FedAvg that hides each of 1,000 users."""

    users: int = 1000
    """clients that share the training images"""
    skew: bool = True
    """each user has digits of its own; without it images are dealt by chance"""
    alpha: float = 5.0
    """of the Dirichlet distribution of a user's mix of ten digits: Dir(alpha / 10, ..., alpha / 10)"""
    rate: float = 0.1
    """probability of the coin by which a user takes part in a round"""
    capacity: float = 2.0
    """most users of a round, in expected cohorts; who is above it is left out, which the accounting knows"""
    batch_size: int = 10
    """images in a step of a user's one epoch"""
    hidden: int = 200
    """units of each of the network's two hidden layers"""
    rounds: int = 100
    """rounds"""
    evaluate_every: int = 10
    """measure after so many rounds"""
    epsilon: float = 2.0
    """the budget of each user, by RDP, for all rounds"""
    delta: float = 1e-5
    """at this delta"""
    clips: tuple[float, ...] = rate_grid.decades(-3, -2, -1, 0, 1)
    """the fixed bounds, ascending"""
    initial: float = 0.1
    """the first bound of the one that adapts"""
    target: float = 0.5
    """the quantile of the norms that it follows"""
    bound_rate: float = 0.2
    """how fast: its eta"""
    count_noise: float = 0.05
    """standard deviation of the noise on the number of norms within the bound, in expected cohorts"""
    momentum: float = 0.9
    """of the server"""
    client_rates: tuple[float, ...] = rate_grid.decades(-3, -2, -1)
    """SGD rates of the users to try, without privacy; all arms then have the best one"""
    plain_rates: tuple[float, ...] = rate_grid.decades(0, 1, 2)
    """server rates to try with each of these"""
    server_rates: tuple[float, ...] = rate_grid.decades(*range(-8, 2), parts=4)
    """server rates to try with privacy, the same with every bound"""
    chosen: tuple[float, ...] = ()
    """server rates that were chosen before: of each clip, of the bound that adapts, and without privacy; () tries server_rates"""
    validation: float = 0.1
    """share of a user's images that the choice of rates looks at"""
    seeds: int = 10
    """seeds of the results"""
    tuning_seeds: int = 1
    """seeds of the grids, which are others"""
    settled: int = 30
    """the round after which the share of updates that are cut is expected to be one half"""

    def __post_init__(self) -> None:
        at_least_one(self, "users", "batch_size", "hidden", "rounds", "evaluate_every", "seeds", "tuning_seeds")
        if not 0 < self.validation < 1:
            raise FlJaxError(f"validation must be between 0 and 1, and is {self.validation}.")
        if not 0 <= self.settled < self.rounds:
            raise FlJaxError(f"settled must be a round before the last, {self.rounds}, and is {self.settled}.")
        if len(self.clips) < 2 or [*self.clips] != sorted({*self.clips}):
            raise FlJaxError(f"clips must be two or more bounds that ascend, and are {list(self.clips)}.")
        if self.chosen and (len(self.chosen) != len(self.clips) + 2 or len(self.client_rates) != 1):
            raise FlJaxError(
                f"chosen must have {len(self.clips) + 2} server rates, of each clip, of the bound that adapts and without "
                "privacy, and go with the one client rate that they were chosen with; "
                f"it has {len(self.chosen)}, and client_rates {len(self.client_rates)}.")

    @classmethod
    def quick_defaults(cls) -> "Config":
        """Three clips, four tenths of the rounds, two seeds, and the rates that the full form chooses."""
        return cls(
            quick=True, rounds=40, evaluate_every=20, settled=25, seeds=2, clips=rate_grid.decades(-1, 0, 1),
            client_rates=rate_grid.decades(-2), chosen=rate_grid.decades(-4, -6, -7, -5, 2, parts=4))

    @property
    def cohort(self) -> float:
        """How many users a round expects."""
        return self.rate * self.users

    @property
    def budget(self) -> Budget:
        """What each user may pay for all rounds."""
        return Budget(self.epsilon, self.delta)

    @property
    def sampling(self) -> Sampling:
        """Who takes part."""
        return sampling.poisson(self.rate, self.users, capacity=min(self.users, round(self.capacity * self.cohort)))

    @property
    def noise(self) -> float:
        """The noise multiplier that the budget needs, in clips."""
        return calibrate(self.budget, self.rounds, self.sampling.amplify)

    @property
    def adaptive(self) -> clipping.Clipping:
        """The bound that follows the quantile."""
        return clipping.quantile(
            self.initial, self.count_noise * self.cohort, target=self.target, learning_rate=self.bound_rate)


class Tried(NamedTuple):
    """A grid. scores: validation accuracy after the last round, float64[G, S]. choice: the best point."""

    axes: Mapping[str, Sequence[float]]
    scores: npt.NDArray[np.float64]
    choice: rate_grid.Choice


class Rates(NamedTuple):
    """The learning rates of the results. server: of each bound by its name, and without privacy."""

    client: float
    server: Mapping[str, float]


def run(config: Config, images: mnist.Load = mnist.IMAGES["mnist"]) -> None:
    """Runs the study and prints its report; writes a run folder. images: MNIST, or what stands in for it in a test."""
    with cli.run_folder(config, "adaptive_clipping") as folder:
        model = mnist.classifier(models.TwoNN(hidden=config.hidden))
        rates, tried = tune(config, model, images, folder)
        metrics, ledgers = measure(config, model, rates, images, folder)
        adaptive_clipping_report.conclude(folder, config, rates, tried, metrics, ledgers)


def tune(
    config: Config, model: Model, images: mnist.Load, folder: RunFolder | None = None
) -> tuple[Rates, dict[str, Tried]]:
    """The rates, and by the bound's name the grid that they come from; no grid where the configuration gives them.

    The users' rate is the one of the best pair without privacy, which is the baseline too.
    """
    if config.chosen:
        return Rates(config.client_rates[0], dict(zip([*bounds(config), PLAIN], config.chosen, strict=True))), {}
    seeds = [FIRST_TUNING_SEED + i for i in range(config.tuning_seeds)]
    federations = [mnist.to_choose(images, partial(partition, config), seed, config.validation) for seed in seeds]
    study = study_of(config, model, federations)

    def scores(axes: rate_grid.Axes, arm: training.Arm) -> npt.NDArray[np.float64]:
        variants, labels = rate_grid.labels(axes, seeds)
        runs = rate_grid.rows(axes, training.seeds_of(seeds, stacked=True))
        fit = training.fit(
            study, [arm], labels, runs, variants=variants, folder=folder, resume=config.resume, may_diverge=True)[arm.name]
        return rate_grid.validation_scores(axes, fit.rows, arm.name, "accuracy", after=config.rounds - 1)

    def of(axes: Mapping[str, Sequence[float]], found: npt.NDArray[np.float64]) -> Tried:
        return Tried(axes, found, rate_grid.choose(axes, found))

    servers = {SERVER: config.server_rates}
    axes = {CLIENT: config.client_rates, SERVER: config.plain_rates}
    tried = {PLAIN: of(axes, scores(axes, plain_arm(config, model, f"grid of {PLAIN}")))}
    client = tried[PLAIN].choice.point[CLIENT]
    names = list(bounds(config))
    fixed = scores({CLIP: config.clips, **servers}, fixed_arm(config, model, client, f"grid of {FIXED}"))
    for name, own in zip(names, np.split(fixed, len(config.clips)), strict=False):
        tried[name] = of(servers, own)
    tried[MEDIAN] = of(servers, scores(servers, median_arm(config, model, client, f"grid of {MEDIAN}")))
    return Rates(client, {name: tried[name].choice.point[SERVER] for name in (*names, PLAIN)}), tried


def measure(
    config: Config, model: Model, rates: Rates, images: mnist.Load, folder: RunFolder | None = None
) -> tuple[pd.DataFrame, dict[str, PrivacyLedger]]:
    """Trains with every bound and without privacy for all seeds, and measures by the test images: the rows, and what a run
    has spent.

    A user's promise is the budget. The fixed bounds are rows of one program, and their ledger is of one mechanism: noise is in
    clips.
    """
    seeds = list(range(config.seeds))
    study = study_of(config, model, [mnist.to_measure(images, partial(partition, config), seed) for seed in seeds])
    runs, promise = training.seeds_of(seeds, stacked=True), [Guarantee(Unit.CLIENT, budget=config.budget, name="user")]
    *names, _ = bounds(config)
    key, columns = sweep.grid(runs.key, {
        CLIP: jnp.asarray(config.clips, jnp.float32), SERVER: jnp.asarray([rates.server[name] for name in names], jnp.float32)})
    fits = training.fit(
        study, [fixed_arm(config, model, rates.client, FIXED)], seeds * len(names),
        training.Runs(key, jnp.tile(runs.data, len(names)), columns),
        variants=[name.removeprefix(FIXED) for name in names for _ in seeds],
        folder=folder, resume=config.resume, privacy={FIXED: promise})
    others = {arm.name: arm for arm in (median_arm(config, model, rates.client, MEDIAN), plain_arm(config, model, PLAIN))}
    hyper = {name: {rate: jnp.full(len(seeds), value, jnp.float32)
                    for rate, value in ((CLIENT, rates.client), (SERVER, rates.server[name]))} for name in others}
    fits |= training.fit(
        study, [arm._replace(build=partial(_own, arm)) for arm in others.values()], seeds, runs._replace(hyper=hyper),
        folder=folder, resume=config.resume, privacy={MEDIAN: promise})
    ledgers = {name: fits[name].ledgers[0][0] for name in (FIXED, MEDIAN)}
    return pd.concat([fit.rows for fit in fits.values()], ignore_index=True), ledgers


def _own(arm: training.Arm, hyper: PyTree) -> FederatedAlgorithm:
    """The algorithm of an arm whose rates are among those of several."""
    return arm.build(hyper[arm.name])


def partition(config: Config, rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Which user owns each training image."""
    if config.skew:
        return data.dirichlet_per_client(rng, labels, config.users, config.alpha)
    return data.iid(rng, len(labels), config.users)


def study_of(config: Config, model: Model, federations: Sequence[FederatedDataset]) -> training.Study:
    """What all arms share: users for training; for validation and test a "site" for each digit. Test images are there once."""
    names = federations[0].class_names
    splits = mnist.stacked(federations)._replace(
        validation=mnist.by_class([one.validation for one in federations], len(names)),
        test=mnist.by_class([federations[0].test], len(names)))
    return training.Study(
        model, splits, names, (), config.rounds, config.evaluate_every, chunk=CHUNK,
        metrics={"accuracy": CLASSIFICATION["accuracy"]}, mesh=sweep.run_mesh())


def fixed_arm(config: Config, model: Model, client: float, name: str) -> training.Arm:
    """DP-FedAvg with the clip and the server rate of each row."""
    noise = config.noise

    def build(hyper: PyTree) -> FederatedAlgorithm:
        return _fedavgm(config, model, client, hyper[SERVER], aggregators.private_mean(hyper[CLIP], noise, config.cohort))

    return training.Arm(name, build, partial(_sampling, config))


def median_arm(config: Config, model: Model, client: float, name: str) -> training.Arm:
    """DP-FedAvg with the bound that adapts and the server rate of each row; its count is paid out of the same noise."""
    noise = config.noise

    def build(hyper: PyTree) -> FederatedAlgorithm:
        return _fedavgm(config, model, client, hyper[SERVER], aggregators.private_mean(config.adaptive, noise, config.cohort))

    return training.Arm(name, build, partial(_sampling, config))


def plain_arm(config: Config, model: Model, name: str) -> training.Arm:
    """The same without clip and noise, a mean over who came, with the client and server rate of each row."""
    return training.Arm(
        name, lambda hyper: _fedavgm(config, model, hyper[CLIENT], hyper[SERVER], aggregators.mean()), partial(_sampling, config))


def _sampling(config: Config, sites: Sites) -> Sampling:
    del sites
    return config.sampling


def _fedavgm(config: Config, model: Model, client: PyTree, server: PyTree, aggregator: Aggregator) -> FederatedAlgorithm:
    return algorithms.fedavgm(
        model, optax.sgd(client), batches.epochs(1, config.batch_size), server_learning_rate=server, momentum=config.momentum,
        aggregator=aggregator)


REPRODUCTION = Reproduction(claims, datasets=("mnist",))

if __name__ == "__main__":
    cli.main(run, Config)
