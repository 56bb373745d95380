"""One short function per paper: each joins a client, an aggregator and an optax server."""

from fl_jax.algorithms.averaging import Options, fedadagrad, fedadam, fedavg, fedavgm, fedprox, fedsgd, fedyogi
from fl_jax.algorithms.baselines import centralized, local_only, matched_budget, pooled_batches
from fl_jax.algorithms.cyclic import cyclic, in_turn
from fl_jax.algorithms.drift import feddyn, fednova, scaffold
from fl_jax.algorithms.personalised import fedbn

__all__ = [
    "Options", "centralized", "cyclic", "fedadagrad", "fedadam", "fedavg", "fedavgm", "fedbn", "feddyn", "fednova", "fedprox", "fedsgd", "fedyogi",
    "in_turn", "local_only", "matched_budget", "pooled_batches", "scaffold",
]
