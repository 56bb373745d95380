"""Evaluation equals a loop over sites in numpy, for seeds stacked with different partitions, personal models and unseen sites."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from fl_jax import evaluation, metrics
from fl_jax.errors import FlJaxError
from fl_jax.types import Model, Sites, Variables

NUM_ROWS, NUM_FEATURES, NUM_CLASSES, CHUNK = 40, 3, 3, 4
SIZES = np.array([[5, 0, 12, 1, 8], [4, 20, 0, 0, 16]], np.int32)  # two seeds; the first leaves rows over
OFFSETS = np.array([[30, 0, 3, 0, 20], [0, 4, 24, 24, 24]], np.int32)  # any order, gaps, empty sites that share an offset
NUM_SITES = SIZES.shape[1]


def cross_entropy(outputs, y):
    return -jnp.take_along_axis(jax.nn.log_softmax(outputs), y[:, None], axis=1)[:, 0]


MODEL = Model(
    init=lambda key: Variables({"w": jax.random.normal(key, (NUM_FEATURES, NUM_CLASSES))}, {}),
    loss=lambda key, params, stats, batch: (jnp.mean(cross_entropy(batch.x["features"] @ params["w"], batch.y)), stats),
    predict=lambda variables, x: x["features"] @ variables.params["w"],
    evaluate=cross_entropy,
    modules={},
    name="linear",
)


def problem():
    """Two seeds of records in two partitions, and a model for every (seed, site)."""
    rng = np.random.default_rng(0)
    x = {"features": rng.normal(size=(2, NUM_ROWS, NUM_FEATURES)).astype(np.float32)}
    y = rng.integers(0, NUM_CLASSES, (2, NUM_ROWS)).astype(np.int32)
    w = rng.normal(size=(2, NUM_SITES, NUM_FEATURES, NUM_CLASSES)).astype(np.float32)
    return Sites(x, y, OFFSETS, SIZES), w


def of_seed(tree, seed):
    return jax.tree.map(lambda leaf: leaf[seed], tree)


def own(w):
    """The model of each site from weights [N, ...]."""
    return lambda site: Variables({"w": w[site]}, {})


def expected_outputs(sites, weight_of_site):
    outputs = np.zeros((NUM_ROWS, NUM_CLASSES), np.float32)
    for i, (offset, size) in enumerate(zip(sites.offset, sites.size, strict=True)):
        outputs[offset : offset + size] = sites.x["features"][offset : offset + size] @ weight_of_site(i)
    return outputs


def expected_accuracy(outputs, sites):
    hit = outputs.argmax(axis=1) == sites.y
    return np.array([hit[o : o + n].mean() if n else np.nan for o, n in zip(sites.offset, sites.size, strict=True)])


def predict_own(sites, w):
    return evaluation.predict_sites(own(w), MODEL.predict, sites, CHUNK)


def test_site_of_row_is_the_owner_and_padding_is_nobodys():
    sites, _ = problem()
    found = np.asarray(jax.jit(jax.vmap(evaluation.site_of_row))(sites))
    for seed in range(2):
        expected = np.full(NUM_ROWS, NUM_SITES)
        for i in range(NUM_SITES):
            expected[OFFSETS[seed, i] : OFFSETS[seed, i] + SIZES[seed, i]] = i
        np.testing.assert_array_equal(found[seed], expected)
    assert (found[0] == NUM_SITES).any() and (found[1] < NUM_SITES).all()


def test_every_site_is_predicted_by_its_own_model():
    sites, w = problem()
    together = jax.jit(jax.vmap(predict_own))(sites, w)
    alone = jax.jit(predict_own)
    for seed in range(2):
        expected = expected_outputs(of_seed(sites, seed), lambda i, seed=seed: w[seed, i])
        np.testing.assert_allclose(alone(of_seed(sites, seed), w[seed]), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(together[seed], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_the_chunk_changes_nothing(chunk):
    sites, w = problem()
    sites, w = of_seed(sites, 0), w[0]
    found = jax.jit(lambda s, w: evaluation.predict_sites(own(w), MODEL.predict, s, chunk))(sites, w)
    np.testing.assert_allclose(found, expected_outputs(sites, lambda i: w[i]), rtol=1e-5, atol=1e-6)


def test_only_the_chunks_that_exist_are_predicted_and_no_seed_pays_a_copy_of_the_outputs():
    sites, w = problem()
    visited = []

    def predict(variables, x):
        jax.debug.callback(lambda _: visited.append(1), variables.params["w"][0, 0])
        return MODEL.predict(variables, x)

    def run(sites, w):
        return evaluation.predict_sites(own(w), predict, sites, CHUNK)

    jax.block_until_ready(jax.jit(run)(of_seed(sites, 0), w[0]))
    jax.effects_barrier()
    assert len(visited) == np.sum(-(-SIZES[0] // CHUNK))
    # vmapped over seeds, the loop's bound is one number: nothing selects between whole arrays of outputs in its body.
    lines = jax.jit(jax.vmap(predict_own)).lower(sites, w).as_text().splitlines()
    assert any("stablehlo.while" in line for line in lines)
    assert not [line for line in lines if "stablehlo.select" in line and f"2x{NUM_ROWS}x{NUM_CLASSES}xf32" in line]


def test_one_model_for_all_is_predict_sites_with_a_constant_model():
    sites, w = problem()
    sites, w = of_seed(sites, 0), w[0, 0]
    found = jax.jit(lambda s, w: evaluation.predict_all(Variables({"w": w}, {}), MODEL.predict, s, CHUNK))(sites, w)
    np.testing.assert_allclose(found, expected_outputs(sites, lambda _: w), rtol=1e-5, atol=1e-6)
    assert not np.asarray(found)[np.asarray(evaluation.site_of_row(sites)) == NUM_SITES].any()


def test_evaluate_reports_each_site_the_pool_and_the_spread_over_sites():
    sites, w = problem()
    stacked = jax.device_get(jax.jit(jax.vmap(lambda s, w: evaluation.evaluate(MODEL, own(w), s, CHUNK)))(sites, w))
    for seed in range(2):
        found, here = of_seed(stacked, seed), of_seed(sites, seed)
        outputs = expected_outputs(here, lambda i, seed=seed: w[seed, i])
        accuracy = expected_accuracy(outputs, here)
        owned = np.concatenate([np.arange(o, o + n) for o, n in zip(here.offset, here.size, strict=True)])
        np.testing.assert_allclose(found.site["accuracy"], accuracy, rtol=1e-6)
        pooled = sklearn.metrics.accuracy_score(here.y[owned], outputs[owned].argmax(axis=1))
        np.testing.assert_allclose(found.pooled["accuracy"], pooled, rtol=1e-6)
        loss = sklearn.metrics.log_loss(here.y[owned], np.asarray(jax.nn.softmax(outputs[owned])), labels=range(NUM_CLASSES))
        np.testing.assert_allclose(found.pooled["loss"], loss, rtol=1e-5)
        for name, site in found.site.items():
            np.testing.assert_allclose(found.mean[name], np.nanmean(site), rtol=1e-6)
            np.testing.assert_allclose(found.std[name], np.nanstd(site), rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(found.worst[name], np.nanmax(site) if name == "loss" else np.nanmin(site))
            assert found.missing[name] == np.isnan(site).sum()
        np.testing.assert_array_equal(found.counts["records"], here.size)
        assert found.missing["accuracy"] == np.sum(here.size == 0) > 0


def test_a_diverged_site_is_missing_and_spoils_no_other():
    sites, w = problem()
    sites, w = of_seed(sites, 0), w[0]
    run = jax.jit(lambda s, w: evaluation.evaluate(MODEL, own(w), s, CHUNK, {"accuracy": metrics.CLASSIFICATION["accuracy"]}))
    before, after = run(sites, w), run(sites, np.where(np.arange(NUM_SITES)[:, None, None] == 2, np.nan, w))
    intact = np.arange(NUM_SITES) != 2
    np.testing.assert_array_equal(after.site["accuracy"][intact], before.site["accuracy"][intact])
    assert np.isnan(after.site["accuracy"][2]) and after.missing["accuracy"] == before.missing["accuracy"] + 1
    assert after.counts["not_finite"][2] == SIZES[0, 2] and np.isfinite(after.mean["accuracy"])


def test_unseen_sites_are_scored_by_the_model_of_every_donor():
    sites, w = problem()
    donors = np.array([3, 0, 4], np.int32)

    def run(unseen, w, donors):
        return evaluation.evaluate_unseen(MODEL, own(w), unseen, donors, CHUNK)

    found = of_seed(jax.device_get(jax.jit(jax.vmap(run, in_axes=(0, 0, None)))(sites, w, donors)), 1)
    here = of_seed(sites, 1)
    each = np.array([expected_accuracy(expected_outputs(here, lambda _, d=d: w[1, d]), here) for d in donors])
    np.testing.assert_allclose(found.site["accuracy"], each.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.std["accuracy"], each.std(axis=0), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(found.missing["accuracy"], np.where(here.size == 0, donors.size, 0))
    np.testing.assert_array_equal(found.counts["records"], here.size)


def test_a_donor_whose_model_diverged_is_left_out_and_counted():
    sites, w = problem()
    sites, w = of_seed(sites, 1), w[1]
    chosen = {"accuracy": metrics.CLASSIFICATION["accuracy"]}
    run = jax.jit(lambda s, w: evaluation.evaluate_unseen(MODEL, own(w), s, jnp.array([0, 1], jnp.int32), CHUNK, chosen))
    found = run(sites, np.where(np.arange(NUM_SITES)[:, None, None] == 1, np.nan, w))
    accuracy = expected_accuracy(expected_outputs(sites, lambda _: w[0]), sites)
    np.testing.assert_allclose(found.site["accuracy"], accuracy, rtol=1e-6)
    np.testing.assert_array_equal(found.missing["accuracy"], np.where(sites.size == 0, 2, 1))
    np.testing.assert_array_equal(found.counts["not_finite"], sites.size)


@pytest.mark.parametrize("num_rows", [0, 2])
def test_no_unseen_sites_give_empty_arrays(num_rows):
    _, w = problem()
    nobody = jnp.zeros(0, jnp.int32)
    rows = {"features": jnp.zeros((num_rows, NUM_FEATURES))}
    none = Sites(rows, jnp.zeros(num_rows, jnp.int32), nobody, nobody)
    run = jax.jit(lambda w: evaluation.evaluate_unseen(MODEL, own(w), none, jnp.arange(2), CHUNK))
    assert {value.shape for value in jax.tree.leaves(run(w[0]))} == {(0,)}
    found = evaluation.score(MODEL, jnp.zeros((num_rows, NUM_CLASSES)), none, {"loss": metrics.CLASSIFICATION["loss"]})
    assert found.site["loss"].shape == (0,) and np.isnan(found.mean["loss"]) and np.isnan(found.worst["loss"])


def test_misuse_is_said():
    sites, w = problem()
    with pytest.raises(FlJaxError, match="at least 1"):
        evaluation.predict_sites(own(w[0]), MODEL.predict, of_seed(sites, 0), 0)
    outputs = jnp.zeros((NUM_ROWS, NUM_CLASSES))
    with pytest.raises(FlJaxError, match="no per-record loss"):
        evaluation.score(MODEL._replace(evaluate=None), outputs, of_seed(sites, 0), {"loss": metrics.CLASSIFICATION["loss"]})
