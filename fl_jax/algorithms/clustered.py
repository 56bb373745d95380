"""Algorithms with several shared models: IFCA."""

from typing import Unpack

import optax

from fl_jax import clusters
from fl_jax.algorithms.averaging import Options, joined, local_client, of_its_own, sent_by
from fl_jax.types import Batches, FederatedAlgorithm, Key, Model


def ifca(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, num_clusters: int, key: Key, **options: Unpack[Options]
) -> FederatedAlgorithm:
    """IFCA: the server has a model for each cluster, and each site trains and deploys the one that fits its records best (Ghosh, Chung, Yin,
    Ramchandran 2020, "An efficient framework for clustered federated learning", Algorithm 1, model averaging). One cluster is FedAvg.

    key: draws the start of all models but the first, which is the run's own. Down go `num_clusters` models, up one. It may end in bad
    clusters; the paper starts several times and takes the best.
    """
    of_its_own("IFCA", "aggregator", options)
    client = clusters.nearest(local_client(model, optimizer, batches, options), model, num_clusters, key)
    return joined(model, sent_by(client, options), options, aggregator=clusters.mean_of_members())
