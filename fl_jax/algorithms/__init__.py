"""One short function per paper: each joins a client, an aggregator and an optax server."""

from fl_jax.algorithms.averaging import Options, fedadagrad, fedadam, fedavg, fedavgm, fedprox, fedsgd, fedyogi
from fl_jax.algorithms.baselines import centralized, local_only, matched_budget, pooled_batches
from fl_jax.algorithms.personalised import fedbn

__all__ = [
    "Options", "centralized", "fedadagrad", "fedadam", "fedavg", "fedavgm", "fedbn", "fedprox", "fedsgd", "fedyogi", "local_only",
    "matched_budget", "pooled_batches",
]
