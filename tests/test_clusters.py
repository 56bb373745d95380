"""IFCA: one cluster is FedAvg, sites of two kinds find a model each, and who chose nothing moves nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SIZES, sites_of

from fl_jax import aggregators, algorithms, batches, sampling
from fl_jax.alone import site_at
from fl_jax.errors import FlJaxError
from fl_jax.site_loss import site_loss

KEY = jax.random.key(5)
N, SGD, WORK = len(SIZES), optax.sgd(0.1), batches.epochs(1, 4)
EVERYONE = sampling.everyone()


def close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def rounds(algorithm, variables, sites, count):
    state, round, metrics = algorithm.init(variables, sites.size.shape[0]), jax.jit(algorithm.round), None
    for r in range(count):
        state, metrics = round(jax.random.fold_in(KEY, r), state, EVERYONE.draw(KEY, r, sites), sites)
    return state, metrics


def test_a_sites_loss_is_the_mean_over_its_records_whatever_the_chunk(plain_model, sites):
    variables = plain_model.init(KEY)
    kernel, bias = (np.float64(variables.params["Dense_0"][name]) for name in ("kernel", "bias"))
    for id in (1, 2):
        rows = slice(int(sites.offset[id]), int(sites.offset[id] + sites.size[id]))
        logits = np.float64(sites.x)[rows] @ kernel + bias
        expected = np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), np.asarray(sites.y)[rows]])
        for chunk in (1, 5, 64):
            np.testing.assert_allclose(site_loss(plain_model, chunk)(variables, site_at(sites, jnp.int32(id))), expected, rtol=1e-5)
    empty = sites._replace(size=sites.size.at[3].set(0))
    assert float(site_loss(plain_model, 4)(variables, site_at(empty, jnp.int32(3)))) == 0


def test_a_loss_of_whole_batches_is_refused(plain_model):
    with pytest.raises(FlJaxError, match="loss of each record"):
        site_loss(plain_model._replace(evaluate=None), 4)


def test_one_cluster_is_fedavg(normed_model, sites):
    variables = normed_model.init(KEY)
    expected, _ = rounds(algorithms.fedavg(normed_model, SGD, WORK), variables, sites, 2)
    found, metrics = rounds(algorithms.ifca(normed_model, SGD, WORK, 1, KEY), variables, sites, 2)
    close(jax.tree.map(lambda leaf: leaf[0], found.shared.models), expected.shared)
    assert float(metrics.server["largest_cluster"]) == 1


@pytest.fixture(scope="module")
def divided(plain_model):
    """Eight sites, of which every second labels the other way round, after a few rounds of IFCA with three models."""
    sites = sites_of(np.full(8, 40))
    kind = np.repeat(np.arange(8) % 2, 40)
    sites = sites._replace(y=jnp.asarray(np.where(kind == 1, (np.asarray(sites.y) + 1) % 3, sites.y)))
    algorithm = algorithms.ifca(plain_model, optax.sgd(0.5), batches.epochs(1, 10), 3, jax.random.key(1))
    return sites, algorithm, *rounds(algorithm, plain_model.init(KEY), sites, 15)


def test_sites_of_two_kinds_choose_two_models(divided, plain_model):
    sites, algorithm, state, _ = divided
    chosen = np.asarray(state.clients.cluster)
    assert len(set(chosen[::2])) == 1 and len(set(chosen[1::2])) == 1 and chosen[0] != chosen[1]
    single, _ = rounds(algorithms.fedavg(plain_model, optax.sgd(0.5), batches.epochs(1, 10)), plain_model.init(KEY), sites, 15)

    def right(model_of_site):
        return np.mean([np.argmax(plain_model.predict(model_of_site(jnp.int32(i)), sites.x[i * 40 : i * 40 + 40]), 1)
                        == sites.y[i * 40 : i * 40 + 40] for i in range(8)])

    # labels are noisy: nobody predicts more than some two thirds of them
    assert right(lambda id: algorithm.model(state, id)) > right(lambda id: single.shared) + 0.2


def test_a_model_that_nobody_chose_stays_and_the_chosen_one_is_the_mean_of_its_members(divided, plain_model):
    sites, algorithm, state, _ = divided
    after, _ = jax.jit(algorithm.round)(KEY, state, EVERYONE.draw(KEY, 0, sites), sites)
    first, second = int(state.clients.cluster[0]), int(state.clients.cluster[1])
    unused = ({0, 1, 2} - {first, second}).pop()
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[unused], b[unused]), after.shared.models, state.shared.models)
    # the members alone, as FedAvg from their model
    alone = algorithms.fedavg(plain_model, optax.sgd(0.5), batches.epochs(1, 10))
    began = alone.init(jax.tree.map(lambda leaf: leaf[first], state.shared.models), 8)
    cohort = EVERYONE.draw(KEY, 0, sites)
    members = cohort._replace(weight=jnp.where(state.clients.cluster == first, cohort.weight, 0))
    expected, _ = jax.jit(alone.round)(KEY, began, members, sites)
    close(jax.tree.map(lambda leaf: leaf[first], after.shared.models), expected.shared)
    assert not np.any(after.shared.members)


def test_a_newcomer_chooses_by_its_own_records(divided):
    sites, algorithm, state, _ = divided
    for id in (0, 1):
        given = jax.jit(algorithm.welcome)(KEY, state._replace(clients=jax.tree.map(jnp.zeros_like, state.clients)), jnp.int32(id), sites)
        jax.tree.map(np.testing.assert_array_equal, given, algorithm.model(state, jnp.int32(id)))


def test_ifca_has_an_aggregator_of_its_own(plain_model):
    with pytest.raises(TypeError, match="leave out"):
        algorithms.ifca(plain_model, SGD, WORK, 2, KEY, aggregator=aggregators.mean())
