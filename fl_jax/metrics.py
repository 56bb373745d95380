"""Metrics of classifiers, for all sites at once: segment operations over flat predictions.

A metric maps the predictions of R records at N sites to one float32 per site, NaN where it is undefined; all shapes are static,
so a whole study (seeds x evaluation points x arms) measures inside one compiled program. Counts are summed as integers: a metric
of counts or ranks depends on no order of records, and equals scikit-learn's to float32 rounding.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fl_jax.errors import FlJaxError
from fl_jax.ranks import Ranks, rank
from fl_jax.types import Array, PyTree, Survival


class Predictions(NamedTuple):
    """The predictions of R records at N sites, as `by_site` makes them.

    outputs: float32[R, K]; logits (K = 1 a single logit, K >= 2 softmax) or whatever else the metrics of a task read.
    y: int32[R], classes in [0, max(K, 2)) except in padding rows; other tasks may have any pytree of [R, ...].
    site: int32[R]; N marks a padding row. loss: float32[R], or None where a model has no per-record loss.
    num_records: int32[N]. not_finite: int32[N], how many of them have an output that is not finite.
    """

    outputs: Array
    y: PyTree
    site: Array
    loss: Array | None
    num_records: Array
    not_finite: Array

    @property
    def num_sites(self) -> int:
        """N, static."""
        return self.num_records.shape[0]


class Metric(NamedTuple):
    """A metric: (Predictions) -> float32[N], NaN where undefined; and how to read it.

    higher_is_better: what the worst site is. bounds: the lowest and highest possible value.
    """

    measure: Callable[[Predictions], Array]
    higher_is_better: bool = True
    bounds: tuple[float, float] = (0.0, 1.0)


def by_site(outputs: Array, y: PyTree, site: Array, num_sites: int, loss: Array | None = None) -> Predictions:
    """Predictions from flat arrays: outputs [R, K], y [R, ...], site int32[R] (outside [0, num_sites): padding), loss float32[R].

    num_sites is static. Raises FlJaxError where the numbers of rows differ.
    """
    lengths = {leaf.shape[:1] for leaf in jax.tree.leaves((outputs, y, site, loss))}
    if len(lengths) != 1 or outputs.ndim != 2:
        raise FlJaxError(
            f"predictions need outputs [R, K] and y, site and loss with the same R rows, not {outputs.shape} and rows {lengths}."
        )
    site = jnp.where((site >= 0) & (site < num_sites), site, num_sites).astype(jnp.int32)
    not_finite = ~jnp.all(jnp.isfinite(outputs), axis=-1)
    return Predictions(outputs, y, site, loss, _count(jnp.ones_like(site), site, num_sites), _count(not_finite, site, num_sites))


def pool(predictions: Predictions) -> Predictions:
    """The same records as if one site held them all (N = 1)."""
    site = jnp.where(predictions.site < predictions.num_sites, 0, 1)
    return by_site(predictions.outputs, predictions.y, site, 1, predictions.loss)


def measure(metrics: Mapping[str, Metric], predictions: Predictions) -> dict[str, Array]:
    """Every metric of every site: name -> float32[N], NaN where undefined."""
    return {name: metric.measure(predictions) for name, metric in metrics.items()}


def counts(predictions: Predictions) -> dict[str, Array]:
    """What explains a missing metric, each int32[N]: "records", "not_finite"; if y is a class, "classes" (present there); if y is
    a Survival, "comparable" (records that outlived a site's first event)."""
    result = {"records": predictions.num_records, "not_finite": predictions.not_finite}
    if _is_class(predictions.y):
        result["classes"] = jnp.sum(_class_counts(predictions, jnp.ones_like(predictions.site)) > 0, axis=-1, dtype=jnp.int32)
    if isinstance(predictions.y, Survival):
        result["comparable"] = _count(_outlived_first_event(predictions), predictions.site, predictions.num_sites)
    return result


def why_undefined(value: float, counts_of_site: Mapping[str, int]) -> str:
    """Host side: why one site's value is NaN, in words; "" where it is not. counts_of_site: one site's entries of `counts`."""
    if not math.isnan(value):
        return ""
    if counts_of_site["records"] == 0:
        return "no test records"
    if counts_of_site["not_finite"] > 0:
        return "predictions are not finite"
    if counts_of_site.get("classes") == 1:
        return "one class only"
    if counts_of_site.get("comparable") == 0:
        return "no admissible pair"
    return "undefined for these records"


def accuracy(predictions: Predictions) -> Array:
    """The share of records whose most likely class is the true one (a single logit: class 1 where it exceeds 0): float32[N]."""
    hits = _count(_predicted(predictions) == predictions.y, predictions.site, predictions.num_sites)
    return _where_measured(predictions, hits / predictions.num_records)


def balanced_accuracy(predictions: Predictions) -> Array:
    """The mean recall over the classes present at a site: float32[N] (Brodersen et al. 2010, "The balanced accuracy and its
    posterior distribution"; scikit-learn's balanced_accuracy_score)."""
    support = _class_counts(predictions, jnp.ones_like(predictions.site))
    hits = _class_counts(predictions, _predicted(predictions) == predictions.y)
    return _where_measured(predictions, _mean_where(support > 0, hits / jnp.maximum(support, 1)))


def auroc(predictions: Predictions) -> Array:
    """The area under the ROC curve: float32[N], NaN where one class only.

    The Mann-Whitney statistic, a tie counting one half (Hanley and McNeil 1982, "The meaning and use of the area under a ROC
    curve"). K <= 2: class 1 is positive. K > 2: the unweighted mean of one-versus-rest over the classes that have both positives
    and negatives at the site; scikit-learn's roc_auc_score(multi_class="ovr") where every class is present.
    """

    def of_class(ranks: Ranks) -> Array:
        # Twice the number of (positive, negative) pairs in the right order, a tie being half a pair: an exact integer.
        doubled = ranks.sum_of_positives(2 * ranks.negatives_below + ranks.negatives_tied)
        pairs = ranks.positives.astype(jnp.float32) * ranks.negatives.astype(jnp.float32)
        return jnp.minimum(doubled / (2 * jnp.maximum(pairs, 1)), 1.0)

    return _one_versus_rest(predictions, of_class)


def average_precision(predictions: Predictions) -> Array:
    """Average precision, sum over thresholds of (recall - previous recall) x precision: float32[N], NaN where one class only.

    scikit-learn's average_precision_score, tied scores being one threshold; but NaN at a site of positives only, where
    scikit-learn's 1 says nothing about the model. K > 2: as `auroc`.
    """

    def of_class(ranks: Ranks) -> Array:
        precision = ranks.positives_from / jnp.maximum(ranks.records_from, 1)
        # In fixed point, so that the sum rounds nothing and does not depend on an order.
        total = ranks.sum_of_positives(jnp.round(precision * 2.0**31))
        return jnp.minimum(total / 2.0**31 / jnp.maximum(ranks.positives, 1), 1.0)

    return _one_versus_rest(predictions, of_class)


def mean_loss(predictions: Predictions) -> Array:
    """The mean of the per-record losses: float32[N]. Raises FlJaxError where the model has none."""
    if predictions.loss is None:
        raise FlJaxError('this model has no per-record loss: leave the metric "loss" out, or give the model an `evaluate`.')
    total = jax.ops.segment_sum(predictions.loss.astype(jnp.float32), predictions.site, predictions.num_sites)
    return _where_measured(predictions, total / predictions.num_records)


CLASSIFICATION: Mapping[str, Metric] = {
    "accuracy": Metric(accuracy),
    "balanced_accuracy": Metric(balanced_accuracy),
    "auroc": Metric(auroc),
    "average_precision": Metric(average_precision),
    "loss": Metric(mean_loss, higher_is_better=False, bounds=(0.0, math.inf)),
}
"""The metrics of a classifier, by the names they have in results."""


def log_odds(outputs: Array) -> Array:
    """The log-odds of each class, float32 [R, K], from logits [R, K]; K = 1: the logit itself. The score that ranks records.

    log(p / (1 - p)) orders records as the softmax probability p does, but does not tie where p rounds to 0 or 1.
    """
    outputs = outputs.astype(jnp.float32)
    if outputs.shape[-1] == 1:
        return outputs
    if outputs.shape[-1] == 2:
        return outputs - outputs[:, ::-1]
    # Only the most likely class can have p > 1/2, where 1 - p would cancel: it is compared with the others' logits instead.
    most_likely = jax.nn.one_hot(jnp.argmax(outputs, axis=-1), outputs.shape[-1], dtype=jnp.bool)
    others = jax.nn.logsumexp(outputs, axis=-1, keepdims=True, where=~most_likely)
    log_p = jax.nn.log_softmax(outputs, axis=-1)
    return jnp.where(most_likely, outputs - others, log_p - jnp.log1p(-jnp.exp(log_p)))


def _one_versus_rest(predictions: Predictions, of_class: Callable[[Ranks], Array]) -> Array:
    """A metric of ranks, float32[N]: class 1's for K <= 2, else the mean over the classes that have positives and negatives."""
    _require_class(predictions.y)
    if predictions.site.shape[0] == 0 or predictions.num_sites == 0:
        return jnp.full(predictions.num_sites, jnp.nan, jnp.float32)
    scores = log_odds(predictions.outputs)
    classes = jnp.arange(scores.shape[1]) if scores.shape[1] > 2 else jnp.ones(1, jnp.int32)

    def one(label: Array, score: Array) -> tuple[Array, Array]:
        ranks = rank(score, predictions.y == label, predictions.site, predictions.num_records)
        return of_class(ranks), (ranks.positives > 0) & (ranks.negatives > 0)

    values, defined = jax.vmap(one)(classes, scores[:, -classes.shape[0] :].T)
    return _where_measured(predictions, _mean_where(defined.T, values.T))


def _predicted(predictions: Predictions) -> Array:
    """The most likely class, int32[R]."""
    _require_class(predictions.y)
    if predictions.outputs.shape[1] == 1:
        return (predictions.outputs[:, 0] > 0).astype(jnp.int32)
    return jnp.argmax(predictions.outputs, axis=-1).astype(jnp.int32)


def _class_counts(predictions: Predictions, values: Array) -> Array:
    """Sums of integer values [R] by site and true class: int32[N, classes]."""
    classes = max(predictions.outputs.shape[1], 2)
    beyond = predictions.num_sites * classes  # where padding rows go, whatever their y
    cell = jnp.where(predictions.site < predictions.num_sites, predictions.site * classes + predictions.y, beyond)
    return _count(values, cell, beyond).reshape(predictions.num_sites, classes)


def _count(values: Array, segment: Array, num_segments: int) -> Array:
    """Sums of integer or boolean values [R] by segment: int32[num_segments]; a segment out of range counts nowhere."""
    return jax.ops.segment_sum(values.astype(jnp.int32), segment, num_segments)


def _mean_where(where: Array, values: Array) -> Array:
    """Means over the last axis of the values where `where` holds; NaN where it holds nowhere."""
    return jnp.sum(jnp.where(where, values, 0), axis=-1) / jnp.sum(where, axis=-1)


def _where_measured(predictions: Predictions, values: Array) -> Array:
    """NaN at sites without records, and at sites where a prediction is not finite: a model that has diverged has no score."""
    return jnp.where((predictions.num_records > 0) & (predictions.not_finite == 0), values, jnp.nan)


def _outlived_first_event(predictions: Predictions) -> Array:
    """bool[R]: seen after the first event of the own site. Where nobody was, no two records can be compared."""
    time, event = predictions.y.time, predictions.y.event > 0
    first = jax.ops.segment_min(jnp.where(event, time, jnp.inf), predictions.site, predictions.num_sites)
    first = jnp.append(first, jnp.inf)[predictions.site]
    return (time > first) | ((time == first) & ~event)


def _is_class(y: PyTree) -> bool:
    return hasattr(y, "dtype") and y.ndim == 1 and jnp.issubdtype(y.dtype, jnp.integer)


def _require_class(y: PyTree) -> None:
    if not _is_class(y):
        raise FlJaxError("a metric of classification needs y int32[R], one class per record: choose metrics that fit the task.")
