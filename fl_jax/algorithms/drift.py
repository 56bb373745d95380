"""Algorithms that train one global model and undo the drift of clients whose data or steps differ: SCAFFOLD, FedDyn, FedNova, Mime-lite,
MOON, and FedProx with a mu that adapts."""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from fl_jax import aggregators, contrastive, corrections, measured
from fl_jax.algorithms.averaging import Options, Scalar, aggregator_of, joined, local_client, of_its_own, oracle_of, sent_by
from fl_jax.corrections import Corrected, Correction, Pull
from fl_jax.transforms import add_term, averaging_statistics, frozen, proximal
from fl_jax.types import Array, Batches, Client, FederatedAlgorithm, Model, PyTree, Variables


def scaffold(
    model: Model, learning_rate: Scalar, batches: Batches, *, optimizer: optax.GradientTransformation | None = None,
    server_learning_rate: Scalar = 1.0, **options: Unpack[Options],
) -> FederatedAlgorithm:
    """SCAFFOLD, option II (Karimireddy et al. 2020, "SCAFFOLD: Stochastic controlled averaging for federated learning", Algorithm 1).

    learning_rate: the sites'. optimizer: theirs, by default add_term() before SGD, as in the paper; another one says itself where the
    correction is added, e.g. after the momentum as in NIID-Bench: optax.chain(optax.trace(.9), add_term(), optax.scale(-lr)). The
    sites' controls are estimated as if it were plain SGD. server_learning_rate: eta_g; the server's control moves by the share of
    clients that took part, which keeps it the mean of theirs. Down and up, a client sends twice what FedAvg does.
    """
    optimizer = optax.chain(add_term(), optax.sgd(learning_rate)) if optimizer is None else optimizer
    client = corrected_client(model, optimizer, batches, corrections.control_variates(learning_rate), options)
    server = averaging_statistics(optax.sgd(server_learning_rate), others=optax.sgd(1.0))
    return joined(model, client, options, aggregator=aggregators.with_control(aggregator_of(options)), server=server)


def feddyn(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, alpha: Scalar = 0.01, **options: Unpack[Options]
) -> FederatedAlgorithm:
    """FedDyn: sites minimise F_i(w) - <h_i, w> + alpha/2 |w - w_t|^2, and the server steps by the mean of their ways and by its own memory of
    them (Acar et al. 2021, "Federated learning based on dynamic regularization", Algorithm 1; alpha .01 to .1 there).

    The paper's mean is over clients, not records: use sampling with `sampling.equal`. A site keeps one copy of the parameters.
    """
    optimizer = optax.chain(add_term(), proximal(alpha), optimizer)
    client = corrected_client(model, optimizer, batches, corrections.dynamic_regularizer(alpha), options)
    return joined(model, client, options, aggregator=aggregators.with_control(aggregator_of(options)), server=_with_memory(alpha))


def fednova(
    model: Model, learning_rate: Scalar, batches: Batches, *, momentum: Scalar = 0.0, optimizer: optax.GradientTransformation | None = None,
    **options: Unpack[Options],
) -> FederatedAlgorithm:
    """FedNova: sites that make more steps do not pull harder; each way is divided by its length before the mean (Wang et al. 2020, "Tackling the
    objective inconsistency problem in heterogeneous federated optimization", eq. 9 to 11).

    momentum: of the sites' SGD, in which tau steps have the length (tau - m (1 - m^tau) / (1 - m)) / (1 - m) (section 4). optimizer: by
    default that SGD; another one needs a length that this formula gives.
    """
    of_its_own("FedNova", "aggregator", options)

    def length(steps: Array) -> Array:
        return (steps - momentum * (1 - jnp.float32(momentum) ** steps) / (1 - momentum)) / (1 - momentum)

    optimizer = optax.sgd(learning_rate, momentum) if optimizer is None else optimizer
    client = corrected_client(model, optimizer, batches, corrections.counted(length), options)
    return joined(model, client, options, aggregator=aggregators.normalized_mean())


def mime_lite(
    model: Model, learning_rate: Scalar, batches: Batches, *, momentum: Scalar = 0.9, optimizer: optax.GradientTransformation | None = None,
    **options: Unpack[Options],
) -> FederatedAlgorithm:
    """Mime-lite: sites step with the server's optimizer, whose statistics are frozen in a round; after it they follow the mean of the sites' full
    gradients at the broadcast model (Karimireddy et al. 2021, "Breaking the centralized barrier for cross-device federated learning",
    Algorithm 1, MimeLite). Momentum 0 is FedAvg.

    momentum: beta of the paper's SGDm, whose direction is (1 - beta) g + beta m with m <- (1 - beta) g + beta m; .9 as in its experiments.
    optimizer: another one of optax. Its update with the frozen state is the step and what it would make of that state is dropped, so that
    Adam's step has this batch's share of the second moment, as in FedJAX; a schedule counts rounds. Both means have the cohort's
    weights. A site passes twice over its records, once for its full gradient, in training mode (BatchNorm by batch), and keeps nothing;
    it receives and sends the state beside the model. The full gradient is exact: a private oracle is refused.
    """
    if optimizer is None:
        optimizer = optax.sgd((1 - momentum) * learning_rate, momentum)  # whose trace is the paper's m over 1 - beta
    correction = corrections.frozen_state(optimizer, measured.full_gradient(oracle_of(model, options), batches.size))
    client = corrected_client(model, frozen(optimizer), batches, correction, options)
    aggregator = aggregators.with_control(aggregator_of(options), aggregators.mean())
    return joined(model, client, options, aggregator=aggregator, server=_following(optimizer))


