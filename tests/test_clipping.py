"""Bounds: the quantile that they find, the Gaussian that they cost, and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fl_jax import clipping
from fl_jax.errors import FlJaxError

NORMS = jnp.exp(jax.random.normal(jax.random.key(1), (400,)))  # a spread of a factor of a hundred


def followed(rule, steps=400):
    """The bounds of so many steps in which all of NORMS take part."""

    def step(state, key):
        bound = rule.bound(state)
        return rule.update(key, state, jnp.sum(jnp.where(NORMS <= bound, 0.5, -0.5)), jnp.float32(len(NORMS))), bound

    return np.asarray(jax.jit(lambda: jax.lax.scan(step, rule.init(), jax.random.split(jax.random.key(2), steps))[1])())


@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("initial", [0.01, 30.0])
def test_the_bound_finds_the_quantile_from_below_and_above(target, initial):
    bounds = followed(clipping.quantile(initial, 20.0, target=target))[-100:]
    share = np.mean(np.asarray(NORMS)[None] <= bounds[:, None])
    assert share == pytest.approx(target, abs=0.02)


def test_the_bound_moves_as_algorithm_1_says():
    """C exp(-eta (b - gamma)) with b = .8 of ten norms, and hardly any noise."""
    rule = clipping.quantile(3.0, 1e-6, target=0.3, learning_rate=0.7)
    after = rule.update(jax.random.key(0), rule.init(), jnp.float32(8 * 0.5 - 2 * 0.5), jnp.float32(10))
    assert float(after) == pytest.approx(3 * math.exp(-0.7 * (0.8 - 0.3)), rel=1e-5)


def test_the_counts_noise_has_the_stated_deviation():
    rule = clipping.quantile(1.0, 5.0, target=0.5, learning_rate=1.0)
    keys = jax.random.split(jax.random.key(3), 20_000)
    after = jax.vmap(lambda key: rule.update(key, rule.init(), jnp.float32(0), jnp.float32(50)))(keys)
    assert float(jnp.std(jnp.log(after)) * 50) == pytest.approx(5.0, rel=0.02)


@pytest.mark.parametrize("lowest, highest, initial, end", [(0.5, math.inf, 2.0, 0.5), (0.0, 3.0, 2.0, 3.0)])
def test_the_bound_stays_within_its_limits(lowest, highest, initial, end):
    rule = clipping.quantile(initial, 1.0, lowest=lowest, highest=highest)
    centred = jnp.float32(50 if end == 0.5 else -50)  # all norms below, or all above
    state = rule.init()
    for t in range(40):
        state = rule.update(jax.random.key(t), state, centred, jnp.float32(100))
    assert float(rule.bound(state)) == end


@pytest.mark.parametrize("z, cohort", [(1.0, 100), (0.3, 20), (4.0, 1000)])
def test_sum_and_count_together_cost_one_gaussian(z, cohort):
    """Gaussians without sampling compose in 1 / z^2; with the paper's m = 100 and z = 1 the sum gets 1.00504."""
    noise = cohort / 20
    own = clipping.quantile(1.0, noise).multiplier(z)
    assert own**-2 + (2 * noise) ** -2 == pytest.approx(z**-2)
    if (z, cohort) == (1.0, 100):
        assert own == pytest.approx(1.00504, abs=1e-5)


def test_fixed_and_scheduled_bounds_cost_nothing():
    rule = clipping.scheduled(optax.linear_schedule(4.0, 1.0, 3))
    state, bounds = rule.init(), []
    for _ in range(5):
        bounds.append(float(rule.bound(state)))
        state = rule.update(jax.random.key(0), state, jnp.float32(0), jnp.float32(1))
    np.testing.assert_allclose(bounds, [4, 3, 2, 1, 1])
    assert rule.multiplier(1.3) == clipping.constant(2.0).multiplier(1.3) == 1.3
    assert clipping.quantile(1.0, 1.0).multiplier(0.0) == 0.0


@pytest.mark.parametrize("make, words", [
    (lambda: clipping.constant(0.0), "bound must be above 0"), (lambda: clipping.constant(math.inf), "finite"),
    (lambda: clipping.quantile(1.0, 0.0), "count_noise must be above 0"), (lambda: clipping.quantile(-1.0, 1.0), "initial must be above 0"),
    (lambda: clipping.quantile(1.0, 1.0, target=1.0), "between 0 and 1"), (lambda: clipping.quantile(1.0, 1.0, lowest=2.0, highest=1.0), "between lowest"),
    (lambda: clipping.quantile(1.0, 0.5).multiplier(1.0), "give a count_noise above 0.5"),
])
def test_mistakes_are_named(make, words):
    with pytest.raises(FlJaxError, match=words):
        make()


def test_bounds_may_be_tracers():
    bounds = jax.vmap(lambda c: clipping.constant(c).bound(()))(jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(bounds, [1, 2])
    found = jax.vmap(lambda c, g: clipping.quantile(c, 1.0, target=g).init())(jnp.array([1.0, 2.0]), jnp.array([0.5, 0.6]))
    np.testing.assert_array_equal(found, [1, 2])
