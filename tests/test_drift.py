"""SCAFFOLD, FedDyn, FedNova, Mime-lite and adaptive FedProx against NumPy, against FedAvg where they become it, and on problems that FedAvg provably does not solve."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quadratics import (
    COHORTS,
    GRAMS,
    KEY,
    MODEL,
    PULLS,
    RATE,
    SITES,
    STEPS,
    WHOLE,
    after,
    cohort_of,
    descended,
    loss,
    mapped,
    slope,
    start_of,
    weights_of,
)

from fl_jax import aggregators, algorithms, batches, gradients, models, norms, sampling
from fl_jax.errors import FlJaxError
from fl_jax.transforms import add_term, averaging_statistics
from fl_jax.types import Cohort, Sites, Variables

FEDAVG = algorithms.fedavg(MODEL, optax.sgd(RATE), WHOLE)  # one, so that its round is traced once


def three_places(ids, weight, steps):
    """A cohort whose last places are nobody's, so that cohorts of two and of three sites are one program."""
    more = 3 - len(ids)
    return cohort_of([*ids, *[4] * more], [*weight, *[0.0] * more], [*steps, *[0] * more])


ROUNDS = [three_places(*cohort) for cohort in COHORTS]


def minimum(weights):
    """Where the weighted mean of the sites' losses has its minimum."""
    return np.linalg.solve(np.average(GRAMS, 0, weights), np.average(PULLS, 0, weights))


def converged(algorithm, draw, rounds=600):
    """The weights after many rounds."""

    def one(state, key):
        return algorithm.round(key, state, draw(key), SITES)[0], None

    return weights_of(jax.jit(lambda keys: jax.lax.scan(one, start_of(algorithm), keys)[0])(jax.random.split(KEY, rounds)))


def everyone(key):
    return cohort_of(range(4))


def two_of_four(key):
    return sampling.fixed_size(2, 4, sampling.equal).draw(key, 0, SITES)._replace(steps=jnp.full(2, STEPS, jnp.int32))


