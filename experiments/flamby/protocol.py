"""FLamby's protocol for small tabular federations: what a study of it states beforehand.

FLamby (Ogier du Terrail et al. 2022, arXiv 2210.04620), as its code at github.com/owkin/FLamby has it: a round is 100 SGD updates
at every site, in batches without replacement; the server weights sites by records. Its adaptive servers have beta1 .9, beta2
.999, tau 1e-8 and no bias correction, FedAdagrad's beta1 included. Its pooled and local arms are not trained in rounds: Adam, for
a number of epochs. Its Cyclic trains one site a round, but each site a model of its own, and tests the first site's: nothing is
handed on. It is here beside cyclic weight transfer proper. Every model starts where PyTorch's linear layer starts with the seed,
and is tested at every site; FLamby's own runs are those of seeds 42 to 46.

One thing is different here: the batches of a round begin a new pass over a site's records, where FLamby's go on with the last
one.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.common import cli
from experiments.common.config import at_least_one
from fl_jax.data import FederatedDataset
from fl_jax.metrics import Metric
from fl_jax.results import Claim, Direction
from fl_jax.types import Model

FIRST_SEED = 42
LOCAL, POOLED, POOLED_OWN_SCALE = "local {}", "pooled", "pooled, own scales"
NOT_PASSED_ON = "cyclic, not passed on"

Load = Callable[[Sequence[str]], FederatedDataset]
"""(sites held out) -> the data set."""


@dataclasses.dataclass(frozen=True)
class Config(cli.Common):
    """What every study of FLamby's protocol takes."""

    seeds: int = 100
    """initialisations, PyTorch's of seeds 42, 43, ..., all in one program with each site left out in turn"""
    rounds: int = 15
    """rounds of the federated arms"""
    updates: int = 100
    """SGD updates of a site in a round"""
    epochs: int = 50
    """passes over the records of the pooled and local arms"""
    evaluate_every: int = 3
    """measure the federated arms after so many rounds"""
    matched: bool = True
    """also the arms with matched budgets"""
    leave_out: bool = True
    """also train without each site in turn, and test there"""

    def __post_init__(self) -> None:
        at_least_one(self, "seeds", "rounds", "updates", "epochs", "evaluate_every")

    @property
    def torch_seeds(self) -> list[int]:
        """The seeds of the runs."""
        return list(range(FIRST_SEED, FIRST_SEED + self.seeds))


class Rates(NamedTuple):
    """Learning rates of the published runs: of the sites' SGD, then, for the adaptive servers, of the server; mu is FedProx's."""

    fedavg: float
    fedprox: float
    mu: float
    fedadam: tuple[float, float]
    fedyogi: tuple[float, float]
    fedadagrad: tuple[float, float]
    cyclic: float
    adam: float

    def of_sites(self) -> dict[str, float]:
        """The learning rate of the sites' SGD in each federated arm, by the arm's name."""
        return {
            "FedAvg": self.fedavg, "FedProx": self.fedprox, "FedAdam": self.fedadam[0], "FedYogi": self.fedyogi[0],
            "FedAdagrad": self.fedadagrad[0], "cyclic": self.cyclic}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A data set of FLamby.

    load: the data as the federated and local arms see them. load_pooled: as the pooled arm trains on them, where that is
    something else. model: (features) -> the model. metrics: what is measured, by name; `metric` is the one that FLamby publishes.
    published: arm -> the metric's mean over the sites' test sets in each of the five published runs, of seeds 42 to 46. bars: arm
    -> how far its mean may be from the published one. known: arm -> why it is farther over all initialisations.
    """

    name: str
    load: Load
    load_pooled: Load | None
    model: Callable[[int], Model]
    metrics: Mapping[str, Metric]
    metric: str
    batch_size: int
    rates: Rates
    published: Mapping[str, Sequence[float]]
    bars: Mapping[str, float]
    known: Mapping[str, str]

    def claims(self, config: Config) -> list[Claim]:
        """For each bar two: an arm's mean over all initialisations, and over those of the published runs alone."""
        del config  # the quick form has the same protocol
        found = []
        for arm, tolerance in self.bars.items():
            values = self.published[arm]
            spread = np.std(values, ddof=1)
            reason = f"{len(values)} published runs of standard deviation {spread:.3f}; batches come in another order"
            for text, known in ((over_all(arm), self.known), (over_published(arm), {})):
                found.append(Claim(
                    text, "arXiv 2210.04620, runs of seeds 42-46", round(float(np.mean(values)), 4), Direction.WITHIN, tolerance,
                    reason, expected=arm not in known, cause=known.get(arm, ""), digits=4))
        return found


def over_all(arm: str) -> str:
    """The claim about an arm's mean over all initialisations."""
    return f"{arm}, mean of sites"


def over_published(arm: str) -> str:
    """The claim about an arm's mean over the initialisations of FLamby's own runs."""
    return f"{arm}, mean of sites, initialised as published"


def local_only(rate: float) -> str:
    """The name of the arm in which every site trains and deploys its own model, with the updates of the federated arms."""
    return f"local only, SGD {rate:.3g}"


def centralized(rate: float) -> str:
    """The name of the arm with all records in one place, and in a round as many updates as all sites make together."""
    return f"centralized, SGD {rate:.3g}"
