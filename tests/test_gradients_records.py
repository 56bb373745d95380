"""The two forms of per-record gradients agree on every network, and a record's contribution is within what its norm says."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fl_jax import models
from fl_jax.gradients import FLAT, PER_LAYER, normalised, records, scaling
from fl_jax.trees import path_of
from fl_jax.types import Batch

KEY = jax.random.key(0)
ROWS = 5


class Several(nn.Module):
    """What is not a plain dense layer on one row: a sequence, one layer called twice, tied weights, bare parameters, lifted
    layers."""

    @nn.compact
    def __call__(self, x):  # [B, 3, 4]
        x = nn.tanh(nn.LayerNorm()(nn.Dense(4, name="on_sequence")(x)))
        twice = nn.Dense(4, name="twice")
        x = nn.tanh(twice(nn.tanh(twice(x[:, 0]))) + x[:, 1])
        tied = nn.Dense(4, use_bias=False, name="tied")
        x = nn.tanh(tied(x)) @ tied.variables["params"]["kernel"].T if not self.is_initializing() else tied(x)
        x = x * self.param("scale", nn.initializers.ones_init(), (4,))
        layers = nn.scan(Cell, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = layers(name="scanned")(x, None)
        x = nn.remat(nn.Dense)(4, name="recomputed")(x)
        x = nn.Dense(6, use_bias=False, name="plain")(x)
        return nn.Dense(3, name="last")(nn.GroupNorm(2)(x[:, None, :])[:, 0])


class Cell(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(4)(x)), None


class Words(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.tanh(nn.Dense(5)(nn.Embed(7, 4)(x).mean(1))))


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = models.ResidualBlock(4, (2, 2), lambda train: nn.GroupNorm(2))(x, train)
        return nn.Dense(3)(x.mean((1, 2)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm, self.last = nnx.Linear(4, 6, rngs=rngs), nnx.LayerNorm(6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


def of(module, shape, loss=models.softmax_cross_entropy, dtype=jnp.float32):
    return models.bridge(module, jax.ShapeDtypeStruct((1, *shape), dtype), loss), shape, dtype


NETWORKS = {
    "logistic regression": lambda: of(models.LogisticRegression(3), (4,)),
    "2NN": lambda: of(models.TwoNN(3, hidden=5), (2, 3)),
    "linear risk": lambda: of(models.LinearCox(), (4,), models.squared_error),
    "FedAvg CNN": lambda: of(models.FedAvgCNN(3), (4, 4, 1)),
    "DP-SGD CNN": lambda: of(models.DPSGDCNN(3), (18, 18, 1)),
    "CIFAR CNN with dropout": lambda: of(models.PflCifarCNN(3), (6, 6, 3)),
    "residual block": lambda: of(Residual(), (4, 4, 2)),
    "several": lambda: of(Several(), (3, 4)),
    "words": lambda: of(Words(), (6,), dtype=jnp.int32),
    "nnx": lambda: (models.bridge_nnx(Nnx, jnp.zeros((1, 4)), models.softmax_cross_entropy), (4,), jnp.float32),
    "ResNet-18": lambda: of(models.ResNet18(3, lambda train: nn.GroupNorm(2), width=4), (8, 8, 3)),
}
WITHOUT_GRADIENTS = {"logistic regression": 1, "2NN": 3, "linear risk": 1, "FedAvg CNN": 2, "DP-SGD CNN": 2, "CIFAR CNN with dropout": 2,
                     "residual block": 1, "several": 2, "words": 2, "nnx": 0, "ResNet-18": 1}


def a_batch(shape, dtype, loss_of_one_output):
    rng, rows = np.random.default_rng(0), np.arange(ROWS, dtype=np.int32)
    x = np.float32(2 * rng.normal(size=(ROWS, *shape))) if dtype == jnp.float32 else rng.integers(0, 7, (ROWS, *shape), np.int32)
    return x, np.float32(rows / 2) if loss_of_one_output else rows % 3


def a_model_of(model, seed=1):
    """Parameters of about the size of initial ones, the biases random too."""
    rng = np.random.default_rng(seed)

    def drawn(path, leaf):
        deviation = np.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.05
        return np.float32(deviation * rng.normal(size=leaf.shape) + (path_of(path)[-1] == "scale"))

    return jax.tree_util.tree_map_with_path(drawn, jax.eval_shape(model.init, KEY).params)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name == "ResNet-18" else ()) for name in NETWORKS])
def test_forms_agree_on_every_network(name):
    model, shape, dtype = NETWORKS[name]()
    x, y = a_batch(shape, dtype, name == "linear risk")
    params = a_model_of(model)
    paths = [path_of(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    keys = jax.random.split(KEY, ROWS)
    each_leaf = list(range(len(paths)))
    factors = np.float32(np.random.default_rng(2).uniform(size=(ROWS, len(paths))))
    found = []

    @jax.jit
    def both():
        one = jax.tree.map(lambda leaf: leaf[0], (x, y))
        found.append(records._dense_layers(model, params, {}, *one, {path: i for i, path in enumerate(paths)}))
        forms = [form(model)(keys, params, {}, x, y, each_leaf) for form in (records.materialised, records.by_layers)]
        return [(held.losses, held.norms, held.combine(factors)) for held in forms]

    reference, ours = both()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), ours, reference)
    assert len(found[0]) == WITHOUT_GRADIENTS[name]
    whole = np.linalg.norm(reference[1], axis=1)
    assert whole.min() > 0.01 and len(np.unique(whole)) == ROWS


def test_the_sum_without_clipping_is_the_gradient_of_the_batch():
    """A reference that knows nothing of records: the mean loss of a batch, differentiated as a whole."""
    model, shape, dtype = NETWORKS["several"]()
    x, y = a_batch(shape, dtype, False)
    params = a_model_of(model)
    whole = jax.jit(jax.grad(lambda p: model.loss(KEY, p, {}, Batch(x, y, np.ones(ROWS, np.float32)))[0]))(params)
    groups = [0] * len(jax.tree.leaves(params))
    keys, share = jax.random.split(KEY, ROWS), jnp.full((ROWS, 1), 1 / ROWS)
    ours = jax.jit(lambda: records.by_layers(model)(keys, params, {}, x, y, groups).combine(share))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, whole)


EXTREME = [0.0, 1.0, -1.0, 1e-40, 1e-30, 1e-20, 1e-19, 1e10, 1e18, 1.8e19, 1e25, 3e38, np.inf, -np.inf, np.nan]


@pytest.mark.parametrize("rule", [FLAT, PER_LAYER, normalised()], ids=["flat", "per layer", "normalised"])
def test_no_record_adds_more_than_the_bound_whatever_it_holds(rule):
    """Products of what underflows and what overflows are where a norm could come out too small. Norms of sums in float64."""
    bound = 0.7
    rng = np.random.default_rng(0)
    a, d = np.float32(rng.choice(EXTREME, (400, 6))), np.float32(rng.choice(EXTREME, (400, 5)))
    plain = rng.random((400, 2)) < 0.5  # rows of one magnitude, where nothing else hides a product
    a = np.where(plain[:, :1], np.float32(rng.choice(EXTREME, (400, 1))), a)
    d = np.where(plain[:, 1:], np.float32(rng.choice(EXTREME, (400, 1))), d)
    g = np.float32(rng.choice([*EXTREME, 0.0, 0.0, 0.0, 0.0], (400, 3)))
    groups = scaling.groups(rule, [("one", "kernel"), ("one", "bias"), ("two", "scale")])

    @jax.jit
    @jax.vmap
    def alone(a, d, g):
        a, d = a[None], d[None]
        a_norm, d_norm = records._norm(a), records._norm(d)
        parts = [records._Product(a, d, a_norm * d_norm), records._Bias(d, d_norm), records._Materialised(g[None])]
        held = records._records(jnp.zeros(1), parts, groups, jax.tree.structure([0, 0, 0]))
        factors, fits, _ = scaling.factors(rule, held.norms, jnp.float32(bound))
        return held.combine(factors), fits

    sums, fits = alone(a, d, g)
    norms = np.sqrt(sum((np.float64(leaf).reshape(400, -1) ** 2).sum(1) for leaf in sums))
    assert np.isfinite(norms).all() and norms.max() <= bound * (1 + 1e-5)
    bad = ~(np.isfinite(a).all(1) & np.isfinite(d).all(1) & np.isfinite(g).all(1))
    assert (norms[bad] == 0).all() and not np.asarray(fits)[bad, 0].any() and bad.any() and (norms[~bad] > 0.1).any()


def test_a_record_of_rows_that_cancel_is_within_the_bound():
    """A sequence whose rows cancel to their rounding: a norm from Gram matrices is noise there, or 0, and the record would go
    through."""
    model, _, _ = of(Sequence(), (2, 4))
    x = jnp.array([[[1e6, 3e5, 7e5, 1.0], [-1e6, -3e5, -7e5, 2.0]]])
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), jax.eval_shape(model.init, KEY).params)

    @jax.jit
    def total():
        held = records.by_layers(model)(jax.random.split(KEY, 1), params, {}, x, jnp.zeros(1, jnp.int32), [0])
        factors, _, _ = scaling.factors(FLAT, held.norms, jnp.float32(0.01))
        return held.combine(factors)

    assert float(np.sqrt(sum(np.sum(np.asarray(leaf) ** 2) for leaf in jax.tree.leaves(total())))) <= 0.01 * (1 + 1e-5)


class Sequence(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, use_bias=False)(x).sum(1) * jnp.arange(3.0)
