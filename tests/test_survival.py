"""Survival: the C-index against lifelines and against all pairs, the partial likelihood against a sum over risk sets in
float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifelines.utils import concordance_index as lifelines_concordance

from fl_jax import algorithms, batches, evaluation, metrics, models, sampling
from fl_jax.errors import FlJaxError
from fl_jax.survival import SURVIVAL, concordance_index
from fl_jax.types import Batch, Sites, Survival

NUM_SITES, NUM_ROWS = 3, 40  # one shape for all examples: one compilation

measured = jax.jit(lambda risk, y, site: concordance_index(metrics.by_site(risk, y, site, NUM_SITES)))
counted = jax.jit(lambda risk, y, site: metrics.counts(metrics.by_site(risk, y, site, NUM_SITES)))
of_one_site = jax.jit(lambda risk, y, site: concordance_index(metrics.by_site(risk, y, site, 1)))
loss = jax.jit(models.cox_partial_likelihood.batch)
gradient = jax.jit(jax.grad(models.cox_partial_likelihood.batch))


def records(rng, times=6, risks=4, share=0.5, rows=NUM_ROWS):
    """Times and risks from a few values, so that most pairs have ties; some rows are padding."""
    time = rng.integers(1, times + 1, rows).astype(np.float32)
    risk = ((rng.integers(0, risks, rows) - risks / 2) / 3).astype(np.float32)
    return risk[:, None], Survival(time, (rng.random(rows) < share).astype(np.float32)), rng.integers(0, NUM_SITES + 1, rows)


def rows_of(y, risk, rows):
    return risk[rows, 0], Survival(y.time[rows], y.event[rows])


def expected_concordance(risk, y):
    """lifelines' value; NaN where it finds no admissible pair."""
    try:
        return lifelines_concordance(y.time, -risk, y.event)
    except ZeroDivisionError:
        return math.nan


def concordance_of_all_pairs(risk, y):
    """The definition, pair by pair."""
    good, pairs = 0.0, 0
    for i in np.flatnonzero(y.event):
        for j in range(len(risk)):
            if y.time[j] > y.time[i] or (y.time[j] == y.time[i] and not y.event[j]):
                pairs += 1
                good += 1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0
    return good / pairs if pairs else math.nan


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
def test_every_site_has_lifelines_concordance(seed, times, risks, share):
    risk, y, site = records(np.random.default_rng(seed), times, risks, share)
    found = measured(risk, y, site)
    for i in range(NUM_SITES):
        own, its = rows_of(y, risk, site == i)
        np.testing.assert_allclose(found[i], concordance_of_all_pairs(own, its), rtol=2e-7, equal_nan=True)
        np.testing.assert_allclose(found[i], expected_concordance(own, its) if len(own) else math.nan, rtol=2e-7, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 2, 3, 64, 65, 20_000])
def test_any_number_of_records_is_counted(rows):
    rng = np.random.default_rng(rows)
    time, event = rng.exponential(1000, rows).astype(np.float32).round(), rng.random(rows) < 0.3
    event[0] = True
    risk = (rng.normal(size=rows) - time / 1000).astype(np.float32)
    site = np.zeros(rows, np.int32)
    found = of_one_site(risk[:, None], Survival(time, event), site)
    np.testing.assert_allclose(found[0], expected_concordance(risk, Survival(time, event)), rtol=1e-6, equal_nan=True)


def test_concordance_is_invariant_and_complements_itself():
    rng = np.random.default_rng(3)
    risk, y, site = records(rng, times=30)
    found = measured(risk, y, site)
    order = rng.permutation(NUM_ROWS)
    np.testing.assert_array_equal(measured(risk[order], Survival(y.time[order], y.event[order]), site[order]), found)
    np.testing.assert_array_equal(measured(2 * risk + 1, y, site), found)
    np.testing.assert_array_equal(measured(risk, y._replace(time=y.time**2), site), found)
    np.testing.assert_array_equal(measured(risk, y._replace(event=y.event > 0), site), found)
    np.testing.assert_allclose(measured(-risk, y, site), 1 - found, rtol=1e-6)
    np.testing.assert_array_equal(measured(0 * risk, y, site), 0.5)
    np.testing.assert_array_equal(measured(-(y.time + (y.event == 0) / 2)[:, None], y, site), 1)


def test_what_has_no_concordance_says_why():
    time = np.array([3, 3, 5, 1, 2, 2, 9, 9], np.float32)
    event = np.array([1, 1, 0, 0, 0, 0, 1, 1], np.float32)  # of site 1 nobody outlives an event, and site 2 has none
    site = np.array([0, 0, 0, 1, 2, 2, 1, 1])
    risk = np.zeros((8, 1), np.float32)
    y = Survival(time, event)

    def reasons(risk):
        padded = jax.tree.map(lambda a: np.pad(a, (0, 32)), y)
        rows = np.pad(risk, ((0, 32), (0, 0))), padded, np.pad(site, (0, 32), constant_values=3)
        found, counts = measured(*rows), counted(*rows)
        return [metrics.why_undefined(float(found[i]), {k: int(v[i]) for k, v in counts.items()}) for i in range(NUM_SITES)]

    assert reasons(risk) == ["", "no admissible pair", "no admissible pair"]
    risk[1] = np.nan
    assert reasons(risk) == ["predictions are not finite", "no admissible pair", "no admissible pair"]
    with pytest.raises(FlJaxError, match="the C-index needs one risk a record"):
        concordance_index(metrics.by_site(jnp.asarray(risk), jnp.asarray(time), jnp.asarray(site), 3))


