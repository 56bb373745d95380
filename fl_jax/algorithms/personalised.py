"""Algorithms in which every site deploys a model of its own: parts of the network that stay, or a second network beside the shared one."""

from functools import partial
from typing import Unpack

import optax

from fl_jax import personal
from fl_jax.algorithms.averaging import Options, Scalar, fedavg, joined, local_client, of_its_own, oracle_of, sent_by
from fl_jax.clients import by_path
from fl_jax.norms import AVERAGED, LOCAL, LOCAL_STATISTICS, NormPolicy
from fl_jax.transforms import chosen_leaves, during, proximal
from fl_jax.types import Batches, Client, FederatedAlgorithm, IsLocal, Model

OWN = "own model's local"


def fedbn(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, **options: Unpack[Options]
) -> FederatedAlgorithm:
    """FedBN: FedAvg of everything but BatchNorm layers, which stay at their sites with their statistics (Li et al. 2021, "FedBN:
    Federated learning on non-IID features via local batch normalization", Algorithm 1). On a model without BatchNorm it is FedAvg."""
    options.setdefault("norms", LOCAL)
    return fedavg(model, optimizer, batches, **options)


def silobn(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, **options: Unpack[Options]
) -> FederatedAlgorithm:
    """SiloBN: FedAvg in which BatchNorm's statistics stay at their sites, and its scale and bias are shared (Andreux et al. 2020, "Siloed
    federated learning for multi-centric histopathology datasets", section 3)."""
    options.setdefault("norms", LOCAL_STATISTICS)
    return fedavg(model, optimizer, batches, **options)


def layers(*names: str) -> IsLocal:
    """The leaves of the modules of these names at the top of a network, e.g. layers("Dense_1") for the head of a TabularNet."""

    def is_local(path: tuple[str, ...], module: type) -> bool:
        del module
        return path[1] in names

    return is_local


def fedper(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, head: IsLocal, **options: Unpack[Options]
) -> FederatedAlgorithm:
    """FedPer: the head stays at its site and trains with the shared body (Arivazhagan et al. 2019, "Federated learning with personalization
    layers", Algorithms 1 and 2). head: e.g. layers("Dense_1"); what the BatchNorm policy keeps stays as well."""
    return fedavg(model, optimizer, batches, **_keeping(head, "head local", options))


def lg_fedavg(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, head: IsLocal, **options: Unpack[Options]
) -> FederatedAlgorithm:
    """LG-FedAvg: the representation stays at its site and the head is shared (Liang et al. 2020, "Think locally, act globally: Federated
    learning with local and global representations", Algorithm 1). The opposite of FedPer; the paper starts from a FedAvg model."""
    return fedavg(model, optimizer, batches, **_keeping(lambda path, module: not head(path, module), "body local", options))


def fedrep(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, head: IsLocal, *, head_share: Scalar = 0.5,
    **options: Unpack[Options],
) -> FederatedAlgorithm:
    """FedRep: in a round a site first trains its own head, with the body as it came, and then the body, with the head fixed (Collins et
    al. 2021, "Exploiting shared representations for personalized federated learning", Algorithm 1).

    head_share: of the round's steps that are the head's, e.g. 10 / 11 with batches.epochs(11, B) for ten epochs of the head and one of
    the body. optimizer: of both, each in its own phase.
    """
    phases = {True: during(optimizer, 0.0, head_share), False: during(optimizer, head_share, 1.0)}
    in_turn = optax.partition(phases, partial(chosen_leaves, chosen=by_path(model, head)))
    return fedper(model, in_turn, batches, head, **options)


def ditto(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, strength: Scalar, *,
    own_optimizer: optax.GradientTransformation | None = None, **options: Unpack[Options],
) -> FederatedAlgorithm:
    """Ditto: FedAvg, and beside it at every site a model of its own that minimises F_k(v) + strength/2 |v - w|^2 and is deployed (Li et al. 2021,
    "Ditto: Fair and robust federated learning through personalization", Algorithm 1). Strength 0 is local training.

    own_optimizer: of the own model; by default the shared one's. A round costs two trainings, a site keeps a copy of the model.
    """
    own = _own(model, optax.chain(proximal(strength), own_optimizer or optimizer), batches, options)
    client = personal.beside(sent_by(local_client(model, optimizer, batches, options), options), own)
    return joined(model, client, options, policy=f"{OWN}; shared model's {options.get('norms', AVERAGED).name}")