def moon(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, head: str, mu: Scalar, *, tau: Scalar = 0.5,
    **options: Unpack[Options],
) -> FederatedAlgorithm:
    """MOON: FedAvg whose sites add mu times a contrastive loss to their own, which draws the representation of a record to that of the broadcast
    model and away from that of the site's model of its last round (Li, He, Song 2021, "Model-contrastive federated learning", eq. 3 to 5
    and Algorithm 1; tau .5 as there, mu tuned among .1, 1, 5 and 10). mu = 0 is FedAvg.

    head: the module at the top of a flax linen network that takes the representation, e.g. "Dense_1" of a TabularNet; the paper has a
    projection head before it. Which pass is in which mode: contrastive.contrastive. A site keeps one model, and a step costs
    two forward passes more. A site's first round, which no model of its own came before, is FedAvg's.
    """
    of_its_own("MOON", "gradient", options)
    client = local_client(model, optimizer, batches, {**options, "gradient": contrastive.contrastive(model, head, mu, tau)})
    return joined(model, sent_by(contrastive.remembering(client), options), options)


def fedprox_adaptive(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, mu: Scalar = 0.0, *, change: Scalar = 0.1,
    patience: int = 5, **options: Unpack[Options],
) -> FederatedAlgorithm:
    """FedProx whose mu moves at the server: up by `change` when the loss rises, down by it, and not below 0, when the loss has fallen `patience`
    rounds in a row, which are then counted anew (Li et al. 2020, "Federated optimization in heterogeneous networks", appendix C.3.3;
    mu starts at 1 for its IID data and at 0 for the others, both meant to be wrong). A change of 0 is FedProx.

    The loss is that of the broadcast model, in evaluation mode, over all records of the cohort's sites, with the cohort's weights: the
    paper's f(w) where all take part; else it also moves with who was drawn. What it says of the model of a round changes the mu of the
    next. A site passes once more over its records, forward, and sends a number, which is exact: no private oracle covers it.
    """
    correction = corrections.broadcast_pull(mu, measured.mean_loss(model, batches.size))
    client = corrected_client(model, optax.chain(proximal(None), optimizer), batches, correction, options)
    aggregator = aggregators.with_control(aggregator_of(options), aggregators.mean())
    return joined(model, client, options, aggregator=aggregator, server=_moving_pull(change, patience))


def corrected_client(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, correction: Correction, options: Options
) -> Client:
    """The client of `fedavg` with a correction, and then its uplink."""
    return sent_by(corrections.corrected(local_client(model, optimizer, batches, options), correction), options)


def _with_memory(alpha: Scalar) -> optax.GradientTransformationExtraArgs:
    """FedDyn's server: h <- h - alpha (1/m) sum (w_k - w), w <- mean w_k - h / alpha, of pseudo-gradients w - w_k."""

    def init(shared: Corrected) -> PyTree:
        return jax.tree.map(jnp.zeros_like, shared.variables.params)

    def update(updates: Corrected, memory: PyTree, shared: PyTree = None, *, participation: Array, **_: PyTree):
        del shared
        params, stats = updates.variables
        memory = jax.tree.map(lambda h, d: h + alpha * participation * d, memory, params)
        stepped = jax.tree.map(lambda d, h: -d - h / alpha, params, memory)
        return Corrected(Variables(stepped, jax.tree.map(jnp.negative, stats)), updates.control), memory

    return optax.GradientTransformationExtraArgs(init, update)


def _following(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Mime-lite's server: averages models, and the broadcast state of `optimizer` follows the mean gradient."""

    def update(updates: Corrected, state: optax.EmptyState, shared: Corrected):
        gradient = corrections.sent_gradient(optimizer, updates.control, shared.variables.params)
        _, after = optimizer.update(gradient, shared.control, shared.variables.params)
        return Corrected(optax.tree.scale(-1, updates.variables), optax.tree.sub(after, shared.control)), state

    return optax.GradientTransformation(lambda shared: optax.EmptyState(), update)


class Trend(NamedTuple):
    """loss: float32, of the last round. falls: int32, how many rounds in a row it has fallen; -1 before the first."""

    loss: Array
    falls: Array


def _moving_pull(change: Scalar, patience: int) -> optax.GradientTransformation:
    """The server of FedProx with adaptive mu: averages models, and moves the broadcast mu by the mean loss."""

    def update(updates: Corrected, trend: Trend, shared: Corrected):
        loss, mu = updates.control.loss, shared.control.mu
        falls = jnp.where(loss < trend.loss, trend.falls + 1, 0)
        enough = falls >= patience
        after = jnp.maximum(mu + jnp.where(loss > trend.loss, change, 0) - jnp.where(enough, change, 0), 0)
        control = Pull(after - mu, jnp.zeros_like(loss))
        return Corrected(optax.tree.scale(-1, updates.variables), control), Trend(loss, jnp.where(enough, 0, falls))

    return optax.GradientTransformation(lambda shared: Trend(jnp.float32(jnp.inf), jnp.int32(-1)), update)
