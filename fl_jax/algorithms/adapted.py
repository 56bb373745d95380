"""Algorithms whose shared model is made to be adapted: FedAvg with fine-tuning, FedBABU, Per-FedAvg. What sites deploy is trained on their own
records after the last round, and so it is at a newcomer; nothing but the shared model is kept."""

from typing import Unpack

import optax

from fl_jax import batches as _batches
from fl_jax import deployment, gradients
from fl_jax.algorithms.averaging import Options, Scalar, fedavg, of_its_own, oracle_of
from fl_jax.clients import by_path, nothing_local
from fl_jax.transforms import only
from fl_jax.types import Batches, Deploy, FederatedAlgorithm, IsLocal, Model


def fedavg_tuned(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, tuning: Batches, *,
    tuning_optimizer: optax.GradientTransformation | None = None, fixed: IsLocal = nothing_local, **options: Unpack[Options],
) -> FederatedAlgorithm:
    """FedAvg whose sites fine-tune the shared model on their own records before they use it: the baseline of every personalised algorithm (Cheng,
    Chadha, Duchi 2021, "Fine-tuning is fine in federated learning").

    tuning: how long, e.g. batches.epochs(1, 10). tuning_optimizer: by default that of the rounds. fixed: leaves that are not tuned.
    """
    tune = deployment.fine_tuned(model, tuning_optimizer or optimizer, tuning, fixed=fixed)
    return fedavg(model, optimizer, batches, **_deploying("FedAvg with fine-tuning", tune, options))


def fedbabu(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, head: IsLocal, tuning: Batches, *,
    tuning_optimizer: optax.GradientTransformation | None = None, fixed: IsLocal = nothing_local, **options: Unpack[Options],
) -> FederatedAlgorithm:
    """FedBABU: in the rounds only the body is trained and shared, under a head that stays as it was initialised; sites then fine-tune (Oh, Kim,
    Yun 2022, "FedBABU: Toward enhanced representation for federated image classification", Algorithm 1).

    head: e.g. layers("Dense_1"). tuning: how long, the paper's 5 epochs for example; of all leaves but `fixed`, as there by default.
    """
    body = only(optimizer, by_path(model, lambda path, module: not head(path, module)))
    tune = deployment.fine_tuned(model, tuning_optimizer or optimizer, tuning, fixed=fixed)
    return fedavg(model, body, batches, **_deploying("FedBABU", tune, options))


def per_fedavg(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, inner_rate: Scalar, *, hessian_step: Scalar | None = None,
    **options: Unpack[Options],
) -> FederatedAlgorithm:
    """Per-FedAvg: FedAvg of the loss that is left after one step of gradient descent, which is the step that a site then takes (Fallah, Mokhtari,
    Ozdaglar 2020, "Personalized federated learning with theoretical guarantees: a model-agnostic meta-learning approach", Algorithm 1).

    optimizer: of the outer steps, SGD at the paper's beta. inner_rate: its alpha, .01 there. hessian_step: None for the first-order form
    (FO), its delta for the Hessian-free one (HF), e.g. .001; see gradients.meta. Inner rate 0 is FedAvg on a part of each batch.
    """
    gradient = gradients.meta(oracle_of(model, options), inner_rate, hessian_step=hessian_step)
    step = deployment.fine_tuned(model, optax.sgd(inner_rate), _batches.updates(1, batches.size))
    deployed = _deploying("Per-FedAvg", step, options)
    deployed["gradient"] = gradient
    return fedavg(model, optimizer, batches, **deployed)


def _deploying(name: str, step: Deploy, options: Options) -> Options:
    of_its_own(name, "deploy", options)
    return {**options, "deploy": step}
