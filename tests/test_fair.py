"""q-FedAvg and agnostic averaging against NumPy, where they become FedAvg, and for the sites that FedAvg leaves behind."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quadratics import COHORTS, KEY, MODEL, RATE, SITES, WHOLE, after, cohort_of, descended, loss, mapped, weights_of

from fl_jax import aggregators, algorithms, corrections, gradients, measured, models
from fl_jax.corrections import Corrected, Tilt, Way
from fl_jax.types import Sites, Variables

SGD = optax.sgd(RATE)


@pytest.fixture(scope="module")
def averaged():
    """What the rounds of COHORTS make by FedAvg."""
    return weights_of(after(algorithms.fedavg(MODEL, SGD, WHOLE), [cohort_of(*cohort) for cohort in COHORTS])[0])


def test_q_fedavg_is_algorithm_2(averaged):
    """Delta_k and h_k in NumPy, over three rounds of some sites with unequal steps and weights, which stand for the paper's p_k."""
    points = [(0.0, 7.0), (0.5, 3.0), (2.0, 1 / RATE)]
    states = mapped(lambda q, lipschitz: algorithms.q_fedavg(MODEL, RATE, WHOLE, q, lipschitz=lipschitz), *zip(*points, strict=True))
    for k, (q, lipschitz) in enumerate(points):
        w = np.zeros(2)
        for ids, weight, steps in COHORTS:
            deltas, lengths = [], []
            for i, count in zip(ids, steps, strict=True):
                way, f = lipschitz * (w - descended(i, w, count)), loss(i, w)
                deltas.append(f**q * way)
                lengths.append(q * f ** (q - 1) * way @ way + lipschitz * f**q)
            w = w - np.average(deltas, 0, weight) / np.average(lengths, 0, weight)
        np.testing.assert_allclose(weights_of(states)[k], w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(weights_of(states)[0], averaged, rtol=1e-5)
    by_default = mapped(lambda q: algorithms.q_fedavg(MODEL, RATE, WHOLE, q), [2.0])
    np.testing.assert_allclose(weights_of(by_default)[0], weights_of(states)[2], rtol=1e-5)


def test_agnostic_averaging_is_exponentiated_gradient(averaged):
    """In NumPy: log weights of the sites that were there rise by rate (loss - the weighted mean loss of the round before)."""
    rates, cohorts = (0.0, 0.3), COHORTS * 2
    states = mapped(lambda rate: algorithms.agnostic(MODEL, SGD, WHOLE, rate), rates, cohorts=cohorts)
    for k, rate in enumerate(rates):
        w, logs, before = np.zeros(2), np.zeros(4), None
        for r, (ids, weight, steps) in enumerate(cohorts):
            mixture = np.array(weight) * np.exp(logs[ids])
            losses = np.array([loss(i, w) for i in ids])
            w = np.average([descended(i, w, count) for i, count in zip(ids, steps, strict=True)], 0, mixture)
            logs[ids] += 0 if before is None else rate * (losses - before)
            before = np.average(losses, weights=mixture)
            if rate == 0 and r == len(COHORTS) - 1:
                np.testing.assert_allclose(w, averaged, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(weights_of(states)[k], w, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(states.clients.control[k], logs, rtol=1e-4)
        assert float(states.shared.control.broadcast[k]) == pytest.approx(before, rel=1e-5)


def test_with_all_sites_only_their_own_losses_move_the_mixture():
    """Then it is the textbook's: lambda_k proportional to w_k e^(rate times the sum of the site's losses)."""
    weight, sums, w = [1.0, 2.0, 1.0, 3.0], np.zeros(4), np.zeros(2)
    state = mapped(lambda rate: algorithms.agnostic(MODEL, SGD, WHOLE, rate), [0.05], cohorts=[([0, 1, 2, 3], weight, [2] * 4)] * 4)
    for r in range(4):
        mixture = weight * np.exp(0.05 * sums)
        sums += 0 if r == 0 else [loss(i, w) for i in range(4)]
        w = np.average([descended(i, w, 2) for i in range(4)], 0, mixture)
    found, expected = weight * np.exp(state.clients.control[0]), weight * np.exp(0.05 * sums)
    np.testing.assert_allclose(found / found.sum(), expected / expected.sum(), rtol=1e-4)
    np.testing.assert_allclose(weights_of(state)[0], w, rtol=1e-4)


MAJORITY = Sites(jnp.ones((5, 1)), jnp.array([0.0, 0.2, -0.2, 0.0, 4.0]), jnp.arange(5), jnp.ones(5, jnp.int32))
"""Five sites of one record, four of which agree."""


def test_the_worst_site_is_better_off_than_with_fedavg():
    """Sites' losses are (v - y)^2: the largest is least midway between the outer two, v = 1.9, where FedAvg ends at the mean, v = .8."""
    model = models.bridge(models.LinearCox(), jnp.zeros((1, 1)), models.squared_error)
    work = measured.in_order(1)._replace(steps=lambda num_records: jnp.full_like(num_records, 2))

    def settled(build, axis):
        def run(value):
            algorithm = build(value)
            start = algorithm.init(Variables({"Dense_0": {"kernel": jnp.zeros((1, 1))}}, {}), 5)
            return jax.lax.fori_loop(0, 1000, lambda r, state: algorithm.round(KEY, state, cohort_of(range(5), steps=2), MAJORITY)[0], start)

        return weights_of(jax.jit(jax.vmap(run))(jnp.array(axis)))[:, 0]

    fair = settled(lambda q: algorithms.q_fedavg(model, RATE, work, q), [0.0, 0.5, 2.0, 8.0])
    assert fair[0] == pytest.approx(0.8, abs=1e-3) and fair[3] < 1.9
    assert (np.diff(fair) > 0.1).all()
    agnostic = settled(lambda rate: algorithms.agnostic(model, SGD, work, rate), [0.0, 0.02])
    np.testing.assert_allclose(agnostic, [0.8, 1.9], atol=0.02)


@pytest.mark.parametrize("build", [lambda q: algorithms.q_fedavg(MODEL, RATE, WHOLE, q), lambda rate: algorithms.agnostic(MODEL, SGD, WHOLE, rate)],
                         ids=["q-FedAvg", "agnostic"])
def test_no_loss_is_too_small_or_too_large(build):
    """F^15 and e^(50 F) are far outside of float32."""
    scales = np.array([0.0, 1e-8, 1.0, 1e7])
    everyone = [([0, 1, 2, 3], [1.0] * 4, [7] * 4)] * 3
    run = jax.jit(lambda scale: mapped(build, [15.0, 50.0], cohorts=everyone, sites=SITES._replace(y=SITES.y * scale)))
    for scale in scales:
        state = run(scale)
        found = weights_of(state)
        assert np.isfinite(found).all() and np.isfinite(state.aggregator).all() and np.isfinite(state.clients.control).all()
        assert scale == 0 or (np.linalg.norm(found, axis=1) > 0.01 * scale).all()


def test_a_site_whose_loss_is_0_takes_part():
    """A log weight of minus infinity would be left out as not finite."""
    message, _ = corrections.told_loss(lambda *_: None).update(Tilt(jnp.float32(0), ()), (), Way(None, jnp.float32(1), jnp.float32(0)))
    assert float(message.log) == pytest.approx(np.log(1e-10))


@pytest.mark.parametrize("common", [0.0, 250.0, -250.0])
def test_what_is_common_to_all_log_weights_changes_nothing(common):
    """The level follows by 60 a round: from then on weights are right that float32 has no room for."""
    logs, weight, ways = np.array([0.0, 1.5, -2.0]), np.array([1.0, 2.0, 5.0]), np.array([3.0, -1.0, 4.0])
    aggregator = aggregators.tilted_mean()
    state = aggregator.init(None, 3)
    for _ in range(6):
        lifted = [aggregator.lift(KEY, state, w, Corrected(Variables(way, {}), Tilt(log + common, ()))) for w, way, log in
                  zip(weight, ways, logs, strict=True)]
        mean, state, _ = aggregator.combine(KEY, state, jax.tree.map(lambda *leaves: sum(leaves), *lifted))
    assert float(mean.variables.params) == pytest.approx(np.average(ways, weights=weight * np.exp(logs)), rel=1e-4)
    assert float(state) == pytest.approx(common + np.log(np.average(np.exp(logs), weights=weight)), rel=1e-4)


def test_no_other_aggregator_goes_with_them_and_a_loss_is_not_private():
    for build in (lambda **options: algorithms.q_fedavg(MODEL, RATE, WHOLE, 1.0, **options),
                  lambda **options: algorithms.agnostic(MODEL, SGD, WHOLE, 0.1, **options)):
        with pytest.raises(TypeError, match="aggregator of its own"):
            build(aggregator=aggregators.private_mean(1.0, 1.0, 4))
        algorithm = build(gradient=gradients.private(MODEL, 1.0, 1.0))
        assert algorithm.record_event(10) == algorithm.client_event == aggregators.mean().event