def mr_mtl(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, strength: Scalar, **options: Unpack[Options]
) -> FederatedAlgorithm:
    """MR-MTL: mean-regularized multi-task learning; every site has its own model, pulled by strength/2 |v - mean|^2 to the mean of all (Liu et al.
    2022, "On privacy and personalization in cross-silo federated learning", Algorithm A1). Strength 0 is local training."""
    of_its_own("MR-MTL", "norms", options)
    client = personal.pulled_to_mean(_own(model, optax.chain(proximal(strength), optimizer), batches, options))
    client = sent_by(client, options)
    return joined(model, client, options, policy=OWN)


def pfedme(
    model: Model, batches: Batches, *, strength: Scalar = 15.0, inner_steps: int = 5, inner_rate: Scalar = 0.01, rate: Scalar = 0.005,
    beta: Scalar = 1.0, **options: Unpack[Options],
) -> FederatedAlgorithm:
    """pFedMe: the shared model descends the Moreau envelopes of the sites' losses, whose minimisers the sites deploy (T. Dinh et al. 2020,
    "Personalized federated learning with Moreau envelopes", Algorithm 1; lambda 15, K 5 as in its experiments).

    beta: of the server, w <- (1 - beta) w + beta mean w_i. Each batch costs `inner_steps` gradients.
    """
    of_its_own("pFedMe", "norms", options)
    client = sent_by(personal.moreau_envelope(
        model, oracle_of(model, options), batches, strength=strength, inner_steps=inner_steps, inner_rate=inner_rate, rate=rate), options)
    return joined(model, client, options, server=optax.sgd(beta), policy=OWN)


def apfl(
    model: Model, learning_rate: Scalar, batches: Batches, alpha: Scalar = 0.5, *, alpha_rate: Scalar = 0.0,
    optimizer: optax.GradientTransformation | None = None, **options: Unpack[Options],
) -> FederatedAlgorithm:
    """APFL: every site deploys a mixture, alpha v + (1 - alpha) w, of a model of its own and the shared one, and trains v for it (Deng et
    al. 2020, "Adaptive personalized federated learning", Algorithm 1). alpha 0 is FedAvg, 1 is local training.

    alpha_rate: by which alpha follows its own gradient (eq. 10); 0 keeps it. optimizer: of w, by default SGD at the learning rate of v.
    """
    gradient = oracle_of(model, options)
    client = local_client(model, optimizer or optax.sgd(learning_rate), batches, options)
    client = sent_by(personal.mixture(client, gradient, alpha=alpha, rate=learning_rate, alpha_rate=alpha_rate), options)
    return joined(model, client, options)


def fedala(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, top: IsLocal, *, rate: Scalar = 1.0, share: Scalar = 0.8,
    first_passes: int = 10, **options: Unpack[Options],
) -> FederatedAlgorithm:
    """FedALA: a site begins each round not at the shared model but at its own, moved towards it by learned weights in the top layers (Zhang et
    al. 2023, "FedALA: Adaptive local aggregation for personalized federated learning", Algorithm 1; rate and share as there).

    top: the paper's p highest layers, e.g. layers("Dense_1"). first_passes: in its second round a site learns its weights for so many
    passes; the paper's until the loss settles. A rate of 0 keeps all weights at 1, which is FedAvg.
    """
    client = local_client(model, optimizer, batches, options)
    client = personal.blended(client, model, oracle_of(model, options), top, rate=rate, share=share, first_passes=first_passes)
    return joined(model, sent_by(client, options), options, policy=f"{OWN}; shared model's {options.get('norms', AVERAGED).name}")


def _own(model: Model, optimizer: optax.GradientTransformation, batches: Batches, options: Options) -> Client:
    return personal.own_training(model, oracle_of(model, options), optimizer, batches)


def _keeping(local: IsLocal, name: str, options: Options) -> Options:
    """The options with the BatchNorm policy widened by what else stays at the site."""
    policy = options.get("norms", AVERAGED)
    both = NormPolicy(f"{policy.name}, {name}", lambda path, module: local(path, module) or policy.is_local(path, module))
    return {**options, "norms": both}
