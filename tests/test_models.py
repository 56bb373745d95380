"""Laws of the models: flax and numpy as references, padding that is invisible, keyed randomness, published parameter counts."""

from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import special
from sklearn.metrics import log_loss

from fl_jax import models
from fl_jax.errors import FlJaxError
from fl_jax.models import convolution
from fl_jax.types import Batch, Variables


def key(number: int) -> jax.Array:
    return jax.random.key(number)


def normal(number: int, *shape: int) -> np.ndarray:
    return np.float32(np.random.default_rng(number).normal(size=shape))


def close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


# ---------------------------------------------------------------------------------------------------------------- losses


def test_losses_equal_sklearn_and_numpy():
    outputs, mask = normal(0, 6, 3), np.array([1, 1, 0, 1, 0, 1], np.float32)
    rows = np.asarray(mask) > 0
    y, beyond = np.array([0, 2, 1, 1, 0, 2]), np.array([3, 2, 1, 1, 0, 2])
    record = jax.jit(models.softmax_cross_entropy.record)
    softmax = special.softmax(np.float64(outputs), axis=1)
    close(jax.jit(models.softmax_cross_entropy.batch)(outputs, y, mask), log_loss(y[rows], softmax[rows], labels=[0, 1, 2]))
    close(record(outputs, y)[3], log_loss(y[3:4], softmax[3:4], labels=[0, 1, 2]))
    assert np.isnan(record(outputs, beyond)[0])
    logit, label, beyond = outputs[:, :1], np.array([0, 1, 1, 0, 1, 1]), np.array([0, 2, 1, 0, 1, 1])
    sigmoid = special.expit(np.float64(logit))[:, 0]
    close(jax.jit(models.sigmoid_cross_entropy.batch)(logit, label, mask), log_loss(label[rows], sigmoid[rows]))
    assert np.isnan(jax.jit(models.sigmoid_cross_entropy.record)(logit, beyond)).tolist() == [False, True] + [False] * 4
    squared = jax.jit(models.squared_error.batch)
    close(squared(outputs, outputs + 2, mask), 4.0)
    close(squared(logit, logit[:, 0] - 3, mask), 9.0)


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        (models.softmax_cross_entropy, jnp.zeros((4, 3), int)),
        (models.softmax_cross_entropy, jnp.zeros(4)),
        (models.sigmoid_cross_entropy, jnp.zeros(4, int)),
        (models.squared_error, jnp.zeros(4)),
    ],
)
def test_losses_refuse_shapes_that_would_broadcast(loss, y):
    with pytest.raises(FlJaxError):
        loss.record(jnp.zeros((4, 3)), y)


def test_masked_mean_ignores_nan_in_value_and_gradient_and_is_zero_over_nothing():
    mean = jax.jit(jax.value_and_grad(models.masked_mean))
    close(mean(np.array([3.0, np.nan], np.float32), np.array([1.0, 0.0], np.float32)), (3.0, np.array([1.0, 0.0])), 0)
    assert mean(np.array([np.nan, 1.0], np.float32), np.zeros(2, np.float32))[0] == 0


# ------------------------------------------------------------------------------------------------------- layers and pooling

CONVOLUTIONS = [
    # kernel, strides, padding, channels, image
    ((5, 5), (1, 1), "SAME", 1, (9, 7)),
    ((3, 3), (1, 1), "VALID", 3, (8, 9)),
    ((3, 3), (2, 2), ((1, 1), (1, 1)), 4, (8, 7)),
    ((2, 4), (1, 1), "SAME", 2, (5, 6)),
    ((1, 1), (2, 2), "SAME", 3, (6, 5)),
    ((3, 7), (1, 2), "VALID", 2, (9, 9)),
    ((3, 5), (1, 1), "SAME", 2, (4, 19)),
]
WITHOUT_STRIDES = [case for case in CONVOLUTIONS if case[1] == (1, 1)]


