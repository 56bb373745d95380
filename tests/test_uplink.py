"""What is done to a message before it leaves its site: local noise as stated, whatever the site holds, and state that stays there."""

import math

import dp_accounting as dp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SIZES
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from fl_jax import aggregators, algorithms, batches, clients, gradients, privacy, sampling, uplink
from fl_jax.errors import FlJaxError
from fl_jax.privacy import Cost, NeighboringRelation, PrivacyLedger, Unit
from fl_jax.types import Cohort, Uplink

KEY = jax.random.key(9)
N = len(SIZES)
BATCHES = batches.epochs(1, 4)
CLIP, NOISE = 0.5, 1.3
LOUD, SILENT = uplink.local_dp(CLIP, NOISE), uplink.local_dp(CLIP, 0.0)
send = jax.jit(SILENT.apply)
ANY = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=False)
SPECIAL = st.sampled_from([0.0, np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1.8e19, 1.9e19, 1e-30, 0.5, 0.1])


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.float32, 8, elements=ANY | SPECIAL))
def test_before_the_noise_whatever_a_site_holds_is_within_the_clip(values):
    sent, _, metrics = jax.device_get(send(KEY, (), {"a": values[:6].reshape(3, 2), "b": values[6:]}))
    flat = np.float64(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(sent)]))
    assert np.linalg.norm(flat) <= CLIP * (1 + 1e-6)  # NaN would not be
    norm = np.linalg.norm(np.float64(values))
    if np.isfinite(values).all() and 1e-15 < norm < 1e18:
        np.testing.assert_allclose(flat, np.float64(values) * min(1, CLIP / norm), rtol=1e-5, atol=1e-7)
        assert abs(norm - CLIP) < 1e-5 or metrics["message_clipped"] == (norm > CLIP)


@pytest.mark.parametrize("fill", [0.0, 3.0, np.nan, np.inf])
def test_noise_has_the_stated_deviation_and_everybody_gets_it(fill):
    message = {"a": jnp.full((300, 200), fill), "b": jnp.full(60_000, fill)}
    sent, _, _ = jax.jit(LOUD.apply)(KEY, (), message)
    mean = CLIP / math.sqrt(120_000) if fill == 3 else 0.0
    for leaf in jax.tree.leaves(sent):
        noise = np.ravel(leaf) - mean
        assert noise.std() == pytest.approx(NOISE * CLIP, rel=0.01)
        assert stats.kstest(noise / (NOISE * CLIP), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(np.ravel(sent["a"]), sent["b"])[0, 1]) < 0.02


def test_noise_keeps_a_messages_type_and_clip_and_multiplier_may_be_tracers():
    message = {"a": jnp.ones(4, jnp.bfloat16)}
    assert LOUD.apply(KEY, (), message)[0]["a"].dtype == jnp.bfloat16
    mapped = jax.vmap(lambda clip, noise: uplink.local_dp(clip, noise).apply(KEY, (), {"a": jnp.ones(4)})[0]["a"])(
        jnp.array([0.1, CLIP]), jnp.array([0.0, NOISE]))
    np.testing.assert_allclose(mapped[1], LOUD.apply(KEY, (), {"a": jnp.ones(4)})[0]["a"], rtol=1e-5)


def cohort_of(ids):
    return Cohort(jnp.asarray(ids, jnp.int32), jnp.ones(len(ids)), jnp.full(len(ids), sampling.ALL_STEPS, jnp.int32))


def test_the_server_gets_independent_noise_of_every_site_and_round(plain_model, sites):
    """Sites that send nothing (a learning rate of 0): the mean of 3 of them is noise of z C / sqrt(3), anew in each round."""
    algorithm = algorithms.fedavg(plain_model, optax.sgd(0.0), BATCHES, uplink=LOUD)
    start = algorithm.init(plain_model.init(KEY), N)

    @jax.jit
    @jax.vmap
    def run(key):
        def one(state, key):
            after, _ = algorithm.round(key, state, cohort_of([0, 3, 5]), sites)
            return after, optax.tree.sub(after.shared.params, state.shared.params)["Dense_0"]["kernel"]

        return jax.lax.scan(one, start, jax.random.split(key, 3))[1]

    moved = np.asarray(run(jax.random.split(KEY, 1_500)))  # [runs, rounds, 4, 3]
    np.testing.assert_allclose(moved.std(axis=(0, 2, 3)), NOISE * CLIP / math.sqrt(3), rtol=0.03)
    assert abs(np.corrcoef(moved[:, 0].ravel(), moved[:, 1].ravel())[0, 1]) < 0.04


