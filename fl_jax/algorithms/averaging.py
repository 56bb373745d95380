"""Algorithms that train one global model by averaging: FedSGD, FedAvg, FedProx, and FedOpt with its adaptive servers."""

from typing import TypedDict, Unpack

import jax.numpy as jnp
import optax

from fl_jax import aggregators, batches, clients, deployment, gradients
from fl_jax.core import ONE_LANE, Engine, federate
from fl_jax.norms import AVERAGED, NormPolicy, named
from fl_jax.transforms import averaging_statistics, proximal, scale_by_server_moments
from fl_jax.types import Aggregator, Array, Batches, Client, Deploy, FederatedAlgorithm, Gradient, Model, Uplink

Scalar = float | Array


class Options(TypedDict, total=False):
    """What every algorithm here takes by keyword and passes on to `fedavg`.

    aggregator: by default the mean weighted by the cohort's weights. norms: the BatchNorm policy. gradient: the oracle, by default
    gradients.plain(model). uplink: what happens to messages before they leave their sites, e.g. uplink.local_dp. deploy: what a site does
    with the model before it uses it, e.g. deployment.fine_tuned. engine: how a round is executed.
    """

    aggregator: Aggregator | None
    norms: NormPolicy
    gradient: Gradient | None
    uplink: Uplink | None
    deploy: Deploy | None
    engine: Engine


def fedavg(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, *, server: optax.GradientTransformation | None = None,
    **options: Unpack[Options],
) -> FederatedAlgorithm:
    """FedAvg: sites train locally, the server averages (McMahan et al. 2017, "Communication-efficient learning of deep networks from
    decentralized data", Algorithm 1).

    optimizer: the sites' optax optimizer, fresh in each round. batches: e.g. batches.epochs(5, 10). server: an optax optimizer of the
    pseudo-gradient (FedOpt); by default plain averaging. Statistics are averaged whatever the server.
    """
    client = sent_by(local_client(model, optimizer, batches, options), options)
    return joined(model, client, options, server=averaging_statistics(server) if server is not None else None)


def oracle_of(model: Model, options: Options) -> Gradient:
    """The gradient oracle of the options, by default the plain one."""
    return options.get("gradient") or gradients.plain(model)


def local_client(model: Model, optimizer: optax.GradientTransformation, batches: Batches, options: Options) -> Client:
    """The client of `fedavg`, before its uplink: for algorithms that add to it."""
    is_local = options.get("norms", AVERAGED).is_local
    return clients.local_training(model, oracle_of(model, options), optimizer, batches, is_local=is_local)


def sent_by(client: Client, options: Options) -> Client:
    """The client with the uplink of the options, if they have one."""
    transform = options.get("uplink")
    return client if transform is None else clients.uplink(client, transform)


def joined(
    model: Model, client: Client, options: Options, *, aggregator: Aggregator | None = None,
    server: optax.GradientTransformation | None = None, policy: str | None = None,
) -> FederatedAlgorithm:
    """A client with what the options say of aggregator, deployment and engine. aggregator: in place of theirs; server: by default plain
    averaging; policy: what becomes of BatchNorm, by default the options' policy. One that recalibrates comes before the options' own
    deployment."""
    steps, norms = [options.get("deploy")], options.get("norms", AVERAGED)
    if norms.recalibrate:
        steps.insert(0, deployment.recalibrated(model, batches.epochs(1, client.batches.size)))
    client = deployment.deploying(client, *(step for step in steps if step is not None))
    aggregator = aggregator or aggregator_of(options)
    algorithm = federate(client, aggregator, server or optax.sgd(1.0), options.get("engine", ONE_LANE))
    return algorithm._replace(norms=named(model, policy or norms.name))


def aggregator_of(options: Options) -> Aggregator:
    """The aggregator of the options, by default the mean."""
    return options.get("aggregator") or aggregators.mean()


def of_its_own(name: str, part: str, options: Options) -> None:
    """Raises TypeError where the options have a part that the algorithm of this name has of its own."""
    if part in options:
        raise TypeError(f"{name} has {part} of its own: leave out `{part}`.")


def fedsgd(
    model: Model, learning_rate: Scalar, batches: Batches, *,
    aggregator: Aggregator | None = None, gradient: Gradient | None = None, engine: Engine = ONE_LANE,
) -> FederatedAlgorithm:
    """FedSGD: one step on the average of the sites' full gradients (McMahan et al. 2017, section 2).

    batches: one epoch, in batches as large as memory allows; the gradient is summed up over them.
    """
    client = clients.full_gradient(gradient or gradients.plain(model), batches)
    algorithm = federate(client, aggregator or aggregators.mean(), averaging_statistics(optax.sgd(learning_rate)), engine)
    return algorithm._replace(norms=named(model, AVERAGED.name))


def fedprox(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, mu: Scalar, **options: Unpack[Options]
) -> FederatedAlgorithm:
    """FedProx: FedAvg whose sites minimise F_k(w) + mu/2 |w - w_t|^2 (Li et al. 2020, "Federated optimization in heterogeneous
    networks", eq. 2 and Algorithm 2). mu = 0 is FedAvg. Its other half, keeping what stragglers did, is sampling.with_stragglers."""
    return fedavg(model, optax.chain(proximal(mu), optimizer), batches, **options)


def fedavgm(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, *,
    server_learning_rate: Scalar = 1.0, momentum: Scalar = 0.9, **options: Unpack[Options],
) -> FederatedAlgorithm:
    """FedAvgM: server momentum, v <- momentum v + pseudo-gradient, w <- w - lr v (Hsu et al. 2019, "Measuring the effects of
    non-identical data distribution for federated visual classification", section 3.3)."""
    return fedavg(model, optimizer, batches, server=optax.sgd(server_learning_rate, momentum), **options)


def fedadam(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, *, server_learning_rate: Scalar,
    b1: Scalar = 0.9, b2: Scalar = 0.99, tau: Scalar = 1e-3, **options: Unpack[Options],
) -> FederatedAlgorithm:
    """FedAdam: v <- b2 v + (1 - b2) g^2 (Reddi et al. 2021, "Adaptive federated optimization", Algorithm 2; no bias correction)."""
    server = scale_by_server_moments(lambda v, g: b2 * v + (1 - b2) * g**2, b1, tau)
    return fedavg(model, optimizer, batches, server=_descend(server, server_learning_rate), **options)


def fedyogi(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, *, server_learning_rate: Scalar,
    b1: Scalar = 0.9, b2: Scalar = 0.99, tau: Scalar = 1e-3, **options: Unpack[Options],
) -> FederatedAlgorithm:
    """FedYogi: v <- v - (1 - b2) g^2 sign(v - g^2) (Reddi et al. 2021, Algorithm 2)."""
    server = scale_by_server_moments(lambda v, g: v - (1 - b2) * g**2 * jnp.sign(v - g**2), b1, tau)
    return fedavg(model, optimizer, batches, server=_descend(server, server_learning_rate), **options)


def fedadagrad(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, *, server_learning_rate: Scalar,
    b1: Scalar = 0.0, tau: Scalar = 1e-3, **options: Unpack[Options],
) -> FederatedAlgorithm:
    """FedAdagrad: v <- v + g^2 (Reddi et al. 2021, Algorithm 2; b1 = 0 as in its experiments)."""
    server = scale_by_server_moments(lambda v, g: v + g**2, b1, tau)
    return fedavg(model, optimizer, batches, server=_descend(server, server_learning_rate), **options)


def _descend(direction: optax.GradientTransformation, learning_rate: Scalar) -> optax.GradientTransformation:
    return optax.chain(direction, optax.scale(-1.0 * learning_rate))
