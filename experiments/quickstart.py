"""The first study: what do five hospitals gain by training together, and which algorithm gives it to them?

Breast cancer Wisconsin (569 real patients) spread over five simulated hospitals of uneven size, case mix and measurement, and a
sixth that takes no part in training. Local-only, centralized, FedAvg, FedProx, FedAdam, FedBN, FedAvg under differential privacy for a
patient (DP-SGD with a budget of epsilon 3) and for a whole hospital (little noise, and enough for a small epsilon), 10 seeds in one
program for each: a seed draws hospitals, split and initialisation anew. Intervals are over seeds, differences are paired by seed.

    make run                                                     # or: python -m experiments.quickstart
    python -m experiments.quickstart --csv FILE --site COLUMN --label COLUMN [--group COLUMN] [--unseen SITE]

Time: under a minute on 2 CPU cores, most of it compilation, kept for the next time. Expected: FedAvg ranks patients well (AUROC
about .96) with an accuracy below that of a hospital's own model; FedBN keeps the AUROC and repairs the accuracy.
DP-SGD hides a patient for about three points of AUROC; to hide one hospital of five costs nearly everything.
Learning rate: .1 from {.05, .1, .2} by the validation AUROC of FedAvg; DP-SGD's, 1, and its clip, .1, from {.05, .1, .2, .5, 1} x
{.1, .5, 2} by its own. Of the personalised algorithms FedBN is here: Ditto, with the best of four strengths, serves a site as well on
validation patients (worst hospital's accuracy .79 both), and needs a strength and a second model.
"""

import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import quickstart_report
from experiments.common import cli
from experiments.common.arms import at_one_place
from experiments.common.config import at_least_one
from fl_jax import aggregators, algorithms, batches, gradients, models, norms, privacy, sampling, sweep, training
from fl_jax.data import FederatedDataset, read_table, simulated_hospitals, stack
from fl_jax.errors import FlJaxError
from fl_jax.types import FederatedAlgorithm, Model, PyTree, Sampling, Sites


@dataclasses.dataclass(frozen=True)
class Config(cli.Common):
    """Hospitals that train together: local-only, centralized, FedAvg, FedProx, FedAdam, FedBN, DP-SGD and private FedAvg, side by side."""

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
    epsilon: float = 3.0
    """DP-SGD's budget for a record; its noise is calibrated to it"""
    record_rate: float = 0.25
    """DP-SGD's probability that a record is in a step, so that 1 / record_rate steps are a pass"""
    record_clip: float = 0.1
    """bound on the norm of a record's gradient in DP-SGD"""
    record_learning_rate: float = 1.0
    """of the sites' SGD in DP-SGD"""
    clip: float = 0.5
    """bound on the norm of a site's update in the arms that hide a whole site"""
    weak_noise: float = 0.3
    """standard deviation of the noise, in clips, of the arm that hides a site and should still be useful"""
    strong_noise: float = 8.0
    """the same of the arm that should have a small epsilon for a site"""
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
        at_least_one(self, "seeds", "rounds", "evaluate_every", "epochs", "batch_size", "hidden")
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
        at_one_place("centralized", lambda _: algorithms.centralized(model, optimizer, algorithms.pooled_batches(work)), work),
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


def private_for_records(
    config: Config, federations: Sequence[FederatedDataset], example: jax.ShapeDtypeStruct
) -> tuple[Model, training.Arm, privacy.Guarantee]:
    """FedAvg with DP-SGD at the sites, with the noise that all rounds may have within the budget, and a network without BatchNorm, which
    would mix records."""
    model = models.bridge(
        models.TabularNet(federations[0].num_classes, config.hidden, models.layer_norm), example, models.softmax_cross_entropy)
    largest = max(int(np.diff(dataset.train.offsets).max()) for dataset in federations)
    work = batches.poisson_epochs(config.record_rate, config.epochs, largest)
    budget = privacy.Budget(config.epsilon, config.delta, quickstart_report.ACCOUNTANT)
    noise = privacy.calibrate(budget, config.rounds, lambda event: work.account(event, largest))
    gradient = gradients.private(model, config.record_clip, noise)
    arm = training.Arm(
        quickstart_report.DP_SGD, lambda _: algorithms.fedavg(model, optax.sgd(config.record_learning_rate), work, gradient=gradient),
        lambda sites: sampling.everyone())
    name = "record" if config.csv else "patient"
    return model, arm, privacy.Guarantee(privacy.Unit.RECORD, budget=budget, name=name, accountant=budget.accountant)


def run(config: Config) -> None:
    """Runs the study and prints its report; writes a run folder."""
    began = time.perf_counter()
    federations: Sequence[FederatedDataset] = datasets(config)
    first = federations[0]
    example = jax.ShapeDtypeStruct((1, first.train.x.shape[1]), jnp.float32)
    normless, dp_sgd, promise = private_for_records(config, federations, example)
    with cli.run_folder(config, "quickstart") as folder:
        quickstart_report.introduce(first, config)
        model = models.bridge(models.TabularNet(first.num_classes, config.hidden), example, models.softmax_cross_entropy)
        study = training.Study(
            model, stack(federations), first.site_names, first.unseen_names, config.rounds, config.evaluate_every, chunk=64,
            mesh=sweep.run_mesh())
        arms, promised = arms_of(config, model, first.num_sites)
        seeds = list(range(config.seeds))
        runs = training.seeds_of(seeds, stacked=True)
        fits = training.fit(study, arms, seeds, runs, folder=folder, resume=config.resume, privacy=promised)
        promised[dp_sgd.name] = [promise]
        fits |= training.fit(
            study._replace(model=normless), [dp_sgd], seeds, runs, folder=folder, resume=config.resume, privacy={dp_sgd.name: [promise]})
        ledgers = {name: fits[name].ledgers[0][0] for name in promised}  # of one run: all seeds have spent the same
        quickstart_report.conclude(folder, first, fits, ledgers, config, time.perf_counter() - began)


if __name__ == "__main__":
    cli.main(run, Config)
