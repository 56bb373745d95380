"""Evaluation of deployed models: every site's records with that site's own model, unseen sites with every donor's.

Everything runs inside `jit` and `vmap`: sizes of sites are data, so seeds with different partitions share one program. Nothing
here is covered by a privacy guarantee.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from fl_jax import trees
from fl_jax.errors import FlJaxError
from fl_jax.metrics import CLASSIFICATION, Metric, Predictions, by_site, counts, measure, pool
from fl_jax.types import Array, Model, PyTree, Sites, Variables

ModelOfSite = Callable[[Array], Variables]
"""(id int32) -> the Variables that site `id` deploys; called inside a loop, so N models never exist at once."""

Predict = Callable[[Variables, PyTree], Array]
"""(Variables, x [B, ...]) -> outputs [B, K]."""


class SiteMetrics(NamedTuple):
    """The metrics of N sites, each a dict by the metric's name. A metric that is undefined at a site is NaN there.

    site: float32[N]. pooled: scalar, all records as if one site held them (each still predicted by its own site's model).
    mean, std, worst: scalars over the sites where the metric is defined, sites counting equally; std divides by their number (the
    sites are the whole federation, not a sample of one); NaN where there are none. missing: int32 scalar, how many sites those
    leave out. counts: int32[N], what explains them (see fl_jax.metrics.why_undefined).
    """

    site: dict[str, Array]
    pooled: dict[str, Array]
    mean: dict[str, Array]
    std: dict[str, Array]
    worst: dict[str, Array]
    missing: dict[str, Array]
    counts: dict[str, Array]


class UnseenMetrics(NamedTuple):
    """The metrics of U sites that took no part in training, each a dict by the metric's name.

    site: float32[U], the mean over the donors for which the metric is defined. std: float32[U], over those donors. missing:
    int32[U], how many donors they leave out. counts: int32[U], as for SiteMetrics; "not_finite" is the sum over the donors.
    """

    site: dict[str, Array]
    std: dict[str, Array]
    missing: dict[str, Array]
    counts: dict[str, Array]


def site_of_row(sites: Sites) -> Array:
    """The site that owns each row: int32[R], N for a row that no site owns. Offsets may come in any order, with gaps."""
    num_rows, num_sites = _num_rows(sites), sites.offset.shape[0]
    # Each site adds its number where it starts and takes it back where it ends: the running sum is the owner of every row.
    number = jnp.where(sites.size > 0, jnp.arange(1, num_sites + 1, dtype=jnp.int32), 0)
    edges = jnp.zeros(num_rows, jnp.int32).at[sites.offset].add(number, mode="drop")
    owner = jnp.cumsum(edges.at[sites.offset + sites.size].add(-number, mode="drop"), dtype=jnp.int32)
    return jnp.where(owner > 0, owner - 1, num_sites)


def predict_sites(model_of_site: ModelOfSite, predict: Predict, sites: Sites, chunk: int) -> Array:
    """Each site's records predicted with that site's own model: outputs [R, K], 0 in rows that no site owns.

    A loop over sites, and in it one over chunks of `chunk` records (static); the last chunk of a site is computed in full, so the size of
    a typical site is a good chunk. Sites must not overlap. Raises FlJaxError where chunk < 1.
    """
    return predict_splits(model_of_site, predict, (sites,), chunk)[0]


def predict_splits(model_of_site: ModelOfSite, predict: Predict, splits: Sequence[Sites], chunk: int) -> tuple[Array, ...]:
    """`predict_sites` of several splits of the same sites; the model of a site, which may take training to make, is made once for all."""
    if chunk < 1:
        raise FlJaxError(f"chunk is the number of records predicted at once and must be at least 1, not {chunk}.")
    num_sites = splits[0].offset.shape[0]
    zero = jnp.int32(0)

    def nothing(sites: Sites) -> Array:
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((chunk, *leaf.shape[1:]), leaf.dtype), sites.x)
        shape = jax.eval_shape(lambda site, x: predict(model_of_site(site), x), zero, one)
        return jnp.zeros((_num_rows(sites), *shape.shape[1:]), shape.dtype)

    def one_site(site: Array, outputs: tuple[Array, ...]) -> tuple[Array, ...]:
        variables = model_of_site(site)

        def one_chunk(sites: Sites, k: Array, outputs: Array) -> Array:
            position = k * chunk + jnp.arange(chunk, dtype=jnp.int32)
            index = sites.offset[site] + position
            into = jnp.where(position < sites.size[site], index, _num_rows(sites))
            return outputs.at[into].set(predict(variables, trees.rows(sites.x, index)), mode="drop")

        return tuple(
            jax.lax.fori_loop(zero, _most(-(-sites.size[site] // chunk)), partial(one_chunk, sites), out)
            for sites, out in zip(splits, outputs, strict=True))

    outputs = tuple(nothing(sites) for sites in splits)
    if num_sites == 0 or all(_num_rows(sites) == 0 for sites in splits):
        return outputs
    return jax.lax.fori_loop(zero, num_sites, one_site, outputs)


def predict_all(variables: Variables, predict: Predict, sites: Sites, chunk: int) -> Array:
    """Every site's records predicted with one model: outputs [R, K], 0 in rows that no site owns.

    The same as `predict_sites` with a constant model, without a short chunk at the end of each site.
    """
    everything = Sites(sites.x, sites.y, jnp.zeros(1, jnp.int32), jnp.full(1, _num_rows(sites), jnp.int32))
    outputs = predict_sites(lambda _: variables, predict, everything, chunk)
    owned = site_of_row(sites) < sites.offset.shape[0]
    return jnp.where(owned.reshape(-1, *[1] * (outputs.ndim - 1)), outputs, 0)


def evaluate(
    model: Model, model_of_site: ModelOfSite, sites: Sites, chunk: int, metrics: Mapping[str, Metric] = CLASSIFICATION
) -> SiteMetrics:
    """The metrics of every site with the model that it deploys itself; `sites` are a federation's validation or test records.

    chunk: records predicted at once, static. Where all sites deploy one model, `score(model, predict_all(...), sites)` is the
    same, and cheaper for small sites. Raises FlJaxError where a metric needs what the model or the records lack.
    """
    return score(model, predict_sites(model_of_site, model.predict, sites, chunk), sites, metrics)


def score(model: Model, outputs: Array, sites: Sites, metrics: Mapping[str, Metric] = CLASSIFICATION) -> SiteMetrics:
    """The metrics of every site from outputs [R, K] that are already there."""
    predictions = _predictions(model, outputs, sites)
    values = measure(metrics, predictions)
    defined = {name: ~jnp.isnan(value) for name, value in values.items()}
    spread = {name: _mean_and_std(values[name], defined[name]) for name in metrics}
    return SiteMetrics(
        site=values,
        pooled={name: value[0] for name, value in measure(metrics, pool(predictions)).items()},
        mean={name: spread[name][0] for name in metrics},
        std={name: spread[name][1] for name in metrics},
        worst={name: _worst(values[name], defined[name], metric.higher_is_better) for name, metric in metrics.items()},
        missing={name: jnp.sum(~defined[name], dtype=jnp.int32) for name in metrics},
        counts=counts(predictions),
    )


def evaluate_unseen(
    model: Model,
    model_of_site: ModelOfSite,
    unseen: Sites,
    donors: Array,
    chunk: int,
    metrics: Mapping[str, Metric] = CLASSIFICATION,
) -> UnseenMetrics:
    """The metrics of sites that took no part in training, with the models that training sites deploy.

    donors: int32[d], ids of the training sites whose models are tried one after another; d = 1 is enough for a global model, all
    of them for personalised and local-only ones. chunk as for `evaluate`. Zero unseen sites give empty arrays.
    """

    return score_unseen(model, predict_unseen(model_of_site, model.predict, unseen, donors, chunk), unseen, metrics)


def predict_unseen(model_of_site: ModelOfSite, predict: Predict, unseen: Sites, donors: Array, chunk: int) -> Array:
    """The unseen sites' records predicted with the model of each donor in turn: outputs [d, R, K]."""
    return jax.lax.map(lambda donor: predict_all(model_of_site(donor), predict, unseen, chunk), donors)


def score_unseen(model: Model, outputs: Array, unseen: Sites, metrics: Mapping[str, Metric] = CLASSIFICATION) -> UnseenMetrics:
    """The metrics of unseen sites from outputs [d, R, K] that are already there."""

    def of_donor(outputs: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        predictions = _predictions(model, outputs, unseen)
        return measure(metrics, predictions), counts(predictions)

    values, counted = jax.lax.map(of_donor, outputs)
    defined = {name: ~jnp.isnan(value) for name, value in values.items()}
    spread = {name: _mean_and_std(values[name], defined[name]) for name in metrics}
    return UnseenMetrics(
        site={name: spread[name][0] for name in metrics},
        std={name: spread[name][1] for name in metrics},
        missing={name: jnp.sum(~defined[name], axis=0, dtype=jnp.int32) for name in metrics},
        counts={name: jnp.max(n, axis=0, initial=0) for name, n in counted.items()}
        | {"not_finite": jnp.sum(counted["not_finite"], axis=0)},
    )


def _num_rows(sites: Sites) -> int:
    return jax.tree.leaves(sites.x)[0].shape[0]


def _predictions(model: Model, outputs: Array, sites: Sites) -> Predictions:
    loss = None if model.evaluate is None else model.evaluate(outputs, sites.y)
    return by_site(outputs, sites.y, site_of_row(sites), sites.offset.shape[0], loss)


def _mean_and_std(values: Array, where: Array) -> tuple[Array, Array]:
    """Mean and standard deviation over the first axis where `where` holds; NaN where it holds nowhere."""
    number = jnp.sum(where, axis=0)
    mean = jnp.sum(jnp.where(where, values, 0), axis=0) / number
    return mean, jnp.sqrt(jnp.sum(jnp.where(where, values - mean, 0) ** 2, axis=0) / number)


def _worst(values: Array, where: Array, higher_is_better: bool) -> Array:
    """The worst of the values [N] where `where` holds; NaN where it holds nowhere."""
    limit = jnp.inf if higher_is_better else -jnp.inf
    worst = (jnp.min if higher_is_better else jnp.max)(jnp.where(where, values, limit), initial=limit)
    return jnp.where(jnp.any(where), worst, jnp.nan)


@custom_vmap
def _most(bound: Array) -> Array:
    """A loop's bound int32; under `vmap` the largest of them.

    A bound that differs between seeds would make `vmap` select the whole carry in every step; with one for all, the seeds with
    fewer steps do steps that write nothing.
    """
    return bound


@_most.def_vmap
def _(axis_size: int, in_batched: list[bool], bound: Array) -> tuple[Array, bool]:
    del axis_size
    return (_most(jnp.max(bound)), False) if in_batched[0] else (_most(bound), False)
