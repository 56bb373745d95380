"""Means and medians equal numpy's; a private mean moves by at most its clip whatever a client sends, with noise as stated."""

import math
from functools import partial

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from fl_jax import aggregators, clipping, privacy
from fl_jax.aggregators.private import Summand
from fl_jax.errors import FlJaxError
from fl_jax.privacy import Cost, NeighboringRelation, Unit
from fl_jax.types import Variables

KEY = jax.random.key(11)
RNG = np.random.default_rng(0)
# of five clients
MESSAGES = {"a": RNG.normal(size=(5, 3, 2)).astype(np.float32), "b": [RNG.normal(size=(5, 4)).astype(np.float32)]}
SHARED = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:]), MESSAGES)
MEAN, MEDIAN = aggregators.mean(), aggregators.median()


runs = {}  # of each aggregator: traced once for all weights and messages


def aggregate(aggregator, weights, messages=MESSAGES, shared=SHARED):
    """What the engine does with a cohort: lift each, then sum or stack, then combine."""

    def run(weights, messages):
        state = aggregator.init(shared, len(weights))
        keys = jax.random.split(KEY, len(weights))
        summands = jax.vmap(lambda key, weight, message: aggregator.lift(key, state, weight, message))(keys, weights, messages)
        total = summands if aggregator.stacked else jax.tree.map(lambda leaf: leaf.sum(0), summands)
        mean, _, metrics = aggregator.combine(KEY, state, total)
        return mean, metrics

    return runs.setdefault(aggregator, jax.jit(run))(np.float32(weights), messages)


def close(a, b, tolerance=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


@pytest.mark.parametrize("weights", [[1, 1, 1, 1, 1], [3, 0, 50, 1, 7], [0, 0, 0, 0.5, 0]])
def test_mean_is_weighted(weights):
    expected = jax.tree.map(lambda leaf: np.average(leaf, axis=0, weights=weights), MESSAGES)
    close(aggregate(MEAN, weights)[0], expected)


@pytest.mark.parametrize("aggregator", [MEAN, MEDIAN, aggregators.private_mean(1.0, 0.0, 5)])
def test_of_nobody_is_zero(aggregator):
    close(aggregate(aggregator, [0] * 5)[0], SHARED, 0)


@pytest.mark.parametrize("weights", [[1, 1, 1, 1, 1], [3, 0, 50, 1, 7], [2, 0, 0, 1, 0], [0, 0, 9, 0, 0]])
def test_median_is_numpys_over_those_who_took_part(weights):
    present = np.array(weights) > 0
    expected = jax.tree.map(lambda leaf: np.median(leaf[present], axis=0), MESSAGES)
    close(aggregate(MEDIAN, weights)[0], expected, 1e-6)
    moved = jax.tree.map(np.copy, MESSAGES)
    for leaf in jax.tree.leaves(moved):
        leaf[~present] = 1e6
    close(aggregate(MEDIAN, weights, moved)[0], expected, 1e-6)


def test_a_median_is_not_moved_far_by_two_of_five():
    honest = jax.tree.map(lambda leaf: leaf[2:], MESSAGES)
    attacked = jax.tree.map(lambda leaf: np.concatenate([np.full_like(leaf[:2], 1e30), leaf[2:]]), MESSAGES)
    median = aggregate(MEDIAN, [1] * 5, attacked)[0]
    jax.tree.map(lambda found, leaf: np.testing.assert_array_equal(found, leaf.max(0)), median, honest)


CLIP = 0.7
PRIVATE = {
    "fixed": aggregators.private_mean(CLIP, 1.0, 10),
    "adaptive": aggregators.private_mean(clipping.quantile(CLIP, 2.0), 1.0, 10),
    "FTRL": aggregators.private_ftrl(CLIP, 1.0, 10, aggregators.tree(4)),
    "distributed": aggregators.distributed_private_mean(CLIP, 0.0, 10, 5),
}
LIFTED = {name: jax.jit(partial(one.lift, KEY, one.init(SHARED, 5))) for name, one in PRIVATE.items()}
lifted = LIFTED["fixed"]
ANY = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=False)
SPECIAL = st.sampled_from([0.0, np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1.8e19, 1.9e19, 1e-30, 1e-38, 0.7, 0.1])


def norm(tree):
    return np.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(tree)))