def test_scaffold_is_algorithm_1_under_partial_participation():
    """Option II in NumPy, over three rounds of some sites with unequal weights and steps; the server's control stays the mean of theirs."""
    state, _ = after(algorithms.scaffold(MODEL, RATE, WHOLE, server_learning_rate=0.8), ROUNDS)
    w, c, own = np.zeros(2), np.zeros(2), np.zeros((4, 2))
    for ids, weight, steps in COHORTS:
        moved, changed = [], np.zeros(2)
        for i, count in zip(ids, steps, strict=True):
            y = w.copy()
            for _ in range(count):
                y -= RATE * (slope(i, y) - own[i] + c)
            new = own[i] - c + (w - y) / (count * RATE)
            moved.append(w - y)
            changed += new - own[i]
            own[i] = new
        w = w - 0.8 * np.average(moved, 0, weight)
        c = c + changed / 4
    np.testing.assert_allclose(weights_of(state), w, rtol=1e-4, atol=1e-5)
    controls = np.asarray(state.clients.control["Dense_0"]["kernel"])[:, :, 0]
    np.testing.assert_allclose(controls, own, rtol=1e-4, atol=1e-4)
    server = np.asarray(state.shared.control["Dense_0"]["kernel"])[:, 0]
    np.testing.assert_allclose(server, c, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(server, controls.mean(0), rtol=1e-4, atol=1e-5)


def test_feddyn_is_algorithm_1_under_partial_participation():
    alpha, cohorts = 0.3, [(ids, [1.0] * len(ids), steps) for ids, _, steps in COHORTS]
    state, _ = after(algorithms.feddyn(MODEL, optax.sgd(RATE), WHOLE, alpha), [three_places(*cohort) for cohort in cohorts])
    w, h, own = np.zeros(2), np.zeros(2), np.zeros((4, 2))
    for ids, _, steps in cohorts:
        found = []
        for i, count in zip(ids, steps, strict=True):
            y = w.copy()
            for _ in range(count):
                y -= RATE * (slope(i, y) - own[i] + alpha * (y - w))
            own[i] -= alpha * (y - w)
            found.append(y)
        h = h - alpha * np.sum(np.array(found) - w, axis=0) / 4
        w = np.mean(found, 0) - h / alpha
    np.testing.assert_allclose(weights_of(state), w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.asarray(state.clients.control["Dense_0"]["kernel"])[:, :, 0], own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_fednova_divides_each_way_by_its_length(momentum):
    """In NumPy by the paper's vector a: how often a step's gradient counts by the end of a round with momentum."""
    state, metrics = after(algorithms.fednova(MODEL, RATE, WHOLE, momentum=momentum), ROUNDS)
    w = np.zeros(2)
    for ids, weight, steps in COHORTS:
        directions, lengths = [], []
        for i, count in zip(ids, steps, strict=True):
            y, velocity = w.copy(), np.zeros(2)
            for _ in range(count):
                velocity = momentum * velocity + slope(i, y)
                y -= RATE * velocity
            lengths.append(sum(momentum**k for s in range(count) for k in range(count - s)))
            directions.append((w - y) / lengths[-1])
        w = w - np.average(lengths, weights=weight) * np.average(directions, 0, weight)
    np.testing.assert_allclose(weights_of(state), w, rtol=1e-4, atol=1e-5)
    assert float(metrics.server["effective_steps"]) == pytest.approx(np.average(lengths, weights=weight), rel=1e-5)


@pytest.mark.parametrize("algorithm, cohort", [
    (algorithms.scaffold(MODEL, RATE, WHOLE), cohort_of(range(4), steps=1)),
    (algorithms.fednova(MODEL, RATE, WHOLE), cohort_of(range(4), [1.0, 2.0, 3.0, 4.0])),
    (algorithms.fednova(MODEL, RATE, WHOLE, momentum=0.0), cohort_of([0, 2, 4, 4], [1.0, 2.0, 0.0, 0.0], 4)),
], ids=["SCAFFOLD, one step of all", "FedNova, equal steps", "FedNova, equal steps of some"])
def test_special_cases_are_fedavg(algorithm, cohort):
    expected, _ = after(FEDAVG, [cohort] * 3)
    found, _ = after(algorithm, [cohort] * 3)
    np.testing.assert_allclose(weights_of(found), weights_of(expected), rtol=1e-5)


def averaged():
    """What the rounds of COHORTS make by FedAvg."""
    return weights_of(after(FEDAVG, ROUNDS)[0])


def test_mime_lite_is_algorithm_1_under_partial_participation():
    """SGDm in NumPy: (1 - beta) g + beta m with the server's m, which then follows the full gradients at the broadcast model."""
    betas = (0.0, 0.7)
    states = mapped(lambda beta: algorithms.mime_lite(MODEL, RATE, WHOLE, momentum=beta), betas)
    for k, beta in enumerate(betas):
        w, m = np.zeros(2), np.zeros(2)
        for ids, weight, steps in COHORTS:
            found = [descended(i, w, count, lambda i, y, m=m, beta=beta: beta * (m - slope(i, y))) for i, count in zip(ids, steps, strict=True)]
            m = (1 - beta) * np.average([slope(i, w) for i in ids], 0, weight) + beta * m
            w = np.average(found, 0, weight)
        np.testing.assert_allclose(weights_of(states)[k], w, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose((1 - beta) * states.shared.control[0].trace["Dense_0"]["kernel"][k, :, 0], m, rtol=1e-5)
    np.testing.assert_allclose(weights_of(states)[0], averaged(), rtol=1e-5)


def test_mime_lite_with_adam_freezes_both_moments():
    """Each step has its own gradient's share of what the server broadcast, as if it were the server's next; none of it stays."""
    rate, b1, b2, eps = 0.1, 0.8, 0.9, 1e-2
    state, _ = after(algorithms.mime_lite(MODEL, 0.0, WHOLE, optimizer=optax.adam(rate, b1, b2, eps)), ROUNDS)
    w, m, v = np.zeros(2), np.zeros(2), np.zeros(2)
    for t, (ids, weight, steps) in enumerate(COHORTS, start=1):
        found = []
        for i, count in zip(ids, steps, strict=True):
            y = w.copy()
            for _ in range(count):
                first, second = (1 - b1) * slope(i, y) + b1 * m, (1 - b2) * slope(i, y) ** 2 + b2 * v
                y -= rate * first / (1 - b1**t) / (np.sqrt(second / (1 - b2**t)) + eps)
            found.append(y)
        mean = np.average([slope(i, w) for i in ids], 0, weight)
        w, m, v = np.average(found, 0, weight), (1 - b1) * mean + b1 * m, (1 - b2) * mean**2 + b2 * v
    np.testing.assert_allclose(weights_of(state), w, rtol=1e-4)
    moments = state.shared.control[0]
    assert int(moments.count) == 3
    np.testing.assert_allclose(moments.mu["Dense_0"]["kernel"][:, 0], m, rtol=1e-4)
    np.testing.assert_allclose(moments.nu["Dense_0"]["kernel"][:, 0], v, rtol=1e-4)


def test_fedprox_with_adaptive_mu_in_numpy():
    """The loss of the broadcast model moves the mu of the next round, over rounds of other sites, in which it rises and falls. A mu that
    begins at 0 and does not change is FedAvg's."""
    cohorts, points = COHORTS * 3, ([0.3, 0.25], [0.0, 0.25], [0.7, 0.0])
    states = mapped(lambda mu, change: algorithms.fedprox_adaptive(MODEL, optax.sgd(RATE), WHOLE, mu, change=change, patience=1),
                    *zip(*points, strict=True), cohorts=cohorts)
    for k, (mu, change) in enumerate(points):
        w, last, seen = np.zeros(2), None, {mu}
        for ids, weight, steps in cohorts:
            now = np.average([loss(i, w) for i in ids], weights=weight)
            pull = [descended(i, w, count, lambda i, y, w=w, mu=mu: mu * (y - w)) for i, count in zip(ids, steps, strict=True)]
            w = np.average(pull, 0, weight)
            if last is not None:
                mu = max(mu + change * np.sign(now - last), 0)
            seen, last = seen | {mu}, now
        assert len(seen) > 1 or change == 0
        assert float(states.shared.control.mu[k]) == pytest.approx(mu)
        np.testing.assert_allclose(weights_of(states)[k], w, rtol=1e-4, atol=1e-5)


def test_fedprox_with_a_mu_that_no_rising_loss_lifts_from_0_is_fedavg():
    cohorts = [cohort_of(range(4), [1.0, 2.0, 3.0, 4.0])] * 4
    state, _ = after(algorithms.fedprox_adaptive(MODEL, optax.sgd(RATE), WHOLE), cohorts)
    expected, _ = after(FEDAVG, cohorts)
    assert float(state.shared.control.mu) == 0 and int(state.server.falls) == 3
    np.testing.assert_allclose(weights_of(state), weights_of(expected), rtol=1e-6)


def test_mu_follows_a_sequence_of_losses_as_published():
    """The model stands still, and each round has one of ten sites, whose losses are 0 to 9."""
    sites = Sites(jnp.ones((10, 1)), jnp.sqrt(jnp.arange(10.0)), jnp.arange(10), jnp.ones(10, jnp.int32))
    model = models.bridge(models.LinearCox(), jnp.zeros((1, 1)), models.squared_error)

    @jax.jit
    def mus(start, losses):
        algorithm = algorithms.fedprox_adaptive(model, optax.sgd(0.0), batches.updates(1, 1), start)

        def one(state, id):
            state, _ = algorithm.round(KEY, state, Cohort(id[None], jnp.ones(1), jnp.ones(1, jnp.int32)), sites)
            return state, state.shared.control.mu

        return jax.lax.scan(one, algorithm.init(Variables({"Dense_0": {"kernel": jnp.zeros((1, 1))}}, {}), 10), losses)[1]

    for start, losses, expected in [
        (0.0, "987654321678", [0] * 9 + [0.1, 0.2, 0.3]),  # it cannot fall from 0
        (0.0, "567665432100", [0, 0.1, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.1, 0.1, 0.1]),  # equal losses begin a series anew
        (1.0, "987654321012", [1, 1, 1, 1, 1, 0.9, 0.9, 0.9, 0.9, 0.9, 1.0, 1.1]),  # nine falls are not twice five
        (1.0, "997654321043", [1, 1, 1, 1, 1, 1, 0.9, 0.9, 0.9, 0.9, 1.0, 1.0]),
        (0.15, "876543987654", [0.15, 0.15, 0.15, 0.15, 0.15, 0.05, 0.15, 0.15, 0.15, 0.15, 0.15, 0.05]),
    ]:
        np.testing.assert_allclose(mus(start, jnp.array([int(digit) for digit in losses])), expected, atol=1e-6)


def test_scaffold_and_feddyn_find_the_optimum_that_fedavg_provably_misses():
    """FedAvg's fixed point is where the ways of the sites cancel, sum_i (1 - (1 - lr A_i)^K) (w - w_i) = 0, which is not the minimum of the mean
    loss where curvatures differ."""
    best = minimum(np.ones(4))
    ways = [np.eye(2) - np.linalg.matrix_power(np.eye(2) - RATE * gram, STEPS) for gram in GRAMS]
    own = [np.linalg.solve(gram, pull) for gram, pull in zip(GRAMS, PULLS, strict=True)]
    fixed = np.linalg.solve(sum(ways), sum(way @ w for way, w in zip(ways, own, strict=True)))
    averaged = converged(FEDAVG, everyone)
    np.testing.assert_allclose(averaged, fixed, rtol=1e-3)
    miss = np.linalg.norm(averaged - best)
    assert miss > 0.05 * np.linalg.norm(best)
    for algorithm in (algorithms.scaffold(MODEL, RATE, WHOLE), algorithms.feddyn(MODEL, optax.sgd(RATE), WHOLE, 0.3)):
        assert np.linalg.norm(converged(algorithm, everyone) - best) < 0.01 * miss
        assert np.linalg.norm(converged(algorithm, two_of_four, 3_000) - best) < 0.02 * miss


def test_fednova_finds_the_optimum_that_unequal_steps_hide_from_fedavg():
    """Small steps, of which the first site makes one and the last seven: FedAvg minimises a mean loss weighted by steps."""
    steps, small = [1, 3, 5, 7], 0.002

    def unequal(key):
        return cohort_of(range(4), steps=steps)

    averaged = converged(algorithms.fedavg(MODEL, optax.sgd(small), WHOLE), unequal, 4_000)
    np.testing.assert_allclose(averaged, minimum(steps), rtol=0.05, atol=0.05)
    found = converged(algorithms.fednova(MODEL, small, WHOLE), unequal, 4_000)
    assert np.linalg.norm(found - minimum(np.ones(4))) < 0.1 * np.linalg.norm(averaged - minimum(np.ones(4)))


def test_a_correction_stands_where_the_chain_has_it():
    """NIID-Bench adds lr (c - c_i) after the momentum: with a constant gradient and term, momentum multiplies the one and not the other."""
    gradient, term = {"w": jnp.array(1.0)}, {"w": jnp.array(10.0)}

    def moved(optimizer, count=3):
        optimizer, state, total = optax.with_extra_args_support(optimizer), None, 0.0
        state = optimizer.init(gradient)
        for _ in range(count):
            updates, state = optimizer.update(gradient, state, gradient, term=term)
            total += float(updates["w"])
        return total

    counted = 1 + 1.9 + 2.71
    assert moved(optax.chain(add_term(), optax.trace(0.9))) == pytest.approx(11 * counted)
    assert moved(optax.chain(optax.trace(0.9), add_term())) == pytest.approx(counted + 30)
    assert moved(optax.chain(optax.trace(0.9))) == pytest.approx(counted)


def test_a_servers_optimizer_leaves_controls_alone():
    tree = (Variables({"w": jnp.ones(2)}, {"mean": jnp.ones(2)}), {"c": jnp.ones(2)})
    optimizer = averaging_statistics(optax.sgd(0.5), others=optax.sgd(1.0))
    updates, _ = optimizer.update(tree, optimizer.init(tree), tree)
    assert [float(leaf[0]) for leaf in jax.tree.leaves(updates)] == [-0.5, -1.0, -1.0]


def test_fednova_takes_no_other_aggregator():
    with pytest.raises(TypeError, match="aggregator of its own"):
        algorithms.fednova(MODEL, RATE, WHOLE, aggregator=aggregators.median())


def test_what_is_measured_of_records_is_not_private():
    """Whatever the oracle and the aggregator promise of the model, they do not of a loss or a gradient that is sent beside it."""
    private = {"gradient": gradients.private(MODEL, 1.0, 1.0), "aggregator": aggregators.private_mean(1.0, 1.0, 4)}
    fedavg = algorithms.fedavg(MODEL, optax.sgd(RATE), WHOLE, **private)
    adaptive = algorithms.fedprox_adaptive(MODEL, optax.sgd(RATE), WHOLE, **private)
    nothing = aggregators.mean().event
    assert fedavg.record_event(10) != nothing and fedavg.client_event != nothing
    assert adaptive.record_event(10) == nothing and adaptive.client_event == nothing
    with pytest.raises(FlJaxError, match="not a private mechanism"):
        algorithms.mime_lite(MODEL, RATE, WHOLE, **private)


def test_mime_lite_shares_the_state_of_parameters_that_all_share(normed_model):
    with pytest.raises(FlJaxError, match="LOCAL_STATISTICS"):
        algorithms.mime_lite(normed_model, RATE, WHOLE, norms=norms.LOCAL).init(jax.jit(normed_model.init)(KEY), 4)
