"""The proximal term is the gradient of what FedProx adds; server moments are the published ones; statistics are averaged."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fl_jax import transforms
from fl_jax.types import Variables

KEY = jax.random.key(5)


def normal(number, like):
    keys = jax.random.split(jax.random.fold_in(KEY, number), len(jax.tree.leaves(like)))
    leaves = [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, jax.tree.leaves(like), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


PARAMS = normal(0, {"a": jnp.zeros((3, 2)), "b": {"c": jnp.zeros(4)}})
ANCHOR, GRADIENT = normal(1, PARAMS), normal(2, PARAMS)


def close(a, b, tolerance=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def pulled(mu, anchor=ANCHOR, transform=transforms.proximal):
    optimizer = transform(mu)
    return optimizer.update(GRADIENT, optimizer.init(PARAMS), PARAMS, anchor=anchor)[0]


@pytest.mark.parametrize("mu", [0.0, 0.01, 3.0])
def test_proximal_adds_the_gradient_of_the_proximal_term(mu):
    def term(params):
        return mu / 2 * sum(jnp.sum((w - a) ** 2) for w, a in zip(jax.tree.leaves(params), jax.tree.leaves(ANCHOR), strict=True))

    close(pulled(mu), jax.tree.map(jnp.add, GRADIENT, jax.grad(term)(PARAMS)))


def test_proximal_leaves_alone_what_stays_at_the_site():
    found = pulled(0.7, {"a": ANCHOR["a"], "b": {"c": None}})
    close(found["b"], GRADIENT["b"], 0)
    close(found["a"], pulled(0.7)["a"], 0)


def test_mu_may_be_a_tracer_and_the_anchor_reaches_it_through_a_chain():
    def step(mu):
        return pulled(mu, transform=lambda mu: optax.chain(transforms.proximal(mu), optax.trace(0.9), optax.scale(-0.1)))

    grid = jnp.array([0.0, 0.3, 2.0])
    mapped = jax.jit(jax.vmap(step))(grid)
    for i, mu in enumerate([0.0, 0.3, 2.0]):
        close(jax.tree.map(lambda leaf, i=i: leaf[i], mapped), jax.tree.map(lambda g: -0.1 * g, pulled(mu)))


SECOND_MOMENTS = {
    "adam": lambda v, g: 0.99 * v + 0.01 * g**2,
    "yogi": lambda v, g: v - 0.01 * g**2 * np.sign(v - g**2),
    "adagrad": lambda v, g: v + g**2,
}


@pytest.mark.parametrize("name", SECOND_MOMENTS)
def test_server_moments_are_algorithm_2_without_bias_correction(name):
    b1, tau = 0.9, 0.05
    rule = SECOND_MOMENTS[name] if name != "yogi" else lambda v, g: v - 0.01 * g**2 * jnp.sign(v - g**2)

    def run(b1, tau):
        optimizer = transforms.scale_by_server_moments(rule, b1, tau)
        state = optimizer.init(PARAMS)
        directions = []
        for step in range(3):
            direction, state = optimizer.update(normal(step, PARAMS), state, PARAMS)
            directions.append(direction)
        return directions, state

    directions, state = jax.jit(run)(b1, tau)  # both are tracers
    for leaf, path in ((lambda tree: np.float64(tree["a"]), "a"), (lambda tree: np.float64(tree["b"]["c"]), "c")):
        m, v = 0.0, tau**2
        for step in range(3):
            g = leaf(normal(step, PARAMS))
            m, v = b1 * m + (1 - b1) * g, SECOND_MOMENTS[name](v, g)
            np.testing.assert_allclose(leaf(directions[step]), m / (np.sqrt(v) + tau), rtol=2e-5, atol=1e-6, err_msg=path)
        np.testing.assert_allclose(leaf(state.second), v, rtol=2e-5)


def variables(number):
    return normal(number, Variables({"w": jnp.zeros(3)}, {"var": jnp.zeros(2)}))


def test_statistics_are_averaged_whatever_the_optimizer():
    shared = Variables({"w": jnp.ones(3)}, {"var": jnp.full(2, 0.01)})
    optimizer, alone = transforms.averaging_statistics(optax.adam(0.5)), optax.adam(0.5)
    state, alone_state = optimizer.init(shared), alone.init(shared.params)
    for round in range(5):
        measured = {"var": jnp.abs(variables(round).stats["var"])}  # what sites found, on average
        message = Variables(variables(round).params, optax.tree.sub(shared.stats, measured))
        updates, state = optimizer.update(message, state, shared)
        expected, alone_state = alone.update(message.params, alone_state, shared.params)
        close(updates.params, expected)
        shared = optax.apply_updates(shared, updates)
        close(shared.stats, measured)
        assert shared.stats["var"].min() > 0


def test_an_adaptive_server_alone_would_drive_a_variance_below_zero():
    """What averaging_statistics is there for: the same messages, all of positive variances."""
    variance, optimizer = jnp.float32(0.01), optax.adam(0.5)
    updates, _ = optimizer.update(variance - 0.02 * jnp.float32(0.1), optimizer.init(variance))
    assert variance + updates < 0


def test_statistics_are_found_inside_larger_trees_and_missing_halves_do_no_harm():
    half = Variables({"w": None, "u": jnp.ones(2)}, {"var": None})
    shared = {"model": variables(0), "control": normal(1, PARAMS), "half": half}
    message = jax.tree.map(lambda leaf: leaf + 1, shared)
    optimizer = transforms.averaging_statistics(optax.sgd(0.25))
    updates, _ = optimizer.update(message, optimizer.init(shared), shared)
    expected = jax.tree.map(lambda leaf: -0.25 * leaf, message)
    expected["model"] = expected["model"]._replace(stats=jax.tree.map(lambda leaf: -leaf, message["model"].stats))
    close(updates, expected)
