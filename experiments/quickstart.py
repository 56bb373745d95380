"""The first study: what do five hospitals gain by training together, and which algorithm gives it to them?

Breast cancer Wisconsin (569 real patients) spread over five simulated hospitals of uneven size, case mix and measurement, and a
sixth that takes no part in training. Local-only, centralized, FedAvg, FedProx, FedAdam, FedBN, and FedAvg under client-level
differential privacy (little noise, and enough for a small epsilon), 10 seeds in one program for each: a seed draws hospitals, split
and initialisation anew. Intervals are over seeds, differences are paired by seed.

    make run                                                     # or: python -m experiments.quickstart
    python -m experiments.quickstart --csv FILE --site COLUMN --label COLUMN [--group COLUMN] [--unseen SITE]

Time: under a minute on 2 CPU cores, most of it compilation, kept for the next time. Expected: FedAvg ranks patients well (AUROC
about .96) with an accuracy below that of a hospital's own model; FedBN keeps the AUROC and repairs the accuracy.
Learning rate: .1 from {.05, .1, .2} by the validation AUROC of FedAvg.
"""

import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import optax

from experiments import quickstart_report
from experiments.common import cli
from fl_jax import aggregators, algorithms, batches, models, norms, privacy, sampling, sweep, training
from fl_jax.data import FederatedDataset, pooled_train, read_table, simulated_hospitals, stack
from fl_jax.errors import FlJaxError
from fl_jax.types import FederatedAlgorithm, Model, PyTree, Sampling, Sites


@dataclasses.dataclass(frozen=True)
class Config(cli.Common):
    """Hospitals that train together: local-only, centralized, FedAvg, FedProx, FedAdam, FedBN and private FedAvg, side by side."""

    seeds: int = 10
    """how many seeds, all in one program; each draws partition, split and initialisation"""
    rounds: int = 30
    """rounds of every arm"""
    evaluate_every: int = 5
    """measure all sites after so many rounds"""
    epochs: int = 1
    """passes over a site's records in a round"""
    batch_size: int = 16
    """records in a mini-batch"""
    learning_rate: float = 0.1
    """of the sites' SGD"""
    mu: float = 0.1
    """FedProx's proximal strength"""
    server_learning_rate: float = 0.01
    """FedAdam's"""
    hidden: int = 32
    """units of the network's one hidden layer, which BatchNorm follows"""
    clip: float = 0.5
    """bound on the norm of a site's update in the private arms"""
    weak_noise: float = 0.3
    """standard deviation of the noise, in clips, of the private arm that should still be useful"""
    strong_noise: float = 8.0
    """the same of the private arm that should have a small epsilon"""
    delta: float = 1e-5
    """delta at which epsilon is stated"""
    csv: Path | None = None
    """study your own table instead: a CSV file with a header"""
    site: str | None = None
    """the CSV's column that names the site of a record"""
    label: str | None = None
    """the CSV's column with the class to predict"""
    group: str | None = None
    """the CSV's column that says which records belong together (a patient), so that they are never in two splits"""
    unseen: tuple[str, ...] = ()
    """names of the CSV's sites that take no part in training"""
    drop: tuple[str, ...] = ()
    """the CSV's columns that are no features, such as a number of the record"""
    categorical: tuple[str, ...] = ()
    """the CSV's columns whose numbers are names of categories"""

    def __post_init__(self) -> None:
        for name in ("seeds", "rounds", "evaluate_every", "epochs", "batch_size", "hidden"):
            if getattr(self, name) < 1:
                raise FlJaxError(f"{name} must be 1 or more, and is {getattr(self, name)}.")
        if self.csv is None and (self.site or self.label or self.group or self.unseen or self.drop or self.categorical):
            raise FlJaxError("--site, --label, --group, --unseen, --drop and --categorical describe a table: give it with --csv FILE.")
        if self.csv is not None and not (self.site and self.label):
            raise FlJaxError("--csv needs --site COLUMN and --label COLUMN, the columns that name a record's site and its class.")

    @classmethod
    def quick_defaults(cls) -> "Config":
        """Three seeds and a few rounds."""
        return cls(seeds=3, rounds=6, evaluate_every=3)