@settings(max_examples=300, deadline=None)
@given(hnp.arrays(np.float32, 10, elements=ANY | SPECIAL), st.sampled_from([0.0, 1.0, 17.0]))
def test_whatever_a_client_sends_moves_the_sum_by_at_most_the_clip(values, weight):
    message = {"a": values[:6].reshape(3, 2), "b": [values[6:]]}
    for lift in LIFTED.values():
        summand, centred, present = jax.device_get(lift(jnp.float32(weight), message))
        assert norm(summand) <= CLIP * (1 + 1e-6)  # NaN would not be
        assert present == (weight > 0)
        if weight == 0:
            assert norm(summand) == 0 and centred == 0
            continue
        assert abs(centred) == 0.5
        if np.isfinite(values).all() and 1e-15 < norm(message) < 1e18:
            scale = min(1.0, CLIP / norm(message))
            close(summand, jax.tree.map(lambda leaf, scale=scale: leaf * np.float32(scale), message), 2e-6)
            assert abs(norm(message) - CLIP) < 1e-5 or centred == (0.5 if norm(message) < CLIP else -0.5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_large_message_is_clipped_as_exactly(dtype):
    normal = np.random.default_rng(11).normal(size=1_000_000)
    message = {"a": np.float32(1e-3 + normal).astype(dtype), "b": np.full(300, 1e-2, dtype)}
    assert 0.9999 * CLIP < norm(lifted(jnp.float32(1), message)[0]) <= CLIP * (1 + 1e-5)


def test_one_client_more_moves_the_mean_by_at_most_clip_over_the_expected_cohort():
    silent = aggregators.private_mean(CLIP, 0.0, 4)
    large = jax.tree.map(lambda leaf: leaf * 100, MESSAGES)
    everybody, metrics = aggregate(silent, [1] * 5, large)
    for left_out in range(5):
        without, _ = aggregate(silent, [i != left_out for i in range(5)], large)
        moved = jax.tree.map(np.subtract, *jax.device_get((everybody, without)))
        np.testing.assert_allclose(norm(moved), CLIP / 4, rtol=1e-5)
    assert metrics["clipped"] == 1


def test_without_noise_and_clip_it_is_the_unweighted_mean_of_a_full_cohort_and_the_denominator_is_fixed():
    silent = aggregators.private_mean(1e9, 0.0, 5)
    mean, metrics = aggregate(silent, [1, 1, 1, 1, 1])
    close(mean, jax.tree.map(lambda leaf: leaf.mean(0), MESSAGES))
    assert metrics["clipped"] == 0 and metrics["noise_norm"] == 0
    np.testing.assert_allclose(metrics["signal_norm"], norm(mean), rtol=1e-5)
    close(aggregate(silent, [40, 9, 1, 1, 2])[0], mean)  # weights are presence only
    close(aggregate(silent, [1, 1, 0, 0, 0])[0], jax.tree.map(lambda leaf: leaf[:2].sum(0) / 5, MESSAGES))


def test_the_share_of_clipped_messages_is_of_those_who_came():
    norms = np.array([norm(jax.tree.map(lambda leaf, i=i: leaf[i], MESSAGES)) for i in range(5)])
    middle = float(np.sort(norms[1:])[1:3].mean())
    _, metrics = aggregate(aggregators.private_mean(middle, 0.0, 5), [0, 1, 1, 1, 1])
    assert metrics["clipped"] == 0.5


def test_noise_has_the_stated_deviation_on_every_leaf_and_is_independent():
    clip, multiplier, cohort = 0.5, 1.3, 20
    shared = {"a": jnp.zeros((400, 500)), "b": [jnp.zeros(200_000), jnp.zeros(3)]}
    private = aggregators.private_mean(clip, multiplier, cohort)
    nobody = Summand(shared, jnp.float32(0), jnp.float32(0))
    draw = jax.jit(lambda key: private.combine(key, (), nobody))
    noise, _, metrics = draw(KEY)
    stated = multiplier * clip / cohort
    a, b = np.ravel(noise["a"]), np.asarray(noise["b"][0])
    for leaf in (a, b):
        np.testing.assert_allclose(leaf.std(), stated, rtol=0.01)
        assert stats.kstest(leaf / stated, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.01
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.01
    assert abs(np.corrcoef(a, np.ravel(draw(jax.random.key(12))[0]["a"]))[0, 1]) < 0.01
    np.testing.assert_allclose(metrics["noise_norm"], norm(noise), rtol=0.01)


def test_clip_and_noise_may_be_tracers():
    def run(clip, multiplier):
        private = aggregators.private_mean(clip, multiplier, 5)
        return private.combine(KEY, (), private.lift(KEY, (), jnp.float32(1), jax.tree.map(lambda leaf: leaf[0], MESSAGES)))[0]

    mapped = jax.jit(jax.vmap(run))(jnp.array([0.1, 2.0]), jnp.array([0.0, 1.0]))
    close(jax.tree.map(lambda leaf: leaf[1], mapped), jax.jit(run)(2.0, 1.0))


def of_norms(norms):
    """Messages of these norms, one a client."""
    a, b = np.zeros((len(norms), 3, 2), np.float32), np.zeros((len(norms), 4), np.float32)
    a[:, 1, 0], b[:, 2] = 0.6 * np.asarray(norms), -0.8 * np.asarray(norms)
    return {"a": a, "b": [b]}


def adaptive_rounds(aggregator, norms, rounds):
    """The bounds of so many rounds to which clients of these norms come."""
    messages = of_norms(norms)

    def one(state, key):
        summands = jax.vmap(lambda message: aggregator.lift(KEY, state, jnp.float32(1), message))(messages)
        _, state, metrics = aggregator.combine(key, state, jax.tree.map(lambda leaf: leaf.sum(0), summands))
        return state, metrics

    return jax.jit(lambda: jax.lax.scan(one, aggregator.init(SHARED, len(norms)), jax.random.split(KEY, rounds))[1])()


@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
def test_an_adaptive_bound_finds_its_quantile(target):
    norms = np.exp(RNG.normal(size=200))
    adaptive = aggregators.private_mean(clipping.quantile(0.02, 10.0, target=target), 1.0, 200)
    metrics = jax.device_get(adaptive_rounds(adaptive, norms, 250))
    settled = metrics["clip"][-80:]
    np.testing.assert_allclose(np.mean(norms[:, None] <= settled), target, atol=0.02)
    shares = [np.mean(norms > bound) for bound in metrics["clip"]]
    np.testing.assert_allclose(metrics["clipped"], shares, atol=1e-6)


def test_an_adaptive_bound_moves_by_the_fixed_denominator():
    """C exp(-eta (b - gamma)), where an absent client counts as neither below nor above the bound; 3 of 10 came, 2 of them below."""
    adaptive = aggregators.private_mean(clipping.quantile(1.0, 1e-6, target=0.3, learning_rate=0.7), 0.0, 10)
    metrics = adaptive_rounds(adaptive, [0.5, 0.9, 3.0], 2)
    assert float(metrics["clip"][1]) == pytest.approx(math.exp(-0.7 * ((2 - 1) / 2 / 10 + 0.5 - 0.3)), rel=1e-5)


def test_an_adaptive_bound_and_the_sum_cost_one_gaussian_together():
    """m = 100, z = 1: noise of 1.00504 clips on the sum, 5 on the count; Andrew et al. 2021, Theorem 1."""
    cohort, shared = 100, {"a": jnp.zeros(400_000)}
    adaptive = aggregators.private_mean(clipping.quantile(0.5, cohort / 20), 1.0, cohort)
    noise, _, metrics = jax.jit(adaptive.combine)(KEY, adaptive.init(shared, 7), Summand(shared, jnp.float32(0), jnp.float32(0)))
    assert float(jnp.std(noise["a"])) * cohort / 0.5 == pytest.approx(1.00504, rel=0.005)
    np.testing.assert_allclose(metrics["noise_norm"], norm(noise), rtol=0.005)
    assert adaptive.event == dp_accounting.GaussianDpEvent(1.0)
    keys = jax.random.split(KEY, 20_000)
    nobody = Summand({"a": jnp.zeros(1)}, jnp.float32(0), jnp.float32(0))
    bounds = jax.jit(jax.vmap(lambda key: adaptive.combine(key, jnp.float32(0.5), nobody)[1]))(keys)
    assert float(jnp.std(jnp.log(bounds))) * cohort / 0.2 == pytest.approx(cohort / 20, rel=0.02)
    with pytest.raises(FlJaxError, match="count_noise above 0.5"):
        aggregators.private_mean(clipping.quantile(0.5, 0.5), 1.0, cohort)


def test_a_scheduled_bound_is_that_of_its_round():
    scheduled = aggregators.private_mean(clipping.scheduled(lambda step: 2.0 - 0.5 * step), 0.0, 1)
    metrics = adaptive_rounds(scheduled, [1.2], 3)
    np.testing.assert_allclose(metrics["clip"], [2.0, 1.5, 1.0])
    np.testing.assert_allclose(metrics["signal_norm"], [1.2, 1.2, 1.0], rtol=1e-6)


@pytest.mark.parametrize("came", [10, 6, 1, 0])
def test_sites_bring_the_noise_of_those_who_came(came):
    clip, multiplier, cohort = 0.5, 1.3, 10
    shared = {"a": jnp.zeros(100_000), "b": [jnp.zeros(7)]}
    nothing = jax.tree.map(lambda leaf: jnp.zeros((cohort, *leaf.shape)), shared)
    distributed = aggregators.distributed_private_mean(clip, multiplier, cohort, 6)
    noise, metrics = aggregate(distributed, [1.0] * came + [0.0] * (cohort - came), nothing, shared)
    stated = multiplier * clip * (came / cohort) ** 0.5 / cohort
    np.testing.assert_allclose(np.std(noise["a"]), stated, rtol=0.01)
    np.testing.assert_allclose(metrics["noise_norm"], norm(noise), rtol=0.01)


def test_noise_of_sites_is_added_to_their_mean_and_a_site_that_is_not_finite_adds_noise_too():
    silent = aggregators.distributed_private_mean(1e9, 0.0, 5, 5)
    close(aggregate(silent, [3, 1, 1, 9, 1])[0], jax.tree.map(lambda leaf: leaf.mean(0), MESSAGES))
    loud = aggregators.distributed_private_mean(1.0, 1.0, 5, 5)
    message = jax.jit(loud.lift)(KEY, (), jnp.float32(1), jax.tree.map(lambda leaf: leaf + jnp.nan, SHARED)).message
    assert np.isfinite(norm(message)) and norm(message) > 0


def test_distributed_noise_is_accounted_by_the_fewest_who_certainly_bring_it_and_for_replacing_one():
    event = aggregators.distributed_private_mean(0.5, 4.0, 100, 25).event

    def epsilon(event, relation):
        return privacy.PrivacyLedger(Unit.CLIENT, relation).spend(Cost(event, Unit.CLIENT), 3).epsilon(1e-5)

    replace, add = NeighboringRelation.REPLACE_ONE, NeighboringRelation.ADD_OR_REMOVE_ONE
    assert epsilon(event, replace) == pytest.approx(epsilon(dp_accounting.GaussianDpEvent(2.0), replace))
    assert epsilon(event, add) == math.inf
    assert privacy.natural_relation(event) is NeighboringRelation.REPLACE_ONE
    assert aggregators.distributed_private_mean(0.5, 4.0, 100, 0).event == dp_accounting.NonPrivateDpEvent()
    assert aggregators.distributed_private_mean(0.5, 0.0, 100, 9).event == dp_accounting.NonPrivateDpEvent()
    for fewest in (-1, 101):
        with pytest.raises(FlJaxError, match="fewest"):
            aggregators.distributed_private_mean(0.5, 4.0, 100, fewest)


def test_events_and_when_the_server_acts():
    assert aggregators.private_mean(0.1, 1.5, 4).event == dp_accounting.GaussianDpEvent(1.5)
    assert aggregators.private_mean(0.1, 1.5, 4).acts_when_empty
    silent = [aggregators.private_mean(0.1, multiplier, 4) for multiplier in (0.0, 0, np.float32(0))]
    for aggregator in (aggregators.mean(), aggregators.median(), *silent):
        assert aggregator.event == dp_accounting.NonPrivateDpEvent()
    assert not aggregators.mean().acts_when_empty and not aggregators.median().acts_when_empty


@pytest.mark.parametrize(("clip", "multiplier", "cohort", "named"), [
    (1.0, -0.1, 4, "noise_multiplier"), (1.0, float("nan"), 4, "noise_multiplier"), (1.0, 1.0, 0, "expected_cohort"),
    (1.0, 1.0, -2, "expected_cohort"), (0.0, 1.0, 4, "clip"), (-1.0, 1.0, 4, "clip"), (float("nan"), 1.0, 4, "clip"),
    (float("inf"), 1.0, 4, "clip"), (1.0, float("inf"), 4, "noise_multiplier"),
])
def test_mechanisms_that_mean_nothing_are_refused(clip, multiplier, cohort, named):
    with pytest.raises(FlJaxError, match=named):
        aggregators.private_mean(clip, multiplier, cohort)


def test_statistics_are_refused():
    private = aggregators.private_mean(1.0, 1.0, 4)
    for refusing in (private, *PRIVATE.values()):
        with pytest.raises(FlJaxError, match="norms.LOCAL"):
            refusing.init({"model": Variables({"w": jnp.ones(2)}, {"var": jnp.ones(2)})}, 4)
    assert private.init(Variables({"w": jnp.ones(2)}, {"var": None}), 4) == ()
