"""What each BatchNorm policy keeps at a site, by the class of the module; and padding that is exact through a whole round."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import FEATURES, SIZES
from flax import nnx

from fl_jax import algorithms, batches, clients, gradients, models, norms, sampling
from fl_jax.types import Batch, Cohort, Variables

KEY = jax.random.key(4)
IDS = np.array([0, 2, 5])
POLICIES = [norms.AVERAGED, norms.LOCAL_STATISTICS, norms.LOCAL]


def divided(model, policy) -> tuple[set[str], set[str]]:
    """Paths of the leaves that are shared, and of those that stay at a site."""
    client = clients.local_training(model, gradients.plain(model), optax.sgd(0.1), batches.epochs(1, 4), is_local=policy.is_local)
    shared, kept = jax.eval_shape(client.init, jax.eval_shape(model.init, KEY))
    return paths(shared), paths(kept.leaves)


def paths(tree) -> set[str]:
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_every_norm_of_a_resnet_is_found_also_those_of_the_shortcuts(policy):
    model = models.bridge(models.ResNet18(3, models.batch_norm, width=4), jnp.zeros((1, 8, 8, 1)), models.softmax_cross_entropy)
    everything = paths(jax.eval_shape(model.init, KEY))
    # told apart without looking at modules: only a norm has a scale, a mean or a variance, and a bias beside them
    scaled = {path.removesuffix("/scale") for path in everything if path.endswith("/scale")}
    layers = {path for path in everything if path.rsplit("/", 1)[0].replace("stats/", "params/") in scaled}
    statistics = {path for path in everything if path.startswith("stats/")}
    assert len(scaled) == 20 and len(layers) == 80 and len(statistics) == 40  # 1 + 8 blocks of 2 + 3 shortcuts; 4 leaves each
    expected = {norms.AVERAGED: set(), norms.LOCAL_STATISTICS: statistics, norms.LOCAL: layers}[policy]
    assert divided(model, policy) == (everything - expected, expected)


class Misnamed(nn.Module):
    """A BatchNorm without "norm" in its name beside layers that only sound like one."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(5, name="bn")(x)
        x = nn.BatchNorm(use_running_average=not train, name="calibration")(x)
        return nn.Dense(3)(nn.LayerNorm(name="BatchNorm_0")(x))


def test_the_class_decides_and_not_the_name():
    model = models.bridge(Misnamed(), jnp.zeros((1, FEATURES)), models.softmax_cross_entropy)
    assert divided(model, norms.LOCAL)[1] == {f"params/calibration/{leaf}" for leaf in ("scale", "bias")} | {
        f"stats/calibration/{leaf}" for leaf in ("mean", "var")}
    assert divided(model, norms.LOCAL_STATISTICS)[1] == {"stats/calibration/mean", "stats/calibration/var"}


class OwnNorm(nn.BatchNorm):
    """A user's subclass."""


def test_a_subclass_is_a_batch_norm_and_a_group_norm_is_not():
    def network(norm):
        class Network(nn.Module):
            @nn.compact
            def __call__(self, x, train: bool):
                return norm(train)(nn.Dense(4)(x))

        return models.bridge(Network(), jnp.zeros((1, FEATURES)), models.softmax_cross_entropy)

    assert len(divided(network(lambda train: OwnNorm(use_running_average=not train)), norms.LOCAL)[1]) == 4
    for policy in POLICIES:
        assert not divided(network(lambda train: nn.GroupNorm(2)), policy)[1]


