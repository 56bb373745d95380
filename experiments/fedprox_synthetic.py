"""FedProx on its synthetic federations: stragglers and heterogeneity, with and without the proximal term.

Li et al. 2020, "Federated optimization in heterogeneous networks" (arXiv 1812.06127), section 5.2 and 5.3, figures 1 and 2: logistic
regression at 30 devices, 10 of them a round; in each round a share of these straggles. FedAvg drops the stragglers, FedProx keeps
what they did in 1 to 19 of their 20 epochs. As in the published code, devices are drawn uniformly and weighted by their records, and
the data seed draws sizes, labelling, features and the split; the two mu of a seed see the same cohorts.

    python -m experiments.fedprox_synthetic            # all four federations and three shares of stragglers
    python -m experiments.fedprox_synthetic --quick    # Synthetic(1, 1) without stragglers and with 90 %, three data seeds

All data seeds, federations and mu are rows of one program; there is one program for each share of stragglers, kept and dropped.

2 CPU cores: 44 minutes of processor time in full, quick 50 s. Expected, over rounds 151 to 200 of Synthetic(1, 1) and ten data seeds:
training loss 1.07 for FedAvg and .41 for FedProx with mu = 1; with 90 % stragglers test accuracy .75 for FedAvg and .85 for FedProx,
which has that without them too. Data seeds differ so much that ten say little of a level: over 40 of them FedAvg's .75 is .778 +- .035,
in plain NumPy over 24 others .759 +- .053 (its first ten .70).
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import optax
import pandas as pd

from experiments import fedprox_report
from experiments.common import cli
from experiments.common.config import at_least_one
from experiments.common.reproduction import Reproduction
from fl_jax import algorithms, batches, models, sampling, sweep, training
from fl_jax.data import FederatedDataset, as_one_site, fedprox_iid, fedprox_synthetic, stack
from fl_jax.errors import FlJaxError
from fl_jax.metrics import CLASSIFICATION
from fl_jax.types import Model, Sampling, Sites, Splits

METRICS = {name: CLASSIFICATION[name] for name in ("loss", "accuracy")}
ALL_DEVICES = "all devices"


@dataclasses.dataclass(frozen=True)
class Config(cli.Common):
    """FedProx's synthetic federations, with stragglers: FedAvg drops them, FedProx keeps what they did."""

    seeds: int = 10
    """data seeds: each draws its own federation, initial weights, cohorts and stragglers"""
    heterogeneity: tuple[float, ...] = (0.0, 0.5, 1.0)
    """alpha = beta of Synthetic(alpha, beta), one federation each"""
    iid: bool = True
    """also Synthetic-IID"""
    stragglers: tuple[float, ...] = (0.0, 0.5, 0.9)
    """shares of a round's devices that straggle"""
    mu: tuple[float, ...] = (0.0, 1.0)
    """strengths of FedProx's proximal term; 0 alone would be FedAvg that keeps its stragglers"""
    rounds: int = 200
    """rounds"""
    cohort: int = 10
    """devices in a round, of 30"""
    epochs: int = 20
    """passes over a device's records in a round"""
    batch_size: int = 10
    """records in a step"""
    learning_rate: float = 0.01
    """of the devices' SGD"""
    evaluate_every: int = 5
    """measure training loss and test accuracy after so many rounds"""

    def __post_init__(self) -> None:
        at_least_one(self, "seeds", "rounds", "batch_size", "evaluate_every")
        if not self.heterogeneity and not self.iid:
            raise FlJaxError("There is no federation to train on: give --heterogeneity or --iid.")
        for name, low, high in (("stragglers", 0.0, 1.0), ("mu", 0.0, float("inf"))):
            values = getattr(self, name)
            if not values or len({*values}) < len(values) or not all(low <= value <= high for value in values):
                raise FlJaxError(f"{name} must be different numbers from {low:g} to {high:g}, at least one, and is {values}.")

    @classmethod
    def quick_defaults(cls) -> "Config":
        """The full protocol on Synthetic(1, 1) with few data seeds."""
        return cls(seeds=3, heterogeneity=(1.0,), iid=False, stragglers=(0.0, 0.9))


class Draw(NamedTuple):
    """A federation of one data seed."""

    name: str
    seed: int
    dataset: FederatedDataset


def draws(config: Config) -> list[Draw]:
    """Every federation of every data seed."""
    iid = [Draw(fedprox_report.IID, seed, fedprox_iid(seed)) for seed in range(config.seeds)] if config.iid else []
    return iid + [
        Draw(fedprox_report.synthetic(alpha), seed, fedprox_synthetic(seed, alpha, alpha))
        for alpha in config.heterogeneity for seed in range(config.seeds)]


def arms_of(config: Config, *, dropped: bool) -> list[training.Arm]:
    """One arm a share of stragglers, which are dropped or kept; hyper-parameter: mu."""
    work = batches.epochs(config.epochs, config.batch_size)

    def arm(share: float) -> training.Arm:
        def sampled(sites: Sites) -> Sampling:
            cohort = sampling.fixed_size(config.cohort, sites.size.shape[0])
            return sampling.with_stragglers(cohort, share, work, config.epochs, dropped=dropped) if share else cohort

        return training.Arm(
            fedprox_report.arm(share, dropped), lambda mu: algorithms.fedprox(_model(), optax.sgd(config.learning_rate), work, mu), sampled)

    return [arm(share) for share in config.stragglers if share or not dropped]


def run(config: Config) -> None:
    """Runs the study and prints its report; writes a run folder."""
    with cli.run_folder(config, "fedprox_synthetic") as folder:
        found = draws(config)
        study = training.Study(
            _model(), _measured_together(stack([draw.dataset for draw in found])), (ALL_DEVICES,), (), config.rounds,
            config.evaluate_every, chunk=512, metrics=METRICS, mesh=sweep.run_mesh())
        rows: list[pd.DataFrame] = []
        for dropped, mus in ((False, config.mu), (True, (0.0,))):
            arms = arms_of(config, dropped=dropped)
            runs, seeds, variants = _runs(found, mus)
            fits = training.fit(study, arms, seeds, runs, variants=variants, folder=folder, resume=config.resume) if arms else {}
            rows += [fit.rows for fit in fits.values()]
        fedprox_report.conclude(folder, config, pd.concat(rows, ignore_index=True))


def _model() -> Model:
    """Multinomial logistic regression, which starts as TensorFlow's dense layers do."""
    layer = nn.Dense(10, kernel_init=nn.initializers.glorot_uniform())
    return models.bridge(layer, jnp.zeros((1, 60)), models.softmax_cross_entropy, name="logistic regression")


def _runs(found: list[Draw], mus: tuple[float, ...]) -> tuple[training.Runs, list[int], list[str]]:
    """Every draw with every mu, as rows; their data seeds and the rest of their names."""
    rows = [(i, mu) for i in range(len(found)) for mu in mus]
    seeds = [found[i].seed for i, _ in rows]
    runs = training.seeds_of(seeds, stacked=True)._replace(
        data=jnp.array([i for i, _ in rows], jnp.int32), hyper=jnp.array([mu for _, mu in rows], jnp.float32))
    return runs, seeds, [fedprox_report.variant(mu, found[i].name) for i, mu in rows]


def _measured_together(splits: Splits) -> Splits:
    """The paper's measures: loss on all training records (as split "validation", which nothing is chosen by), accuracy on all test
    records."""
    return splits._replace(validation=as_one_site(splits.train), test=as_one_site(splits.test))


REPRODUCTION = Reproduction(fedprox_report.claims)


if __name__ == "__main__":
    cli.main(run, Config)
