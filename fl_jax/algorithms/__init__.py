"""One short function per paper: each joins a client, an aggregator and an optax server."""

from fl_jax.algorithms.adapted import fedavg_tuned, fedbabu, per_fedavg
from fl_jax.algorithms.averaging import Options, fedadagrad, fedadam, fedavg, fedavgm, fedprox, fedsgd, fedyogi
from fl_jax.algorithms.baselines import centralized, local_only, matched_budget, pooled_batches
from fl_jax.algorithms.clustered import ifca
from fl_jax.algorithms.cyclic import cyclic, in_turn
from fl_jax.algorithms.drift import feddyn, fednova, fedprox_adaptive, mime_lite, moon, scaffold
from fl_jax.algorithms.fair import agnostic, q_fedavg
from fl_jax.algorithms.personalised import apfl, ditto, fedala, fedbn, fedper, fedrep, layers, lg_fedavg, mr_mtl, pfedme, silobn

__all__ = [
    "Options", "agnostic", "apfl", "centralized", "cyclic", "ditto", "fedadagrad", "fedadam", "fedala", "fedavg", "fedavg_tuned",
    "fedavgm", "fedbabu", "fedbn", "feddyn", "fednova", "fedper", "fedprox", "fedprox_adaptive", "fedrep", "fedsgd", "fedyogi", "ifca",
    "in_turn", "layers", "lg_fedavg", "local_only", "matched_budget", "mime_lite", "moon", "mr_mtl", "per_fedavg", "pfedme",
    "pooled_batches", "q_fedavg", "scaffold", "silobn",
]
