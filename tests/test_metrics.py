"""Metrics equal scikit-learn's site by site, with ties, tiny, one-class and empty sites and padding; and obey their own laws."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fl_jax import metrics
from fl_jax.errors import FlJaxError

NUM_SITES = 4
NUM_ROWS = 24


@jax.jit
def measured(outputs, y, site, loss):
    return metrics.measure(metrics.CLASSIFICATION, metrics.by_site(outputs, y, site, NUM_SITES, loss))


all_measured = jax.jit(jax.vmap(measured))
log_odds = jax.jit(metrics.log_odds)
counts = jax.jit(metrics.counts)


@jax.jit
def pooled(outputs, y, site, loss):
    pool = metrics.pool(metrics.by_site(outputs, y, site, NUM_SITES, loss))
    return {name: value[0] for name, value in metrics.measure(metrics.CLASSIFICATION, pool).items()}


def reference(outputs, scores, y, loss):
    """The metrics of one site by scikit-learn, from scores that are the float32 log-odds (tested below)."""
    if y.size == 0:
        return dict.fromkeys(metrics.CLASSIFICATION, np.nan)
    predicted = (outputs[:, 0] > 0).astype(int) if outputs.shape[1] == 1 else outputs.argmax(axis=1)
    classes = range(outputs.shape[1]) if outputs.shape[1] > 2 else [1]
    mixed = [k for k in classes if 0 < np.sum(y == k) < y.size]

    def over_classes(score):
        return np.mean([score(y == k, scores[:, min(k, scores.shape[1] - 1)]) for k in mixed]) if mixed else np.nan

    return {
        "accuracy": sklearn.metrics.accuracy_score(y, predicted),
        # By hand: scikit-learn's warns of classes that are predicted but not present, and then leaves them out just so.
        "balanced_accuracy": np.mean([np.mean(predicted[y == k] == k) for k in np.unique(y)]),
        "auroc": over_classes(sklearn.metrics.roc_auc_score),
        "average_precision": over_classes(sklearn.metrics.average_precision_score),
        "loss": np.mean(loss),
    }


def assert_equal(found, expected, rtol=2e-6):
    assert set(found) == set(expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=rtol, atol=1e-7, err_msg=name)


@st.composite
def records(draw, num_outputs):
    """Few distinct scores (so ties abound), sites of all sizes, padding rows; or scores without ties."""
    step = draw(st.sampled_from([1.0, 0.37]))
    high = draw(st.sampled_from([1, 3, 1000]))
    outputs = draw(hnp.arrays(np.int32, (NUM_ROWS, num_outputs), elements=st.integers(-high, high))).astype(np.float32) * step
    y = draw(hnp.arrays(np.int32, NUM_ROWS, elements=st.integers(0, max(num_outputs, 2) - 1)))
    site = draw(hnp.arrays(np.int32, NUM_ROWS, elements=st.integers(0, NUM_SITES)))
    loss = draw(hnp.arrays(np.float32, NUM_ROWS, elements=st.floats(0, 8, width=16)))
    return outputs, y, site, loss


@pytest.mark.parametrize("num_outputs", [1, 2, 3])
def test_every_site_and_the_pool_equal_scikit_learn(num_outputs):
    @settings(max_examples=30, deadline=None)
    @given(records(num_outputs))
    def check(drawn):
        outputs, y, site, loss = drawn
        found, scores = jax.device_get((measured(*drawn), log_odds(outputs)))
        for i in range(NUM_SITES):
            here = site == i
            assert_equal({k: v[i] for k, v in found.items()}, reference(outputs[here], scores[here], y[here], loss[here]))
        real = site < NUM_SITES
        assert_equal(jax.device_get(pooled(*drawn)), reference(outputs[real], scores[real], y[real], loss[real]))

    check()


def test_macro_averages_equal_scikit_learns_own_multiclass_forms():
    rng = np.random.default_rng(0)
    y = rng.permutation(np.arange(60, dtype=np.int32) % 4)
    logits = rng.normal(size=(60, 4)).astype(np.float32) + 1.5 * np.eye(4, dtype=np.float32)[y]
    p = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(axis=1, keepdims=True)
    found = pooled(logits, y, np.zeros_like(y), logits[:, 0])
    np.testing.assert_allclose(found["auroc"], sklearn.metrics.roc_auc_score(y, p, multi_class="ovr"), rtol=1e-6)
    np.testing.assert_allclose(found["average_precision"], sklearn.metrics.average_precision_score(y, p), rtol=1e-6)
    expected = sklearn.metrics.balanced_accuracy_score(y, logits.argmax(axis=1))
    np.testing.assert_allclose(found["balanced_accuracy"], expected, rtol=1e-6)


@pytest.mark.parametrize("distinct", [5, None])
def test_a_large_site_is_exact_where_32_bits_do_not_hold_the_number_of_pairs(distinct):
    rng = np.random.default_rng(1)
    y = (rng.random(150_000) < 0.6).astype(np.int32)
    score = (rng.normal(size=y.size) + 0.3 * y).astype(np.float32)
    score = score if distinct is None else np.digitize(score, np.linspace(-1, 1, distinct - 1)).astype(np.float32)
    assert 2 * int(y.sum()) * int((1 - y).sum()) > 2**33
    found = pooled(score[:, None], y, np.zeros_like(y), score)
    np.testing.assert_allclose(found["auroc"], sklearn.metrics.roc_auc_score(y, score), rtol=3e-7)
    expected = sklearn.metrics.average_precision_score(y, score)
    np.testing.assert_allclose(found["average_precision"], expected, rtol=3e-7)


def test_rare_positives_keep_their_precision():
    y = np.zeros(150_000, np.int32)
    y[:2] = 1
    score = np.arange(y.size, dtype=np.float32)  # the two positives come last
    found = pooled(score[:, None], y, np.zeros_like(y), score)
    np.testing.assert_allclose(found["average_precision"], sklearn.metrics.average_precision_score(y, score), rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(records(3), st.permutations(range(NUM_ROWS)))
def test_the_order_of_records_changes_no_bit(drawn, order):
    first, second = jax.device_get(measured(*drawn)), jax.device_get(measured(*(a[np.array(order)] for a in drawn)))
    for name in set(first) - {"loss"}:  # a float sum, so equal to rounding only
        np.testing.assert_array_equal(first[name], second[name])


@settings(max_examples=30, deadline=None)
@given(records(1))
def test_laws_of_auroc(drawn):
    outputs, y, site, loss = drawn
    value = np.asarray(measured(*drawn)["auroc"])
    np.testing.assert_allclose(measured(-outputs, y, site, loss)["auroc"], 1 - value, atol=2e-7)  # reversed scores
    np.testing.assert_allclose(measured(outputs, 1 - y, site, loss)["auroc"], 1 - value, atol=2e-7)  # exchanged classes
    np.testing.assert_array_equal(measured(4 * outputs + 16, y, site, loss)["auroc"], value)  # monotone, exact in float32
    flat = np.asarray(measured(0 * outputs, y, site, loss)["auroc"])
    np.testing.assert_array_equal(flat[~np.isnan(flat)], 0.5)  # -0 and 0 tie
    best = np.asarray(measured(y[:, None].astype(np.float32), y, site, loss)["auroc"])
    np.testing.assert_array_equal(best[~np.isnan(best)], 1.0)


@settings(max_examples=20, deadline=None)
@given(records(2), records(2))
def test_vmap_equals_one_by_one(first, second):
    stacked = all_measured(*(np.stack(pair) for pair in zip(first, second, strict=True)))
    for i, drawn in enumerate((first, second)):
        assert_equal({k: v[i] for k, v in stacked.items()}, jax.device_get(measured(*drawn)))


def test_padding_rows_may_hold_anything():
    rng = np.random.default_rng(2)
    outputs, y = rng.normal(size=(NUM_ROWS, 2)).astype(np.float32), rng.integers(0, 2, NUM_ROWS).astype(np.int32)
    site, loss = rng.integers(0, 2, NUM_ROWS).astype(np.int32), rng.random(NUM_ROWS).astype(np.float32)
    dropped = np.arange(NUM_ROWS) >= 17
    kept = measured(outputs, y, np.where(dropped, NUM_SITES, site), loss)
    outputs[dropped], loss[dropped], y[dropped] = np.nan, np.inf, -7
    for outside in (NUM_SITES, NUM_SITES + 5, -1):
        found = measured(outputs, y, np.where(dropped, outside, site), loss)
        for name in kept:
            np.testing.assert_array_equal(found[name], kept[name])


def test_log_odds_are_those_of_the_softmax_and_do_not_saturate():
    logits = np.random.default_rng(3).normal(scale=4, size=(50, 5)).astype(np.float32)
    p = np.exp(logits.astype(float))
    p /= p.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(log_odds(logits), np.log(p) - np.log1p(-p), rtol=2e-5, atol=2e-5)
    sure = log_odds(np.array([[40.0, 0.0, 0.0], [41.0, 0.0, 0.0]], np.float32))
    np.testing.assert_allclose(sure[:, 0], [40 - math.log(2), 41 - math.log(2)], rtol=1e-6)
    np.testing.assert_allclose(sure[:, 1], [-40, -41], rtol=1e-6)
    np.testing.assert_array_equal(log_odds(np.array([[2.0, 5.0]], np.float32)), [[-3.0, 3.0]])


def test_a_missing_metric_has_a_reason():
    outputs = np.zeros((NUM_ROWS, 1), np.float32)
    outputs[:5, 0] = 0.5, 1.0, 0.2, 0.1, np.nan
    y, site = np.zeros(NUM_ROWS, np.int32), np.full(NUM_ROWS, NUM_SITES, np.int32)
    y[:5], site[:5] = (1, 1, 0, 1, 0), (0, 0, 2, 2, 3)
    found = jax.device_get(measured(outputs, y, site, outputs[:, 0]))
    counted = jax.device_get(counts(metrics.by_site(outputs, y, site, NUM_SITES)))
    of_site = [{name: int(value[i]) for name, value in counted.items()} for i in range(NUM_SITES)]
    reasons = [metrics.why_undefined(float(found["auroc"][i]), of_site[i]) for i in range(NUM_SITES)]
    assert reasons == ["one class only", "no test records", "", "predictions are not finite"]
    np.testing.assert_array_equal(counted["classes"], [1, 0, 2, 1])
    assert found["auroc"][2] == 0.0
    # A site whose model has diverged has no score of any kind; the others are untouched.
    for name in ("accuracy", "balanced_accuracy", "loss"):
        assert np.isnan(found[name]).tolist() == [False, True, False, True]
    assert metrics.why_undefined(math.nan, {"records": 3, "not_finite": 0, "classes": 2}) == "undefined for these records"


@pytest.mark.parametrize(("num_rows", "num_sites"), [(0, 3), (0, 0), (2, 0)])
def test_nothing_to_measure_gives_nan_or_nothing(num_rows, num_sites):
    rows = np.zeros(num_rows, np.int32)

    @jax.jit
    def of_nothing(outputs):
        return metrics.measure(metrics.CLASSIFICATION, metrics.by_site(outputs, rows, rows, num_sites, outputs[:, 0]))

    for value in of_nothing(np.zeros((num_rows, 3), np.float32)).values():
        assert value.shape == (num_sites,) and np.isnan(value).all()


def test_what_a_metric_needs_and_lacks_is_said():
    rows = jnp.zeros(3, jnp.int32)
    with pytest.raises(FlJaxError, match="no per-record loss"):
        metrics.mean_loss(metrics.by_site(jnp.zeros((3, 1)), rows, rows, 1))
    survival = metrics.by_site(jnp.zeros((3, 1)), {"time": jnp.ones(3), "event": rows}, rows, 1)
    assert set(metrics.counts(survival)) == {"records", "not_finite"}
    for metric in (metrics.accuracy, metrics.auroc):
        with pytest.raises(FlJaxError, match="one class per record"):
            metric(survival)
    with pytest.raises(FlJaxError, match="same R rows"):
        metrics.by_site(jnp.zeros((3, 1)), rows[:2], rows, 1)


def test_one_program_sorts_once_for_all_metrics_of_ranks():
    """The metrics of ranks sort the same scores, and the compiler must see that: the sorting is most of the cost."""
    rows = jnp.zeros(NUM_ROWS, jnp.int32)
    predictions = metrics.by_site(jnp.zeros((NUM_ROWS, 3)), rows, rows, NUM_SITES, jnp.zeros(NUM_ROWS))

    def sorts(run):
        return jax.jit(run).lower(predictions).compile().as_text().count(" sort(")

    def both(p):
        return metrics.measure(metrics.CLASSIFICATION, p), metrics.measure(metrics.CLASSIFICATION, metrics.pool(p))

    one = sorts(metrics.auroc)
    assert one > 1 and sorts(both) == one + 1  # the pool only adds its own pass over "sites"