@pytest.mark.parametrize(
    ("implementation", "case"),
    [(models.cpu_convolution, case) for case in CONVOLUTIONS] + [(models.minimal_filtering, case) for case in WITHOUT_STRIDES]
    + [(models.im2col, CONVOLUTIONS[0])],
)
def test_conv_equals_flax_forward_and_in_both_gradients_over_clients(case, implementation):
    kernel_size, strides, padding, channels, image = case
    ours = models.Conv(6, kernel_size, strides, padding, implementation=implementation)
    theirs = nn.Conv(6, kernel_size, strides, padding)
    x = normal(1, 2, 3, *image, channels)
    params = jax.tree.map(  # random biases: one of zero tests nothing
        lambda leaf: np.random.default_rng(0).normal(size=(2, *leaf.shape)).astype(np.float32) / 4,
        jax.eval_shape(theirs.init, key(2), x[0]),
    )
    assert jax.tree.structure(params) == jax.tree.structure(jax.eval_shape(ours.init, key(0), x[0]))

    def outputs_and_gradients(layer):
        def value(params, x):
            y = layer.apply(params, x)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.vmap(jax.value_and_grad(value, argnums=(0, 1), has_aux=True)))(params, x)

    (_, y), gradients = outputs_and_gradients(ours)
    (_, expected), expected_gradients = outputs_and_gradients(theirs)
    close(y, expected, 1e-5)
    close(gradients, expected_gradients, 3e-5)


def test_conv_is_initialised_as_flax_does():
    x = normal(0, 2, 6, 6, 3)
    close(*(jax.jit(layer.init)(key(1), x) for layer in (models.Conv(4, (3, 3)), nn.Conv(4, (3, 3)))), 0)


def test_minimal_filtering_rounds_like_a_direct_sum_on_a_wide_layer():
    """Against float64 by numpy: the error stays within a few times that of the direct float32 sum."""
    x, kernel = normal(1, 1, 8, 8, 32), normal(2, 5, 5, 32, 8) / 28
    padding = ((2, 2), (2, 2))
    wide = np.pad(np.asarray(x, np.float64), ((0, 0), *padding, (0, 0)))
    exact = sum(wide[:, i : i + 8, j : j + 8] @ np.asarray(kernel[i, j], np.float64) for i in range(5) for j in range(5))
    convolutions = [jax.jit(f, static_argnums=(2, 3)) for f in (models.im2col, models.minimal_filtering)]
    direct, fast = (np.abs(f(x, kernel, (1, 1), padding) - exact).max() for f in convolutions)
    assert fast < 10 * max(direct, 5e-7)


def test_conv_inside_a_loop_of_steps_for_several_clients_equals_flax_and_has_a_second_derivative():
    x = normal(0, 2, 4, 6, 6, 2)

    def run(layer):
        params = jax.jit(layer.init)(key(1), x[0])

        def value(params, x):
            return jnp.mean(layer.apply(params, x) ** 2)

        def client(x):
            def step(_, params):
                return jax.tree.map(lambda a, b: a - 0.1 * b, params, jax.grad(value)(params, x))

            return jax.lax.fori_loop(0, 3, step, params)

        hessian_vector = jax.jit(lambda p: jax.jvp(lambda p: jax.grad(value)(p, x[0]), (p,), (p,))[1])
        return jax.jit(jax.vmap(client))(x), hessian_vector(params)

    close(run(models.Conv(3, (3, 3))), run(nn.Conv(3, (3, 3))))


@pytest.mark.parametrize(
    ("image", "window", "strides", "padding"),
    [
        ((6, 8), (2, 2), (2, 2), "VALID"),
        ((7, 5), (2, 2), (2, 2), "VALID"),
        ((9, 7), (3, 2), (3, 2), "VALID"),
        ((7, 7), (3, 3), (2, 2), "SAME"),
        ((7, 5), (2, 2), (2, 2), "SAME"),
        ((5, 5), (2, 2), None, "VALID"),
        ((7, 8), (3, 2), (2, 1), "VALID"),
        ((2, 5), (3, 2), (2, 1), "VALID"),
    ],
)
def test_max_pool_equals_flax_with_its_gradient(image, window, strides, padding):
    x = normal(0, 2, *image, 3)

    def both(pool):
        def value(x):
            y = pool(x, window, strides, padding)
            return jnp.sum(y * jnp.arange(1.0, y.size + 1).reshape(y.shape)), y

        return jax.jit(jax.grad(value, has_aux=True))(x)

    close(both(models.max_pool), both(nn.max_pool), 0)


