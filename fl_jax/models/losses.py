"""Losses: one value holds what training minimises over a batch and what evaluation reports for each record."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fl_jax.errors import FlJaxError
from fl_jax.types import Array, PyTree, Survival


class Loss(NamedTuple):
    """A training loss, and the same loss record by record.

    batch:  (outputs [B, K], y [B, ...], mask float32[B]) -> scalar: the mean over the unmasked rows; 0 if there is none
    record: (outputs [B, K], y [B, ...]) -> float32[B]; None where the loss is of the whole batch (a Cox partial likelihood)
    """

    batch: Callable[[Array, PyTree, Array], Array]
    record: Callable[[Array, PyTree], Array] | None


def masked_mean(values: Array, mask: Array) -> Array:
    """The mean of values [B] over the rows with mask > 0; 0 if there is none. A masked row may hold NaN, its gradient is 0."""
    active = mask > 0
    return jnp.sum(jnp.where(active, values, 0)) / jnp.maximum(jnp.sum(active), 1)


def per_record(record: Callable[[Array, PyTree], Array]) -> Loss:
    """The loss of a batch as the mean of a per-record loss.

    record: (outputs [B, K], y [B, ...]) -> float32[B].
    """

    def batch(outputs: Array, y: PyTree, mask: Array) -> Array:
        return masked_mean(record(outputs, y), mask)

    return Loss(batch, record)


def _softmax_cross_entropy(outputs: Array, y: Array) -> Array:
    if y.ndim != 1 or outputs.ndim != 2 or not jnp.issubdtype(y.dtype, jnp.integer):
        raise FlJaxError(
            f"softmax_cross_entropy takes logits [B, K] and integer labels [B]; it was given {outputs.shape} and "
            f"{y.dtype}{y.shape}."
        )
    # A one-hot product instead of an index: the gradient of indexing is a scatter, which the CPU executes row by row.
    chosen = jax.nn.one_hot(y, outputs.shape[-1], dtype=bool)
    loss = jax.nn.logsumexp(outputs, -1) - jnp.sum(jnp.where(chosen, outputs, 0), -1)
    return jnp.where((y >= 0) & (y < outputs.shape[-1]), loss, jnp.nan)


def _sigmoid_cross_entropy(outputs: Array, y: Array) -> Array:
    if outputs.ndim != 2 or outputs.shape[1] != 1 or y.shape not in (outputs.shape, outputs.shape[:1]):
        raise FlJaxError(
            "sigmoid_cross_entropy takes one logit a record, [B, 1], and labels 0 or 1 [B]; it was given "
            f"{outputs.shape} and {y.shape}."
        )
    logit, label = outputs[:, 0], y.reshape(-1).astype(outputs.dtype)
    return jnp.where((label >= 0) & (label <= 1), jax.nn.softplus(logit) - label * logit, jnp.nan)


def _squared_error(outputs: Array, y: Array) -> Array:
    if outputs.ndim == 2 and outputs.shape[1] == 1 and y.shape == outputs.shape[:1]:
        y = y[:, None]
    if y.shape != outputs.shape:
        raise FlJaxError(f"squared_error takes outputs and targets of one shape; it was given {outputs.shape} and {y.shape}.")
    return jnp.mean((outputs - y) ** 2, axis=tuple(range(1, outputs.ndim)))


def _cox_partial_likelihood(outputs: Array, y: Survival, mask: Array) -> Array:
    if not isinstance(y, Survival) or outputs.ndim != 2 or outputs.shape[1] != 1:
        raise FlJaxError(
            f"cox_partial_likelihood takes one risk a record, [B, 1], and y = fl_jax.types.Survival(time, event); it was given "
            f"{outputs.shape} and {type(y).__name__}."
        )
    active = mask > 0
    risk = jnp.where(active, outputs[:, 0], 0)
    at_risk = (y.time[None, :] >= y.time[:, None]) & active[None, :]  # row i: who is still seen at the time of record i
    # nobody need be at risk at the time of a padding row, and the logarithm of 0 has no gradient
    at_risk |= jnp.eye(risk.shape[0], dtype=bool)
    loss = jax.nn.logsumexp(jnp.broadcast_to(risk, at_risk.shape), axis=1, where=at_risk) - risk
    return masked_mean(jnp.where(y.event > 0, loss, 0), mask)


softmax_cross_entropy = per_record(_softmax_cross_entropy)
"""Multinomial cross-entropy in nats: logits [B, K], integer labels [B]. A label outside [0, K) gives NaN."""

sigmoid_cross_entropy = per_record(_sigmoid_cross_entropy)
"""Binary cross-entropy in nats: one logit a record [B, 1], labels 0 or 1 (bool, integer or float) [B] or [B, 1]. A label outside
[0, 1] gives NaN."""

squared_error = per_record(_squared_error)
"""Squared error: outputs [B, K], targets [B, K], or [B] where K = 1; the mean over the K outputs, without a factor 1/2."""

cox_partial_likelihood = Loss(_cox_partial_likelihood, None)
"""Cox's negative log partial likelihood of a batch (Cox 1972, "Regression models and life-tables"), in nats: risks (log hazards)
[B, 1], y a Survival of [B].

The mean over *all* unmasked records, of logsumexp(risks of those at risk) - risk at an event and of 0 where censored: with few
events the loss is small, and without one it is 0 with gradient 0. At risk is whoever's time is not below that of the event, in
this batch only: Breslow's way with ties (1974, "Covariance analysis of censored survival data"), which does not depend on the
order of the records. FLamby's Fed-TCGA-BRCA has the same loss but for ties: there the record that comes first in the batch does
not see those of the same time behind it. Memory: [B, B]."""
