"""Four sites with least squares in the plane, which NumPy can follow in float64: every step sees all records of its site."""

import jax
import jax.numpy as jnp
import numpy as np

from fl_jax import measured, models
from fl_jax.types import Cohort, Sites, Variables

KEY = jax.random.key(0)
RATE, STEPS = 0.05, 7
SIZES = np.array([3, 5, 4, 6])
RNG = np.random.default_rng(0)
X = [RNG.normal(size=(n, 2)) * scale for n, scale in zip(SIZES, (0.5, 1.0, 1.5, 2.0), strict=True)]
Y = [x @ w for x, w in zip(X, RNG.normal(size=(4, 2)) * 3, strict=True)]
SITES = Sites(jnp.asarray(np.concatenate(X), jnp.float32), jnp.asarray(np.concatenate(Y), jnp.float32),
              jnp.asarray(np.cumsum([0, *SIZES[:-1]]), jnp.int32), jnp.asarray(SIZES, jnp.int32))
MODEL = models.bridge(models.LinearCox(), jnp.zeros((1, 2)), models.squared_error)
WHOLE = measured.in_order(6)._replace(steps=lambda num_records: jnp.full_like(num_records, STEPS))  # all records are in a step
GRAMS = [2 * x.T @ x / len(x) for x in X]
PULLS = [2 * x.T @ y / len(x) for x, y in zip(X, Y, strict=True)]
COHORTS = [([0, 2, 3], [3.0, 1.0, 2.0], [7, 3, 5]), ([1, 2], [1.0, 4.0], [2, 6]), ([3, 0], [1.0, 1.0], [4, 4])]
"""Rounds of some sites, with unequal weights and steps: ids, weights, steps."""


def slope(i, w):
    """The gradient of site i's mean squared error."""
    return GRAMS[i] @ w - PULLS[i]


def loss(i, w):
    """The mean squared error of site i."""
    return np.mean((X[i] @ w - Y[i]) ** 2)


def descended(i, w, count, extra=lambda i, y: 0):
    """Where `count` steps of gradient descent at site i lead from w, with extra(i, y) added to each gradient."""
    y = np.array(w)
    for _ in range(count):
        y = y - RATE * (slope(i, y) + extra(i, y))
    return y


def start_of(algorithm):
    return algorithm.init(Variables({"Dense_0": {"kernel": jnp.zeros((2, 1))}}, {}), 4)


def cohort_of(ids, weights=None, steps=STEPS):
    ids = jnp.asarray(ids, jnp.int32)
    weight = jnp.ones(len(ids)) if weights is None else jnp.asarray(weights, jnp.float32)
    return Cohort(ids, weight, jnp.broadcast_to(jnp.asarray(steps, jnp.int32), ids.shape))


def weights_of(state):
    variables = getattr(state.shared, "variables", state.shared)
    return np.asarray(variables.params["Dense_0"]["kernel"])[..., 0]


def mapped(build, *axes, cohorts=COHORTS, sites=SITES):
    """The states after these rounds of build(*point) for each point of the axes of hyper-parameters, [P, ...], by one vmapped program."""
    rows = [(ids + [4] * (4 - len(ids)), weight + [0.0] * (4 - len(ids)), steps + [0] * (4 - len(ids))) for ids, weight, steps in cohorts]
    ids, weight, steps = (jnp.array(column) for column in zip(*rows, strict=True))

    def run(*point):
        algorithm = build(*point)

        def one(state, cohort):
            return algorithm.round(KEY, state, cohort, sites)[0], None

        return jax.lax.scan(one, start_of(algorithm), Cohort(ids, weight, steps))[0]

    return jax.jit(jax.vmap(run))(*(jnp.asarray(axis, jnp.float32) for axis in axes))


def after(algorithm, cohorts, sites=SITES):
    """The state and the metrics after a round for each cohort."""
    state, round = start_of(algorithm), jax.jit(algorithm.round)
    for cohort in cohorts:
        state, metrics = round(KEY, state, cohort, sites)
    return state, metrics
