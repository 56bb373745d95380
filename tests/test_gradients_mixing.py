"""Whatever mixes the records of a batch is refused by name, and nothing else is."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fl_jax import gradients, models
from fl_jax.errors import FlJaxError
from fl_jax.gradients import mixing
from fl_jax.gradients.mixing import refuse_mixing
from fl_jax.models import Loss, masked_mean
from fl_jax.types import Batch, Survival

KEY = jax.random.key(0)


class Between(nn.Module):
    """Two dense layers with something between them."""

    middle: nn.Module

    @nn.compact
    def __call__(self, x, train: bool = False):
        return nn.Dense(3)(nn.relu(self.middle(nn.Dense(4, name="before")(x))))


class Centred(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x - jax.lax.stop_gradient(x.mean(0))


class Ranked(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x * (jnp.argsort(jnp.argsort(x, axis=0), axis=0) > 1)


class InItself(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(jax.nn.softmax(nn.Dense(4)(x), axis=0))


class Recomputed(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        return nn.remat(nn.Dense)(3)(nn.Dropout(0.5, deterministic=not train)(nn.LayerNorm()(nn.Dense(4)(x))))


class NnxMixing(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.layer(x - x.mean(0))


class NnxNormed(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.layer = nnx.BatchNorm(5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.layer(self.norm(x))


def of(module, loss=models.softmax_cross_entropy, example=None):
    return models.bridge(module, jnp.zeros((1, 5)) if example is None else example, loss)


def check(model, x=None, y=None):
    batch = Batch(jnp.zeros((7, 5)) if x is None else x, jnp.zeros(7, jnp.int32) if y is None else y, jnp.ones(7))
    # while something is traced
    jax.eval_shape(jax.vmap(lambda key: (refuse_mixing(model)({}, batch), key)[1]), jax.random.split(KEY, 2))


@pytest.mark.parametrize("module, named", [
    (Between(Centred()), "The Centred middle mixes"), (Between(Ranked()), "The Ranked middle mixes"),
    (InItself(), "The InItself mixes"),
], ids=lambda value: "")
def test_the_layer_that_mixes_is_named_and_groupnorm_offered(module, named):
    with pytest.raises(FlJaxError, match=f"^{named}.*GroupNorm"):
        check(of(module))


def test_batchnorm_is_refused_when_the_oracle_is_made(normed_model):
    of_nnx = models.bridge_nnx(NnxNormed, jnp.zeros((1, 5)), models.softmax_cross_entropy)
    for model, named in ((normed_model, "BatchNorm_0"), (of_nnx, "norm")):
        for make in (gradients.private, gradients.private_reference):
            with pytest.raises(FlJaxError, match=f"BatchNorm {named} mixes the records of a batch.*GroupNorm"):
                make(model, 1.0, 1.0)


def test_a_model_that_cannot_be_looked_into_is_refused_as_a_whole():
    with pytest.raises(FlJaxError, match="NnxMixing.*could not be told"):
        check(models.bridge_nnx(NnxMixing, jnp.zeros((1, 5)), models.softmax_cross_entropy))


def test_losses_of_the_whole_batch_are_refused():
    cox = models.bridge(models.LinearCox(), jnp.zeros((1, 5)), models.cox_partial_likelihood)
    with pytest.raises(FlJaxError, match="loss of LinearCox is of the whole batch"):
        gradients.private(cox, 1.0, 1.0)
    per_record = models.softmax_cross_entropy.record
    hidden = Loss(lambda outputs, y, mask: jnp.log(jnp.maximum(masked_mean(per_record(outputs, y), mask), 1e-6)), per_record)
    with pytest.raises(FlJaxError, match="LogisticRegression, in a layer that could not be told or in its loss, mixes"):
        check(of(models.LogisticRegression(3), hidden))


@pytest.mark.parametrize("module, example, x", [
    (Between(nn.GroupNorm(2)), None, None), (Recomputed(), None, None), (models.TwoNN(3, hidden=4), None, None),
    (models.FedAvgCNN(3), jnp.zeros((1, 4, 4, 1)), jnp.zeros((7, 4, 4, 1))),
    (models.DPSGDCNN(3), jnp.zeros((1, 18, 18, 1)), jnp.zeros((7, 18, 18, 1))),
    (models.PflCifarCNN(3), jnp.zeros((1, 6, 6, 3)), jnp.zeros((7, 6, 6, 3))),
], ids=lambda value: type(value).__name__)
def test_what_does_not_mix_passes(module, example, x):
    check(of(module, example=example), x)


def test_words_pixels_and_regression_pass():
    class Words(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.Embed(9, 4)(x).mean(1))

    check(of(Words(), example=jnp.zeros((1, 5), jnp.int32)), jnp.zeros((7, 5), jnp.int32))
    module, example = models.LogisticRegression(3), jnp.zeros((1, 5), jnp.uint8)
    pixels = models.bridge(module, example, models.softmax_cross_entropy, preprocess=models.images_uint8)
    check(pixels, jnp.zeros((7, 5), jnp.uint8))
    check(of(models.LinearCox(), models.squared_error), y=jnp.zeros(7))


def test_a_loss_is_checked_once_for_each_shape_whoever_asks_and_another_loss_anew(monkeypatch):
    calls = []
    monkeypatch.setattr(mixing, "_mixing_layer", lambda *_: calls.append(1))
    model, other = of(models.LogisticRegression(3)), of(models.LogisticRegression(3))
    for one in model, model, model._replace(name="the same loss"):
        check(one)
    assert len(calls) == 1
    check(model, jnp.zeros((7, 6)))
    check(other)
    check(model._replace(loss=lambda *a: other.loss(*a)))
    assert len(calls) == 4
    monkeypatch.setattr(mixing, "_mixing_layer", lambda *_: "The layer")
    for _ in range(2):  # what was refused is not remembered as sound
        with pytest.raises(FlJaxError, match="The layer mixes"):
            check(model, jnp.zeros((7, 8)))


def test_statistics_are_refused_whatever_measures_them(normed_model):
    batch = Batch(jnp.zeros((7, 5)), jnp.zeros(7, jnp.int32), jnp.ones(7))
    with pytest.raises(FlJaxError, match="statistics of its records"):
        refuse_mixing(of(models.LogisticRegression(3)))({"norm": {"mean": jnp.zeros(3)}}, batch)


def test_survival_data_of_a_loss_by_record_pass():
    by_record = models.per_record(lambda outputs, y: (outputs[:, 0] - y.time) ** 2 * (1 + y.event))
    check(of(models.LinearCox(), by_record), y=Survival(jnp.ones(7), jnp.ones(7)))
