"""Messages of fewer bits: what error feedback sends over rounds sums to what was to be sent, and bits are those of a packed message."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SIZES
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fl_jax import algorithms, batches, uplink
from fl_jax.errors import FlJaxError
from fl_jax.sampling import everyone
from fl_jax.types import Variables

KEY = jax.random.key(3)
SHARED = {"kernel": jnp.zeros((6, 5)), "bias": jnp.zeros(7)}
SIZE = 37
FED_BACK = {
    "quantize": uplink.quantize(2, error_feedback=True), "top_k": uplink.top_k(0.1), "float16": uplink.float16(),
    "one level": uplink.quantize(1, error_feedback=True),
}
VALUES = hnp.arrays(np.float32, SIZE, elements=st.floats(-1e3, 1e3, width=32, allow_subnormal=False))


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def messages(count, scale=1.0):
    return jax.tree.map(lambda leaf: scale * jax.random.normal(KEY, (count, *leaf.shape)), SHARED)


@pytest.mark.parametrize("name", FED_BACK)
def test_what_is_sent_over_rounds_sums_to_what_was_to_be_sent(name):
    transform, rounds = FED_BACK[name], 200

    def one(state, step):
        sent, state, metrics = transform.apply(*step[:1], state, step[1])
        return state, (sent, metrics["compression_error"])

    given = messages(rounds)
    state, (sent, error) = jax.jit(lambda: jax.lax.scan(one, transform.init(SHARED), (jax.random.split(KEY, rounds), given)))()
    missing = flat(state)
    np.testing.assert_allclose(flat(jax.tree.map(lambda leaf: leaf.sum(0), sent)) + missing,
                               flat(jax.tree.map(lambda leaf: leaf.sum(0), given)), atol=2e-4)
    assert (error > 0).all() and (error < 1).all()
    assert np.linalg.norm(missing) < 60  # and does not grow with rounds: 200 messages of norm 6 are 86 long together


@settings(max_examples=100, deadline=None)
@given(VALUES)
def test_an_error_that_is_fed_back_is_shorter_than_what_it_is_of(values):
    message = {"kernel": values[:30].reshape(6, 5), "bias": values[30:]}
    for transform in FED_BACK.values():
        sent, state, _ = transform.apply(KEY, transform.init(SHARED), message)
        np.testing.assert_allclose(flat(sent) + flat(state), flat(message), rtol=1e-6, atol=1e-4)
        assert np.linalg.norm(np.float64(flat(state))) <= np.linalg.norm(np.float64(flat(message))) * (1 + 1e-6)
    for name, levels in (("one level", 1), ("quantize", 2)):  # to the nearest level of each leaf
        _, state, _ = FED_BACK[name].apply(KEY, FED_BACK[name].init(SHARED), message)
        for error, leaf in zip(state, jax.tree.leaves(message), strict=True):
            assert np.abs(error).max() <= np.abs(leaf).max() / (2 * levels) * (1 + 1e-5)


def test_random_rounding_is_unbiased_on_levels_and_independent():
    transform = uplink.quantize(3)
    message = jax.tree.map(lambda leaf: leaf[0], messages(1))
    sent = jax.jit(jax.vmap(lambda key: transform.apply(key, (), message)[0]))(jax.random.split(KEY, 20_000))
    for name, leaf in message.items():
        largest = np.abs(leaf).max()
        steps = np.asarray(sent[name]) / largest * 3
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
        assert np.abs(steps).max() <= 3 + 1e-4 and (np.sign(steps) * np.sign(leaf) > -1).all()
        np.testing.assert_allclose(np.asarray(sent[name]).mean(0), leaf, atol=5 * largest / 3 / 2 / math.sqrt(20_000))
    correlation = np.corrcoef(np.asarray(sent["kernel"])[:, 0, 0], np.asarray(sent["kernel"])[:, 0, 1])[0, 1]
    assert abs(correlation) < 0.04


def test_top_k_sends_the_largest_and_nothing_else():
    message = {"kernel": jnp.arange(30.0).reshape(6, 5) - 15, "bias": jnp.array([100.0, -50, 0, 0, 0, 0, 0])}
    sent, _, _ = uplink.top_k(3 / SIZE, error_feedback=False).apply(KEY, (), message)
    assert np.flatnonzero(flat(sent)).size == 3
    np.testing.assert_array_equal(sent["bias"], [100, -50, 0, 0, 0, 0, 0])
    assert sent["kernel"][0, 0] == -15
    even = uplink.top_k(0.5, error_feedback=False).apply(KEY, (), jax.tree.map(jnp.ones_like, SHARED))[0]
    assert flat(even).sum() == math.ceil(SIZE / 2)  # ties are broken


def test_half_precision_is_numpys():
    message = jax.tree.map(lambda leaf: leaf[0], messages(1, 1e4)) | {"bias": jnp.array([1e6, -1e6, 0, 1e-9, 1, 2, 3])}
    sent, state, _ = uplink.float16().apply(KEY, uplink.float16().init(SHARED), message)
    np.testing.assert_array_equal(sent["kernel"], np.asarray(message["kernel"]).astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(sent["bias"][:2], [65504, -65504])
    np.testing.assert_allclose(state[0][0], 1e6 - 65504)


@pytest.mark.parametrize("transform", [*FED_BACK.values(), uplink.quantize(2)])
def test_a_message_that_is_not_finite_stays_so(transform):
    for bad in (np.nan, np.inf):
        message = {"kernel": jnp.ones((6, 5)).at[2, 3].set(bad), "bias": jnp.ones(7)}
        assert not np.isfinite(flat(transform.apply(KEY, transform.init(SHARED), message)[0])).all()


@pytest.mark.parametrize("transform, bits", [
    (uplink.quantize(1), 2 * 32 + 2 * SIZE), (uplink.quantize(7), 2 * 32 + 4 * SIZE), (uplink.quantize(8), 2 * 32 + 5 * SIZE),
    (uplink.top_k(0.05), 2 * (32 + 6)), (uplink.top_k(1.0), 33 * SIZE), (uplink.float16(), 16 * SIZE)])
def test_bits_are_those_of_a_packed_message(transform, bits):
    """By hand: 3, 15 and 17 values of a quantized coordinate; two of 37 places of 6 bits each, or a bit for each place."""
    assert transform.bits(SHARED) == bits
    statistics = {"mean": jnp.zeros(3)}
    assert transform.bits(Variables(SHARED, statistics)) == bits + 3 * 32
    assert transform.bits((SHARED, jnp.int32(0))) == transform.bits((SHARED, jnp.float32(0))) == bits + 32


def test_statistics_and_counts_go_as_they_are():
    message = (Variables({"w": jnp.linspace(0, 1, 9)}, {"var": jnp.linspace(0, 1, 9)}), jnp.int32(12_345))
    sent, _, _ = uplink.top_k(0.2).apply(KEY, uplink.top_k(0.2).init(message), message)
    np.testing.assert_array_equal(sent[0].stats["var"], message[0].stats["var"])
    assert sent[1] == 12_345 and np.count_nonzero(sent[0].params["w"]) == 2


def test_a_round_counts_the_bytes_that_it_sends_and_everything_at_full_width_is_fedavg(normed_model, sites):
    work, variables = batches.epochs(1, 4), normed_model.init(KEY)
    plain = algorithms.fedavg(normed_model, optax.sgd(0.1), work)
    sparse = algorithms.fedavg(normed_model, optax.sgd(0.1), work, uplink=uplink.top_k(0.1))
    whole = algorithms.fedavg(normed_model, optax.sgd(0.1), work, uplink=uplink.top_k(1.0))
    state, reference = whole.init(variables, len(SIZES)), plain.init(variables, len(SIZES))
    down, up = sparse.payload(sparse.init(variables, len(SIZES)))
    parameters, statistics = (sum(leaf.size for leaf in jax.tree.leaves(half)) for half in variables)
    count = math.ceil(0.1 * parameters)
    assert down == plain.payload(reference)[0] == plain.payload(reference)[1] == 4 * (parameters + statistics)
    assert up == math.ceil((32 * count + min(count * math.ceil(math.log2(parameters)), parameters)) / 8) + 4 * statistics
    cohort = everyone().draw(KEY, 0, sites)
    after, _ = jax.jit(whole.round)(KEY, state, cohort, sites)
    expected, _ = jax.jit(plain.round)(KEY, reference, cohort, sites)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.shared, expected.shared)


def test_what_means_nothing_is_refused():
    with pytest.raises(FlJaxError, match="1 level or more"):
        uplink.quantize(0)
    for share in (0.0, 1.5, math.nan):
        with pytest.raises(FlJaxError, match="share of coordinates"):
            uplink.top_k(share)