def datasets(config: Config) -> list[FederatedDataset]:
    """The federation of each seed: of the user's table, or the simulated hospitals."""
    if config.csv is None:
        return [simulated_hospitals(seed) for seed in range(config.seeds)]
    table = read_table(config.csv, config.site or "", config.label or "", group=config.group, drop=config.drop,
                       categorical=config.categorical)
    return [table.dataset(seed, test=0.4, unseen=config.unseen) for seed in range(config.seeds)]


def arms_of(config: Config, model: Model, num_sites: int) -> tuple[list[training.Arm], dict[str, list[privacy.Guarantee]]]:
    """What is compared, all with the same client, budget and learning rate; and what each private arm promises."""
    optimizer = optax.sgd(config.learning_rate)
    work = batches.epochs(config.epochs, config.batch_size)
    private_cohort = sampling.everyone(sampling.equal)

    def everyone(sites: Sites) -> Sampling:
        return sampling.everyone()

    def private(noise: float, _: PyTree = ()) -> FederatedAlgorithm:
        aggregator = aggregators.private_mean(config.clip, noise, num_sites)
        return algorithms.fedavg(model, optimizer, work, aggregator=aggregator, norms=norms.LOCAL_STATISTICS)

    arms = [
        training.Arm("local only", lambda _: algorithms.local_only(model, optimizer, work), everyone),
        training.Arm(
            "centralized", lambda _: algorithms.centralized(model, optimizer, algorithms.pooled_batches(work)),
            lambda sites: algorithms.matched_budget(sampling.everyone(), work, sites), pooled_train),
        training.Arm("FedAvg", lambda _: algorithms.fedavg(model, optimizer, work), everyone),
        training.Arm("FedProx", lambda _: algorithms.fedprox(model, optimizer, work, config.mu), everyone),
        training.Arm(
            "FedAdam", lambda _: algorithms.fedadam(model, optimizer, work, server_learning_rate=config.server_learning_rate), everyone),
        training.Arm("FedBN", lambda _: algorithms.fedbn(model, optimizer, work), everyone),
    ]
    promised = [privacy.Guarantee(privacy.Unit.CLIENT, config.delta, name="site", accountant=quickstart_report.ACCOUNTANT)]
    noises = {"DP, weak": config.weak_noise, "DP, strong": config.strong_noise}
    arms += [training.Arm(name, partial(private, noise), lambda sites: private_cohort) for name, noise in noises.items()]
    return arms, dict.fromkeys(noises, promised)


def run(config: Config) -> None:
    """Runs the study and prints its report; writes a run folder."""
    began = time.perf_counter()
    federations: Sequence[FederatedDataset] = datasets(config)
    first = federations[0]
    with cli.run_folder(config, "quickstart") as folder:
        quickstart_report.introduce(first, config)
        example = jnp.zeros((1, first.train.x.shape[1]))
        model = models.bridge(models.TabularNet(first.num_classes, config.hidden), example, models.softmax_cross_entropy)
        study = training.Study(
            model, stack(federations), first.site_names, first.unseen_names, config.rounds, config.evaluate_every, chunk=64,
            mesh=sweep.run_mesh())
        arms, promised = arms_of(config, model, first.num_sites)
        seeds = list(range(config.seeds))
        fits = training.fit(
            study, arms, seeds, training.seeds_of(seeds, stacked=True), folder=folder, resume=config.resume, privacy=promised)
        ledgers = {name: fits[name].ledgers[0][0] for name in promised}  # of one run: all seeds have spent the same
        quickstart_report.conclude(folder, first, fits, ledgers, config, time.perf_counter() - began)


if __name__ == "__main__":
    cli.main(run, Config)
