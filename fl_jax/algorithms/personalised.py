"""Algorithms in which every site deploys a model of its own."""

from typing import Unpack

import optax

from fl_jax.algorithms.averaging import Options, fedavg
from fl_jax.norms import LOCAL
from fl_jax.types import Batches, FederatedAlgorithm, Model


def fedbn(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, **options: Unpack[Options]
) -> FederatedAlgorithm:
    """FedBN: FedAvg of everything but BatchNorm layers, which stay at their sites with their statistics (Li et al. 2021, "FedBN:
    Federated learning on non-IID features via local batch normalization", Algorithm 1). On a model without BatchNorm it is FedAvg."""
    options.setdefault("norms", LOCAL)
    return fedavg(model, optimizer, batches, **options)
