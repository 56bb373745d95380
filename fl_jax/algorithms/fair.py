"""Algorithms that train one global model for all sites and not for their mean: q-FedAvg.

It evaluates the broadcast model on a site's training records before it trains, one forward pass a round, and sends one number beside the
model. The number is exact: no private oracle covers it.
"""

from typing import Unpack

import optax

from fl_jax import aggregators, corrections, measured
from fl_jax.algorithms.averaging import Options, Scalar, joined
from fl_jax.algorithms.drift import corrected_client, of_its_own
from fl_jax.types import Batches, FederatedAlgorithm, Model


def q_fedavg(
    model: Model, learning_rate: Scalar, batches: Batches, q: Scalar, *, optimizer: optax.GradientTransformation | None = None,
    lipschitz: Scalar | None = None, **options: Unpack[Options],
) -> FederatedAlgorithm:
    """q-FedAvg: the server descends sum_k w_k F_k^(q + 1) / (q + 1), which weighs a site by its loss, w <- w - sum D_k / sum h_k with
    D_k = F_k^q L (w - w_k) and h_k = q F_k^(q - 1) |L (w - w_k)|^2 + L F_k^q (Li et al. 2020, "Fair resource allocation in federated
    learning", Algorithm 2). q = 0 is FedAvg; a larger q makes losses more alike.

    F_k: the loss of the broadcast model, in evaluation mode, over all records of the site, 1e-10 at least. L: `lipschitz`, by default
    1 / learning_rate, as in the published code. Where the sampler weighs sites, D_k and h_k have its weights; the paper draws sites by
    their numbers of records and weighs them equally (sampling.equal). optimizer: the sites', by default SGD.
    """
    of_its_own("q-FedAvg", "aggregator", options)
    correction = corrections.told_loss(measured.mean_loss(model, batches.size))
    client = corrected_client(model, optimizer or optax.sgd(learning_rate), batches, correction, options)
    curvature = 1 / learning_rate if lipschitz is None else lipschitz
    return joined(model, client, options, aggregator=aggregators.tilted_mean(q, curvature))