def test_a_batch_norm_of_nnx_is_found():
    class Network(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.first = nnx.Linear(FEATURES, 5, rngs=rngs)
            self.middle = nnx.BatchNorm(5, rngs=rngs)
            self.last = nnx.Linear(5, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(self.middle(self.first(x)))

    model = models.bridge_nnx(Network, jnp.zeros((1, FEATURES)), models.softmax_cross_entropy)
    shared, kept = divided(model, norms.LOCAL)
    assert len(kept) == 4 and all("middle" in path for path in kept) and len(shared) == 4
    assert divided(model, norms.LOCAL_STATISTICS)[1] == {path for path in kept if path.startswith("stats/")}


@pytest.fixture(scope="module")
def one_step(normed_model, sites):
    """A round of one full batch with padding, batch 16 > 12 records: what each policy's sites and server have afterwards."""
    variables = jax.jit(normed_model.init)(KEY)
    cohort = Cohort(jnp.array(IDS), jnp.ones(3), jnp.full(3, sampling.ALL_STEPS))

    def run(policy):
        algorithm = algorithms.fedavg(normed_model, optax.sgd(0.1), batches.epochs(1, 16), norms=policy)
        return jax.jit(algorithm.round)(KEY, algorithm.init(variables, len(SIZES)), cohort, sites)[0]

    return variables, {policy: run(policy) for policy in POLICIES}


def alone(model, variables, sites, id):
    """One step of gradient descent on exactly the records of a site, without padding or masks of zeros."""
    rows = slice(int(sites.offset[id]), int(sites.offset[id] + sites.size[id]))
    batch = Batch(sites.x[rows], sites.y[rows], jnp.ones(int(sites.size[id])))
    slope, stats = jax.jit(jax.grad(model.loss, argnums=1, has_aux=True))(KEY, *variables, batch)
    return Variables(jax.tree.map(lambda w, g: w - 0.1 * g, variables.params, slope), stats)


def close(a, b, tolerance=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def test_a_round_with_padding_equals_steps_on_the_records_alone(normed_model, sites, one_step):
    variables, after = one_step
    trained = jax.tree.map(lambda *leaves: np.stack(leaves), *(alone(normed_model, variables, sites, id) for id in IDS))
    mean = jax.tree.map(lambda leaf: leaf.mean(0), trained)
    kept = {policy: jax.tree.map(lambda leaf: leaf[IDS], state.clients) for policy, state in after.items()}
    close(after[norms.AVERAGED].shared, mean)
    close(after[norms.LOCAL_STATISTICS].shared.params, mean.params)
    close(kept[norms.LOCAL_STATISTICS].leaves.stats, trained.stats)
    for layer in ("Dense_0", "Dense_1"):
        close(after[norms.LOCAL].shared.params[layer], mean.params[layer])
    close(kept[norms.LOCAL].leaves.stats, trained.stats)
    close(kept[norms.LOCAL].leaves.params["BatchNorm_0"], trained.params["BatchNorm_0"])


def test_policies_have_names_of_their_own_which_algorithms_carry(normed_model, plain_model):
    policies = [*POLICIES, norms.RECALIBRATED]
    assert len({policy.name for policy in policies}) == 4
    work, head = batches.epochs(1, 4), algorithms.layers("Dense_1")
    for policy in policies:
        assert algorithms.fedavg(normed_model, optax.sgd(0.1), work, norms=policy).norms == policy.name
        assert policy.name in algorithms.fedper(normed_model, optax.sgd(0.1), work, head, norms=policy).norms
        assert algorithms.fedavg(plain_model, optax.sgd(0.1), work, norms=policy).norms == norms.NO_BATCH_NORM
    assert algorithms.fedbn(normed_model, optax.sgd(0.1), work).norms == norms.LOCAL.name
    assert algorithms.mr_mtl(normed_model, optax.sgd(0.1), work, 1.0).norms == "own model's local"


def test_a_weighted_cohort_averages_statistics_by_the_same_weights(normed_model, sites, one_step):
    variables, _ = one_step
    algorithm = algorithms.fedadam(normed_model, optax.sgd(0.1), batches.epochs(1, 16), server_learning_rate=0.5)
    cohort = Cohort(jnp.array([0, 4]), jnp.array([3.0, 1.0]), jnp.full(2, sampling.ALL_STEPS))
    state = jax.jit(algorithm.round)(KEY, algorithm.init(variables, len(SIZES)), cohort, sites)[0]
    first, second = (alone(normed_model, variables, sites, id).stats for id in (0, 4))
    close(state.shared.stats, jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, first, second))
