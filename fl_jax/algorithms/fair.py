"""Algorithms that train one global model for all sites and not for their mean: q-FedAvg and agnostic (worst-site) averaging.

Both evaluate the broadcast model on a site's training records before it trains, one forward pass a round, and send one number beside the
model. These numbers are exact: no private oracle covers them, and both are aggregators of their own.
"""

from typing import Unpack

import optax

from fl_jax import aggregators, corrections, measured
from fl_jax.algorithms.averaging import Options, Scalar, joined, of_its_own
from fl_jax.algorithms.drift import corrected_client
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


def agnostic(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, rate: Scalar, **options: Unpack[Options]
) -> FederatedAlgorithm:
    """Agnostic averaging: min over w of the max over mixtures lambda of sum_k lambda_k F_k(w), by descent in w and ascent in lambda (Mohri et al.
    2019, "Agnostic federated learning", section 4, Stochastic-AFL). Rate 0 keeps the sampler's weights: FedAvg.

    rate: of the ascent. Where the paper adds rate F_k to lambda_k and projects on the simplex, lambda_k is multiplied here by
    e^(rate (F_k - F)), F the mean loss of the round before under lambda, and the mean normalises: exponentiated gradient, for which a
    site needs to keep no more than its own log weight and the server needs nothing of who took part. With all sites F changes nothing;
    with some it keeps the weights of those who were not drawn where they are among the others, but for what the loss changed in a
    round. No weight becomes 0. It moves with the second round. The descent is a round of local training instead of one step.
    F_k: the loss of the broadcast model, in evaluation mode, over all records of the site; a round uses the weights from before it.
    """
    of_its_own("Agnostic averaging", "aggregator", options)
    correction = corrections.ascent(rate, measured.mean_loss(model, batches.size))
    client = corrected_client(model, optimizer, batches, correction, options)
    return joined(model, client, options, aggregator=aggregators.tilted_mean())