# ----------------------------------------------------------------------------------------------------------------- bridge


class Plain(nn.Module):
    """BatchNorm and no argument for a mask: what a user brings."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x)))
        return nn.Dense(3)(x)


class Masked(nn.Module):
    """The same network, which passes the mask itself."""

    @nn.compact
    def __call__(self, x, train, mask=None):
        mask = None if mask is None else mask[:, None]
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x), mask=mask))
        return nn.Dense(3)(x)


class Nnx(nnx.Module):
    """The same network in nnx; dropout with rate 0 changes nothing and brings random state."""

    def __init__(self, rngs: nnx.Rngs, rate: float = 0.0):
        self.first = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.rest = nnx.List([nnx.Linear(5, 3, rngs=rngs)])

    def __call__(self, x):
        return self.rest[0](self.dropout(nnx.relu(self.norm(self.first(x)))))


def from_linen(variables: Variables) -> Variables:
    p, s = variables.params, variables.stats
    params = {"first": p["Dense_0"], "norm": p["BatchNorm_0"], "rest": {"0": p["Dense_1"]}}
    return Variables(params, {"norm": s["BatchNorm_0"]})


EXAMPLE = jax.ShapeDtypeStruct((8, 4), jnp.float32)
PLAIN = models.bridge(Plain(), EXAMPLE, models.softmax_cross_entropy)
MASKED = models.bridge(Masked(), EXAMPLE, models.softmax_cross_entropy)
NNX = models.bridge_nnx(Nnx, EXAMPLE, models.softmax_cross_entropy)
MODELS = {"linen": PLAIN, "linen with mask": MASKED, "nnx": NNX}
ALL = pytest.mark.parametrize("which", MODELS)


@cache
def initial(which: str) -> Variables:
    return jax.jit(MODELS[which].init)(key(1))


@cache
def gradient(which: str):
    model = MODELS[which]
    return jax.jit(jax.vmap(jax.value_and_grad(model.loss, argnums=1, has_aux=True), in_axes=(0, None, None, 0)))


def clients(batch: Batch) -> Batch:
    return jax.tree.map(lambda leaf: leaf[None], batch)


@ALL
def test_padding_is_invisible_in_loss_gradient_and_statistics(which):
    x, y = normal(0, 6, 4) + 1, np.array([0, 1, 2, 0, 1, 2])
    # Two rows of padding, one with NaN, and one that would change every mean.
    padded = np.concatenate([x, np.full((1, 4), np.nan, np.float32), np.full((1, 4), 1e3, np.float32)])[[6, 0, 1, 2, 7, 3, 4, 5]]
    labels = np.concatenate([y, [0, 1]])[[6, 0, 1, 2, 7, 3, 4, 5]]
    mask = np.array([0, 1, 1, 1, 0, 1, 1, 1], np.float32)
    variables = initial(which)
    evaluate = gradient(which)
    keys = jax.random.split(key(2), 1)
    expected = evaluate(keys, *variables, clients(Batch(x, y, np.ones(6, np.float32))))
    close(evaluate(keys, *variables, clients(Batch(padded, labels, mask))), expected, 2e-6)
    (_, stats), _ = expected
    assert all(np.abs(a[0] - b).max() > 1e-3 for a, b in zip(*map(jax.tree.leaves, (stats, variables.stats)), strict=True))


@ALL
@pytest.mark.parametrize("content", [0.0, jnp.nan])
def test_a_batch_of_padding_only_changes_nothing(which, content):
    variables = initial(which)
    batch = Batch(np.full((8, 4), content, np.float32), np.zeros(8, int), np.zeros(8, np.float32))
    (value, stats), gradients = gradient(which)(jax.random.split(key(0), 1), *variables, clients(batch))
    assert value == 0
    close(jax.tree.map(lambda leaf: leaf[0], stats), variables.stats, 0)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_three_forms_of_one_network_agree_in_training_and_evaluation():
    variables = initial("linen")
    batch = clients(Batch(normal(0, 8, 4), np.arange(8) % 3, np.float32(np.arange(8) < 5)))
    keys = jax.random.split(key(0), 1)
    (value, stats), gradients = gradient("linen")(keys, *variables, batch)
    close(gradient("linen with mask")(keys, *variables, batch), ((value, stats), gradients), 0)
    (nnx_value, nnx_stats), nnx_gradients = gradient("nnx")(keys, *from_linen(variables), batch)
    close(nnx_value, value)
    close(Variables(nnx_gradients, nnx_stats), from_linen(Variables(gradients, stats)))
    moved = Variables(variables.params, jax.tree.map(lambda leaf: leaf[0], stats))
    x = normal(5, 7, 4)
    outputs = jax.jit(PLAIN.predict)
    close(outputs(moved, x), jax.jit(MASKED.predict)(moved, x), 0)
    close(outputs(moved, x), jax.jit(NNX.predict)(from_linen(moved), x))
    assert np.abs(outputs(moved, x) - outputs(variables, x)).max() > 1e-3  # evaluation reads the running averages


def test_model_holds_the_module_of_every_leaf():
    assert PLAIN.modules[("BatchNorm_0",)] is nn.BatchNorm and PLAIN.modules[()] is Plain and PLAIN.name == "Plain"
    assert NNX.modules[("norm",)] is nnx.BatchNorm and NNX.modules[("rest", "0")] is nnx.Linear
    assert models.owner(PLAIN.modules, ("stats", "BatchNorm_0", "mean")) is nn.BatchNorm
    assert models.owner(NNX.modules, ("params", "rest", "0", "kernel")) is nnx.Linear
    with pytest.raises(FlJaxError, match="No module owns"):
        models.owner(PLAIN.modules, ())


def test_images_are_scaled_before_the_module_sees_them():
    x = np.array([[0, 128, 192, 255]], np.uint8)
    scaled = jax.jit(models.images_uint8)(x)
    close(scaled, [[-1.0, 0.0, 0.5, 127 / 128]], 0)
    model = models.bridge(models.TwoNN(2, 3), x, models.softmax_cross_entropy, preprocess=models.images_uint8)
    variables = jax.jit(model.init)(key(0))
    close(jax.jit(model.predict)(variables, x), jax.jit(models.TwoNN(2, 3).apply)({"params": variables.params}, scaled), 0)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_dropout_is_keyed_per_client_and_absent_in_evaluation(library):
    class Dropping(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))

    loss = models.softmax_cross_entropy
    dropping = {"linen": (models.bridge, Dropping()), "nnx": (models.bridge_nnx, lambda rngs: Nnx(rngs, 0.5))}
    build, module = dropping[library]
    model = build(module, EXAMPLE, loss)
    variables = jax.jit(model.init)(key(0))
    batch = Batch(normal(1, 8, 4), np.arange(8) % 3, np.ones(8, np.float32))
    keys = jax.random.wrap_key_data(jnp.array([[0, 1], [0, 2], [0, 1]], jnp.uint32))
    losses, _ = jax.jit(jax.vmap(model.loss, in_axes=(0, None, None, None)))(keys, *variables, batch)
    assert losses[0] == losses[2] and losses[0] != losses[1]
    at_rest = jax.jit(model.predict)(variables, batch.x)

    def dense(variables, x):
        return x @ variables.params["Dense_0"]["kernel"] + variables.params["Dense_0"]["bias"]

    without = dense if library == "linen" else NNX.predict
    close(at_rest, jax.jit(without)(variables, batch.x))


# -------------------------------------------------------------------------------------------------- what the bridge refuses


def test_other_collections_are_refused_by_name():
    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.variable("cache", "calls", lambda: jnp.zeros(()))
            return nn.Dense(2)(x)

    class CountingNnx(nnx.Module):
        def __init__(self, rngs):
            self.dense, self.calls = nnx.Linear(4, 2, rngs=rngs), nnx.Cache(jnp.zeros(()))

        def __call__(self, x):
            return self.dense(x)

    with pytest.raises(FlJaxError, match="cache"):
        models.bridge(Counting(), EXAMPLE, models.softmax_cross_entropy)
    with pytest.raises(FlJaxError, match="Cache"):
        models.bridge_nnx(CountingNnx, EXAMPLE, models.softmax_cross_entropy)


def test_modules_that_would_silently_misbehave_are_refused():
    class Deterministic(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic=True):
            return nn.Dropout(0.5, deterministic=deterministic)(x)

    class AlwaysMeasuring(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(x)

    class Needy(nn.Module):
        @nn.compact
        def __call__(self, x, lengths):
            return x + lengths

    class Flattening(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.BatchNorm(use_running_average=not train)(x.reshape(-1, 2)).reshape(-1, 4)

    class NormOfMyOwn(nnx.BatchNorm):
        pass

    class NnxFlattening(Nnx):
        def __call__(self, x):
            return self.norm(x.reshape(-1, 5)).reshape(-1, 10)

    class NnxOther(Nnx):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.norm = NormOfMyOwn(5, rngs=rngs)

    loss = models.softmax_cross_entropy
    class NeedsMask(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            return x * mask[:, None]

    class AlwaysNoisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + jax.random.normal(self.make_rng("noise"), x.shape)

    for module, words in (
        (Deterministic(), "deterministic"),
        (AlwaysMeasuring(), "evaluation mode"),
        (AlwaysNoisy(), "random numbers in evaluation mode"),
        (Needy(), "lengths"),
        (NeedsMask(), "mask=None"),
        (models.TwoNN, "an instance of a flax linen module"),
    ):
        with pytest.raises(FlJaxError, match=words):
            models.bridge(module, EXAMPLE, loss)
    with pytest.raises(FlJaxError, match="NormOfMyOwn"):
        models.bridge_nnx(NnxOther, EXAMPLE, loss)
    wide = jax.ShapeDtypeStruct((8, 10), jnp.float32)
    for model, width in ((models.bridge(Flattening(), EXAMPLE, loss), 4), (models.bridge_nnx(NnxFlattening, wide, loss), 10)):
        batch = Batch(np.zeros((8, width), np.float32), np.zeros(8, int), np.ones(8, np.float32))
        variables = jax.eval_shape(model.init, key(0))
        with pytest.raises(FlJaxError, match="padding rows cannot be told"):
            jax.eval_shape(model.loss, key(0), *variables, batch)
    with pytest.raises(FlJaxError, match="leading axis"):
        models.bridge(Plain(), jnp.zeros(()), loss)


def test_images_that_cannot_be_convolved_are_named():
    with pytest.raises(FlJaxError, match="channel axis"):
        models.bridge(models.FedAvgCNN(), jnp.zeros((2, 28, 28)), models.softmax_cross_entropy)
    with pytest.raises(FlJaxError, match="does not fit an image of"):
        models.bridge(models.PflCifarCNN(), jnp.zeros((2, 4, 4, 3)), models.softmax_cross_entropy)
    for convolve in (models.minimal_filtering, models.column_tiles):
        with pytest.raises(FlJaxError, match="use im2col"):
            convolve(jnp.zeros((1, 5, 5, 1)), jnp.zeros((3, 3, 1, 1)), (2, 2), ((0, 0), (0, 0)))


def test_an_example_of_float64_is_what_jax_makes_of_it():
    model = models.bridge(Plain(), np.zeros((2, 4)), models.softmax_cross_entropy)
    assert jax.eval_shape(model.init, key(0)).params["Dense_0"]["kernel"].dtype == jnp.float32


# ----------------------------------------------------------------------------------------------------------- architectures


@pytest.mark.parametrize(
    ("module", "shape", "parameters"),
    [
        (models.LogisticRegression(10), (784,), 7_850),
        (models.TwoNN(10), (28, 28, 1), 199_210),
        (models.FedAvgCNN(10), (28, 28, 1), 1_663_370),
        (models.FedAvgCNN(62), (28, 28, 1), 1_663_370 + 52 * 513),
        (models.FedAvgCNN(10, padding="VALID"), (28, 28, 1), 582_026),
        (models.DPSGDCNN(10), (28, 28, 1), 26_010),
        (models.NIIDBenchCNN(10), (28, 28, 1), 44_426),
        (models.NIIDBenchCNN(10), (32, 32, 3), 62_006),
        (models.NormedCNN(2), (28, 28, 1), 26_490),
        (models.PflCifarCNN(10), (32, 32, 3), 1_626_442),
        (models.ResNet18(10, models.batch_norm), (32, 32, 3), 11_173_962),
        (models.ResNet18(10, models.group_norm), (32, 32, 3), 11_173_962),
        (models.TabularNet(2, hidden=16), (13,), 13 * 16 + 16 + 2 * 16 + 16 * 2 + 2),
        (models.TabularNet(2, hidden=16, norm=models.layer_norm), (13,), 13 * 16 + 16 + 2 * 16 + 16 * 2 + 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_parameter_counts_are_the_published_ones(module, shape, parameters):
    model = models.bridge(module, jax.ShapeDtypeStruct((2, *shape), jnp.float32), models.softmax_cross_entropy)
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(model.init, key(0)).params)
    assert sum(leaf.size for _, leaf in leaves) == parameters
    for path, _ in leaves:
        assert models.owner(model.modules, ("params", *(k.key for k in path)))


def test_resnet18_table_holds_every_batch_norm_with_those_of_the_shortcuts():
    module = models.ResNet18(10, models.batch_norm, width=4)
    model = models.bridge(module, jnp.zeros((1, 16, 16, 3)), models.softmax_cross_entropy)
    norms = {path for path, module in model.modules.items() if module is nn.BatchNorm}
    shapes = jax.eval_shape(model.init, key(0))
    measured = {tuple(k.key for k in path[:-1]) for path, _ in jax.tree_util.tree_leaves_with_path(shapes.stats)}
    # 1 in the stem, 2 in each of 8 blocks, 1 in each of the 3 shortcuts that change the shape
    assert len(norms) == 1 + 16 + 3 and norms == measured
    for path, _ in jax.tree_util.tree_leaves_with_path(shapes.params):
        names = ("params", *(k.key for k in path))
        assert (models.owner(model.modules, names) is nn.BatchNorm) == (names[1:-1] in measured)


def test_the_convolution_of_a_cpu_follows_from_channels_and_features(monkeypatch):
    taken = []
    for name in ("column_tiles", "minimal_filtering", "im2col"):
        monkeypatch.setattr(convolution, name, lambda *given, name=name: taken.append(name))
    for channels, features, strides, width in ((1, 6, 1, 5), (6, 16, 1, 5), (1, 32, 1, 5), (16, 16, 1, 3), (1, 16, 2, 8), (16, 4, 1, 7)):
        models.cpu_convolution(
            jnp.zeros((1, 9, 9, channels)), jnp.zeros((width, width, channels, features)), (strides, strides), ((0, 0), (0, 0)))
    assert taken == ["column_tiles"] * 2 + ["minimal_filtering"] * 2 + ["im2col"] * 2


def test_fedavg_cnn_learns_the_same_with_either_convolution():
    batch = Batch(normal(0, 2, 8, 8, 1), np.array([0, 1]), np.ones(2, np.float32))

    shapes = jax.eval_shape(models.FedAvgCNN(3).init, key(1), batch.x)["params"]
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: (random.normal(size=leaf.shape) / leaf.shape[0] ** 0.5 / 4).astype(np.float32), shapes)

    def value_and_gradient(implementation):
        model = models.bridge(models.FedAvgCNN(3, implementation), batch.x, models.softmax_cross_entropy)
        return jax.jit(jax.value_and_grad(model.loss, argnums=1, has_aux=True))(key(0), params, {}, batch)

    close(value_and_gradient(models.xla_convolution), value_and_gradient(models.cpu_convolution))