def partial_likelihood(risk, y):
    """Mean negative log partial likelihood and its gradient, float64, from the definition: a sum over events and their risk
    sets."""
    risk = np.asarray(risk, np.float64)
    total, slope = 0.0, np.zeros_like(risk)
    for i in np.flatnonzero(y.event):
        at_risk = np.flatnonzero(y.time >= y.time[i])
        hazards = np.exp(risk[at_risk])
        total += np.log(hazards.sum()) - risk[i]
        slope[at_risk] += hazards / hazards.sum()
        slope[i] -= 1
    return total / len(risk), slope / len(risk)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.1, 0.5, 1.0]))
def test_the_loss_is_the_partial_likelihood_and_padding_is_invisible(seed, share):
    risk, y, site = records(np.random.default_rng(seed), share=share)
    seen = site > 0
    mask = seen.astype(np.float32)
    own, its = rows_of(y, risk, seen)
    value, slope = partial_likelihood(own, its)
    spoilt = np.where(seen, risk[:, 0], np.nan)[:, None].astype(np.float32)
    hidden = Survival(np.where(seen, y.time, np.nan).astype(np.float32), np.where(seen, y.event, 1))
    np.testing.assert_allclose(loss(spoilt, hidden, mask), value, rtol=1e-5, atol=1e-6)
    found = np.asarray(gradient(spoilt, hidden, mask))[:, 0]
    np.testing.assert_allclose(found[seen], slope, atol=1e-6)
    assert not found[~seen].any()


def test_without_ties_the_loss_is_flambys():
    """FLamby sorts by falling time and takes logarithms of running sums; the mean is over all records."""
    rng = np.random.default_rng(1)
    risk, time = rng.normal(size=NUM_ROWS), rng.permutation(NUM_ROWS) + 1.0
    event = rng.random(NUM_ROWS) < 0.4
    order = np.argsort(-time)
    expected = np.mean((np.log(np.cumsum(np.exp(risk[order]))) - risk[order]) * event[order])
    y = Survival(time.astype(np.float32), event.astype(np.float32))
    np.testing.assert_allclose(loss(risk[:, None].astype(np.float32), y, np.ones(NUM_ROWS, np.float32)), expected, rtol=1e-5)


def test_the_loss_is_invariant_stable_and_silent_without_events():
    rng = np.random.default_rng(2)
    risk, y, _ = records(rng)
    mask = np.ones(NUM_ROWS, np.float32)
    value = loss(risk, y, mask)
    order = rng.permutation(NUM_ROWS)
    np.testing.assert_allclose(loss(risk[order], Survival(y.time[order], y.event[order]), mask), value, rtol=1e-5)
    np.testing.assert_allclose(loss(risk + 100, y, mask), value, rtol=1e-4)
    far = 1e4 * risk
    assert np.isfinite(loss(far, y, mask)) and np.isfinite(gradient(far, y, mask)).all()
    none = y._replace(event=np.zeros_like(y.event))
    assert loss(risk, none, mask) == 0 and not np.asarray(gradient(risk, none, mask)).any()
    assert loss(risk, y, 0 * mask) == 0 and not np.asarray(gradient(risk, y, 0 * mask)).any()
    with pytest.raises(FlJaxError, match="cox_partial_likelihood takes one risk a record"):
        models.cox_partial_likelihood.batch(jnp.zeros((3, 1)), jnp.ones(3), jnp.ones(3))


def test_a_federated_round_of_the_linear_model_is_the_mean_of_the_sites_steps():
    """One full-batch SGD step at each of two sites, averaged by records, against NumPy; then every site's C-index."""
    rng = np.random.default_rng(5)
    sizes, x = np.array([5, 9]), rng.normal(size=(14, 3)).astype(np.float32)
    y = Survival(rng.integers(1, 6, 14).astype(np.float32), (rng.random(14) < 0.6).astype(np.float32))
    sites = Sites(x, y, np.array([0, 5], np.int32), sizes.astype(np.int32))
    model = models.bridge(models.LinearCox(), jnp.zeros((1, 3)), models.cox_partial_likelihood)
    variables = jax.jit(model.init)(jax.random.key(0))
    (before,) = jax.tree.leaves(variables)  # one leaf: there is no bias
    algorithm = algorithms.fedavg(model, optax.sgd(0.5), batches.epochs(1, 16))

    @jax.jit
    def a_round(variables, sites):
        cohort = sampling.everyone().draw(jax.random.key(1), 0, sites)
        state, _ = algorithm.round(jax.random.key(2), algorithm.init(variables, 2), cohort, sites)
        scores = evaluation.evaluate(model, lambda id: algorithm.model(state, id), sites, 4, SURVIVAL)
        return algorithm.model(state, jnp.int32(0)), scores

    deployed, scores = a_round(variables, sites)
    (after,) = jax.tree.leaves(deployed)
    expected = np.zeros(3)
    for rows in (slice(0, 5), slice(5, 14)):
        _, slope = partial_likelihood(x[rows] @ np.asarray(before)[:, 0], Survival(y.time[rows], y.event[rows]))
        expected += (np.asarray(before)[:, 0] - 0.5 * x[rows].T @ slope) * len(slope) / 14
    np.testing.assert_allclose(np.asarray(after)[:, 0], expected, rtol=1e-5, atol=1e-6)

    assert model.evaluate is None  # a partial likelihood is of a batch, not of a record
    for i, rows in enumerate((slice(0, 5), slice(5, 14))):
        risk = (x[rows] @ np.asarray(after))[:, 0]
        expected = expected_concordance(risk, Survival(y.time[rows], y.event[rows]))
        np.testing.assert_allclose(scores.site["c_index"][i], expected, rtol=1e-6)
    value, _ = jax.jit(model.loss)(jax.random.key(3), variables.params, {}, Batch(x, y, np.ones(14, np.float32)))
    np.testing.assert_allclose(value, partial_likelihood(x @ np.asarray(before)[:, 0], y)[0], rtol=1e-5)