def test_an_uplink_keeps_its_state_at_its_site_beside_the_clients_own(normed_model, sites):
    """A transform that counts what it sends, under FedBN, whose norm layers stay at the sites as well."""

    def apply(key, state, message):
        return optax.tree.scale(2.0, message), state + 1, {"sent": state + 1}

    counting = Uplink(lambda shared: jnp.int32(0), apply)
    doubled, plain = (algorithms.fedbn(normed_model, optax.sgd(0.05), BATCHES, **options) for options in ({"uplink": counting}, {}))
    variables = normed_model.init(KEY)
    state, reference = doubled.init(variables, N), plain.init(variables, N)
    after, metrics = jax.jit(doubled.round)(KEY, state, cohort_of([0, 3, 5]), sites)
    expected, _ = jax.jit(plain.round)(KEY, reference, cohort_of([0, 3, 5]), sites)
    np.testing.assert_array_equal(after.clients.uplink, [1, 0, 0, 1, 0, 1])
    np.testing.assert_array_equal(metrics.clients["sent"], 1)
    assert {"loss", "records"} <= set(metrics.clients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.clients.client, expected.clients)
    moved, once = (optax.tree.sub(one.shared.params, state.shared.params) for one in (after, expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 2 * b, atol=1e-6), moved, once)
    deployed = doubled.model(after, jnp.int32(3))
    assert jax.tree.structure(deployed) == jax.tree.structure(variables)


def test_the_event_is_for_replacing_all_that_a_site_holds(plain_model):
    algorithm = algorithms.fedavg(plain_model, optax.sgd(0.1), BATCHES, uplink=uplink.local_dp(CLIP, 4.0))
    event = algorithm.record_event(7)
    for sampler in (sampling.everyone(), sampling.fixed_size(2, N), sampling.poisson(0.5, N), sampling.poisson(0.5, N, capacity=4)):
        cost = privacy.client_cost(algorithm, sampler)
        assert cost.event == event and cost.unit is Unit.CLIENT  # no sampling amplifies what is seen message by message
    aggregated = algorithms.fedavg(
        plain_model, optax.sgd(0.1), BATCHES, uplink=uplink.local_dp(CLIP, 4.0), aggregator=aggregators.private_mean(1.0, 2.0, 3))
    assert aggregated.client_event == dp.GaussianDpEvent(2.0)
    replaced, added = (PrivacyLedger(Unit.RECORD, relation).spend(Cost(event, Unit.RECORD), 5).epsilon(1e-5)
                       for relation in (NeighboringRelation.REPLACE_ONE, NeighboringRelation.ADD_OR_REMOVE_ONE))
    half = PrivacyLedger(Unit.RECORD, NeighboringRelation.ADD_OR_REMOVE_ONE).spend(Cost(dp.GaussianDpEvent(2.0), Unit.RECORD), 5)
    assert replaced == pytest.approx(half.epsilon(1e-5)) and added == math.inf
    assert privacy.natural_relation(event) is NeighboringRelation.REPLACE_ONE
    assert uplink.local_dp(CLIP, 0.0).event == dp.NonPrivateDpEvent()


def test_a_client_that_is_private_already_pays_no_more_for_its_uplink(plain_model):
    client = clients.local_training(plain_model, gradients.plain(plain_model), optax.sgd(0.1), BATCHES)
    private = client._replace(event=lambda num_records: dp.GaussianDpEvent(num_records))
    assert clients.uplink(private, LOUD).event(3) == dp.GaussianDpEvent(3)
    assert clients.uplink(client, LOUD).event(3) == LOUD.event


def test_what_means_nothing_is_refused(normed_model):
    with pytest.raises(FlJaxError, match="noise_multiplier"):
        uplink.local_dp(1.0, -1.0)
    with pytest.raises(FlJaxError, match="clip"):
        uplink.local_dp(0.0, 1.0)
    with pytest.raises(FlJaxError, match="norms.LOCAL"):
        algorithms.fedavg(normed_model, optax.sgd(0.1), BATCHES, uplink=LOUD).init(normed_model.init(KEY), N)
