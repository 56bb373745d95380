"""Fed-Heart-Disease: FLamby's results for logistic regression at four hospitals, and what of them is protocol.

Ogier du Terrail et al. 2022, "FLamby: datasets and benchmarks for cross-silo federated learning in realistic healthcare settings"
(arXiv 2210.04620), with the per-seed results that its authors publish; experiments/flamby/protocol.py has the protocol.

    python -m experiments.fed_heart_disease            # 100 initialisations
    python -m experiments.fed_heart_disease --quick    # 20, without the arms with matched budgets

2 CPU cores: 95 s, quick 37 s, most of it compilation, which is kept for the next time. Expected, as the mean over the hospitals'
test sets, published / here from the same five starts / from 100: FedAvg .685 / .684 / .702, FedAdam .726 / .726 / .733, FedYogi and
FedAdagrad .731 / .732 / .734, pooled .735 / .735 / .736; no run of these differs from its published one by more than .005. Of the
distance from FedAvg to pooled training, .034 from 100 starts, a quarter is protocol: centralized training with FedAvg's SGD and as
many updates keeps .025. FedAdam beats centralized training with its own SGD by .020.
Data: `python -m fl_jax.data prepare fed_heart_disease`.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from experiments.common import cli
from experiments.common.reproduction import Reproduction
from experiments.flamby import protocol, study
from experiments.flamby.protocol import LOCAL, NOT_PASSED_ON, POOLED, Protocol, Rates
from fl_jax import models
from fl_jax.data import fed_heart_disease
from fl_jax.data.sources.heart_disease import HOSPITALS
from fl_jax.data.sources.heart_disease import POOLED as POOLED_SCALE
from fl_jax.metrics import CLASSIFICATION
from fl_jax.types import Model


@dataclasses.dataclass(frozen=True)
class Config(protocol.Config):
    """Fed-Heart-Disease: FLamby's arms beside its published results, the same with matched budgets, and each hospital left
    out."""

    @classmethod
    def quick_defaults(cls) -> "Config":
        """The same protocol with fewer initialisations, and without the arms with matched budgets."""
        return cls(seeds=20, matched=False)


def logistic_regression(num_features: int) -> Model:
    """One logit of a linear layer."""
    return models.bridge(nn.Dense(1), jnp.zeros((1, num_features)), models.sigmoid_cross_entropy, name="logistic regression")


PROTOCOL = Protocol(
    name="fed_heart_disease",
    load=lambda unseen: fed_heart_disease(unseen=unseen),
    load_pooled=lambda unseen: fed_heart_disease(unseen=unseen, statistics=POOLED_SCALE),
    model=logistic_regression,
    metrics={name: CLASSIFICATION[name] for name in ("accuracy", "auroc")},
    metric="accuracy",
    batch_size=4,
    rates=Rates(
        fedavg=0.001, fedprox=0.001, mu=0.01, fedadam=(0.01, 0.01), fedyogi=(10**-2.5, 0.01), fedadagrad=(10**-2.5, 10**-0.5),
        cyclic=0.01, adam=0.001),
    published={
        "FedAvg": (0.6915, 0.7198, 0.6427, 0.6943, 0.6765),
        "FedProx": (0.6915, 0.7198, 0.6427, 0.6943, 0.6765),
        "FedAdam": (0.7212, 0.7115, 0.7461, 0.7322, 0.7167),
        "FedYogi": (0.7240, 0.7194, 0.7513, 0.7350, 0.7271),
        "FedAdagrad": (0.7240, 0.7194, 0.7513, 0.7350, 0.7271),
        NOT_PASSED_ON: (0.7240, 0.7295, 0.6751, 0.7528, 0.7087),
        POOLED: (0.7391, 0.7343, 0.7367, 0.7343, 0.7319),
        LOCAL.format(HOSPITALS[0]): (0.7094, 0.7327, 0.6938, 0.7483, 0.7264),
        LOCAL.format(HOSPITALS[1]): (0.6285, 0.6309, 0.6333, 0.6490, 0.6021),
        LOCAL.format(HOSPITALS[2]): (0.6268, 0.6101, 0.4964, 0.5859, 0.5157),
        LOCAL.format(HOSPITALS[3]): (0.6747, 0.6067, 0.6552, 0.5852, 0.6614),
    },
    bars={"FedAdam": 0.025, "FedYogi": 0.025, "FedAdagrad": 0.025},
    known={},
)
REPRODUCTION = Reproduction(PROTOCOL.claims, datasets=("fed_heart_disease",))


def run(config: Config) -> None:
    """Runs the study and prints its report; writes a run folder."""
    study.run(PROTOCOL, config)


if __name__ == "__main__":
    cli.main(run, Config)
