"""What sites deploy after one more look at their records: training on them, statistics of them, and newcomers who took no part."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from conftest import SIZES, sites_of

from fl_jax import (
    algorithms,
    batches,
    clients,
    core,
    data,
    deployment,
    evaluation,
    gradients,
    models,
    norms,
    sampling,
    training,
    uplink,
)
from fl_jax.metrics import CLASSIFICATION
from fl_jax.types import Sites, Variables

KEY = jax.random.key(3)
N = len(SIZES)
SGD, WORK, FULL = optax.sgd(0.1), batches.epochs(1, 4), batches.epochs(1, 16)
LOSS, ACCURACY = ({name: CLASSIFICATION[name]} for name in ("loss", "accuracy"))  # all would take seconds to compile
HEAD = algorithms.layers("Dense_1")


def close(a, b, tolerance=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a, b) -> bool:
    return any(not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def site_of(sites: Sites, id: int):
    return core.site_at(sites, jnp.int32(id))


def at_site(step):
    """(key, variables, sites, id) -> what a Deploy makes of them, jitted."""
    return jax.jit(lambda key, variables, sites, id: step(key, variables, core.site_at(sites, id)))


def mean_of_hidden(variables, sites: Sites, id: int):
    """Of the normed network's BatchNorm: the mean of its inputs over a site's records."""
    kernel, bias = (np.float64(variables.params["Dense_0"][name]) for name in ("kernel", "bias"))
    return (np.float64(sites.x)[rows_of(sites, id)] @ kernel + bias).mean(0)


def rows_of(sites: Sites, id: int) -> slice:
    return slice(int(sites.offset[id]), int(sites.offset[id] + sites.size[id]))


@pytest.fixture(scope="module")
def newcomers() -> Sites:
    """Three sites that no round has seen, the last without records."""
    return sites_of(np.array([8, 5, 0]), seed=9)


@pytest.fixture(scope="module")
def trained(normed_model, sites):
    """(build) -> the algorithm and its state after one round of everybody; each built once."""
    variables, everyone = jax.jit(normed_model.init)(KEY), sampling.everyone().draw(KEY, 0, sites)
    found = {}

    def run(build):
        if build not in found:
            algorithm = build(normed_model)
            found[build] = algorithm, jax.jit(algorithm.round)(KEY, algorithm.init(variables, N), everyone, sites)[0]
        return found[build]

    return run


def plainly(model):
    return algorithms.fedavg(model, SGD, WORK)


def personally(model):
    return algorithms.fedper(model, SGD, WORK, HEAD)


def from_the_shared_model(model):
    return algorithms.pfedme(model, WORK, strength=1.0, inner_steps=1, inner_rate=0.1, rate=0.1)


def locally(model):
    return algorithms.local_only(model, SGD, WORK)


def test_fine_tuning_is_gradient_descent_on_the_sites_own_records(plain_model, sites):
    variables = plain_model.init(KEY)
    tuned = jax.jit(lambda key: deployment.fine_tuned(plain_model, optax.sgd(0.3), batches.updates(2, 16))(key, variables, site_of(sites, 2)))(KEY)
    kernel, bias = (np.float64(variables.params["Dense_0"][name]) for name in ("kernel", "bias"))
    x, y = np.float64(sites.x)[rows_of(sites, 2)], np.eye(3)[np.asarray(sites.y)[rows_of(sites, 2)]]
    for _ in range(2):
        p = np.exp(x @ kernel + bias)
        slope = (p / p.sum(1, keepdims=True) - y) / len(y)
        kernel, bias = kernel - 0.3 * x.T @ slope, bias - 0.3 * slope.sum(0)
    np.testing.assert_allclose(tuned.params["Dense_0"]["kernel"], kernel, atol=1e-6)
    np.testing.assert_allclose(tuned.params["Dense_0"]["bias"], bias, atol=1e-6)


def test_what_is_fixed_is_not_tuned_and_a_site_without_records_tunes_nothing(normed_model, sites, newcomers):
    variables = jax.jit(normed_model.init)(KEY)
    head = at_site(deployment.fine_tuned(normed_model, SGD, FULL, fixed=lambda path, module: not HEAD(path, module)))
    after = head(KEY, variables, sites, 0)
    for layer in variables.params:
        assert differ(after.params[layer], variables.params[layer]) == (layer == "Dense_1")
    same(head(KEY, variables, newcomers, 2), variables)


class TwoNorms(nn.Module):
    """Two BatchNorm layers of different momentum."""

    @nn.compact
    def __call__(self, x, *, train: bool):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.relu(nn.Dense(5)(x)))
        return nn.Dense(3)(x)


def test_recalibration_measures_the_sites_records_whatever_the_momentum_and_the_labels(sites):
    model = models.bridge(TwoNorms(), sites.x[:1], models.softmax_cross_entropy)
    params, stats = model.init(KEY)
    variables = Variables(params, jax.tree.map(lambda leaf: leaf + 3.0, stats))
    recalibrate = jax.jit(lambda key, sites: deployment.recalibrated(model, FULL)(key, variables, site_of(sites, 2)))
    after = recalibrate(KEY, sites)
    x = np.float64(sites.x)[rows_of(sites, 2)]
    hidden = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) @ np.float64(params["Dense_0"]["kernel"]) + np.float64(params["Dense_0"]["bias"])
    hidden = np.maximum(hidden, 0)
    for layer, values in (("BatchNorm_0", x), ("BatchNorm_1", hidden)):
        np.testing.assert_allclose(after.stats[layer]["mean"], values.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(after.stats[layer]["var"], values.var(0), rtol=1e-4, atol=1e-5)
    same(after.params, params)
    same(recalibrate(KEY, sites._replace(y=(sites.y + 1) % 3)), after)


def test_recalibration_weighs_batches_by_their_records_and_needs_some(normed_model, sites, newcomers):
    variables = jax.jit(normed_model.init)(KEY)
    recalibrate = at_site(deployment.recalibrated(normed_model, batches.epochs(1, 4)))
    measured = recalibrate(KEY, variables, sites, 5).stats["BatchNorm_0"]["mean"]  # six records in batches of four and two
    np.testing.assert_allclose(measured, mean_of_hidden(variables, sites, 5), atol=1e-5)
    same(recalibrate(KEY, variables, newcomers, 2), variables)


def test_recalibrated_policy_deploys_the_averaged_model_with_statistics_of_the_site(normed_model, sites, trained):
    algorithm, state = trained(plainly)
    own = algorithms.fedavg(normed_model, SGD, WORK, norms=norms.RECALIBRATED)
    deployed = jax.jit(own.deploy)(KEY, state, jnp.int32(4), sites)
    same(deployed.params, algorithm.model(state, jnp.int32(4)).params)
    np.testing.assert_allclose(deployed.stats["BatchNorm_0"]["mean"], mean_of_hidden(state.shared, sites, 4), atol=1e-5)
    same(own.model(state, jnp.int32(4)), state.shared)


def test_averaging_parameters_only_is_another_model_than_it_is_taken_for(normed_model):
    """A code that exchanges trained parameters and calls the result FedAvg leaves each site with statistics of its own: the models that it
    measures are those of SiloBN, and a newcomer has the statistics of the initialisation."""
    moved = sites_of(np.array([40, 40, 40]))
    shift = np.repeat(np.array([-2.0, 0.0, 2.0]), 40)[:, None].astype(np.float32)
    moved = moved._replace(x=moved.x + shift)
    everyone, variables = sampling.everyone().draw(KEY, 0, moved), jax.jit(normed_model.init)(KEY)
    found = {}

    def loss(deployed):
        def model_of_site(id):
            return jax.tree.map(lambda leaf: leaf[id], deployed)

        return evaluation.evaluate(normed_model, model_of_site, moved, 40, LOSS).mean["loss"]

    measured = jax.jit(loss)
    for policy in (norms.AVERAGED, norms.LOCAL_STATISTICS, norms.RECALIBRATED):
        algorithm = algorithms.fedavg(normed_model, SGD, batches.epochs(3, 8), norms=policy)
        state, round, deploy = algorithm.init(variables, 3), jax.jit(algorithm.round), jax.jit(algorithm.deploy)
        for r in range(20):
            state, _ = round(jax.random.fold_in(KEY, r), state, everyone, moved)
        deployed = [deploy(KEY, state, jnp.int32(i), moved) for i in range(3)]
        together = jax.tree.map(lambda *leaves: np.stack(leaves), *deployed)
        found[policy.name] = algorithm, state, deployed, float(measured(together))
    averaged, silent, recalibrated = (found[p.name] for p in (norms.AVERAGED, norms.LOCAL_STATISTICS, norms.RECALIBRATED))
    # training never looks at running statistics, so that the parameters are the same, and still what is measured differs
    close(averaged[1].shared.params, silent[1].shared.params)
    assert abs(silent[3] - averaged[3]) > 0.02
    for i in range(3):  # the correct number of FedAvg, by hand: one model for all, with the mean of the statistics
        close(averaged[2][i].stats, jax.tree.map(lambda leaf: leaf.mean(0), silent[1].clients.leaves.stats), 1e-4)
        assert differ(silent[2][i].stats, silent[2][(i + 1) % 3].stats)
    # what the silent code means to measure is measured by the policy that says so
    assert abs(recalibrated[3] - silent[3]) < 0.02


def test_a_newcomer_is_given_the_shared_model_or_makes_a_round_of_its_own(trained, newcomers, normed_model):
    algorithm, state = trained(plainly)
    welcome = jax.jit(algorithm.welcome)
    for id in range(3):
        same(welcome(KEY, state, jnp.int32(id), newcomers), state.shared)
    algorithm, state = trained(personally)
    welcome = jax.jit(algorithm.welcome)
    welcomed = [welcome(KEY, state, jnp.int32(id), newcomers) for id in range(3)]
    mean = jax.tree.map(lambda leaf: leaf.mean(0), state.clients.leaves.params["Dense_1"])
    close(welcomed[2].params["Dense_1"], mean)  # no records: the mean of the heads
    for id in range(3):
        same(welcomed[id].params["Dense_0"], state.shared.params["Dense_0"])
        assert differ(welcomed[id].params["Dense_1"], welcomed[2].params["Dense_1"]) == (id < 2)
    client = clients.local_training(normed_model, gradients.plain(normed_model), SGD, WORK, is_local=HEAD)
    kept = jax.tree.map(lambda leaf: leaf.mean(0), state.clients)
    _, own, _ = jax.jit(lambda key: core.alone(client, key, state.shared, kept, site_of(newcomers, 1)))(jax.random.split(KEY, 3)[1])
    close(welcomed[1].params["Dense_1"], own.leaves.params["Dense_1"])


def test_a_newcomer_without_records_makes_no_round(trained, newcomers):
    algorithm, state = trained(from_the_shared_model)
    given = jax.jit(algorithm.welcome)(KEY, state, jnp.int32(2), newcomers)
    close(given.params, jax.tree.map(lambda leaf: leaf.mean(0), state.clients[0].params))
    assert differ(given.params, state.shared.params)  # with which a round of no steps would have ended


def test_where_nothing_is_shared_a_newcomer_begins_with_one_sites_model(trained, newcomers):
    algorithm, state = trained(locally)
    welcome = jax.jit(algorithm.welcome)
    for seed in range(4):
        given = welcome(jax.random.key(seed), state, jnp.int32(2), newcomers)
        owners = [i for i in range(N) if not differ(given, jax.tree.map(lambda leaf, i=i: leaf[i], state.clients.leaves))]
        assert len(owners) == 1


def test_an_uplink_keeps_what_its_client_says_of_deployment_and_newcomers(normed_model, sites, trained, newcomers):
    tune = deployment.fine_tuned(normed_model, SGD, FULL)
    inner = clients.local_training(normed_model, gradients.plain(normed_model), SGD, WORK)
    wrapped = clients.uplink(deployment.deploying(inner, tune), uplink.top_k(0.5))
    variables = jax.jit(normed_model.init)(KEY)
    state = wrapped.init(variables)

    def adapted(client, state):
        return jax.jit(lambda state: client.adapt(KEY, *state, site_of(sites, 0)))(state)

    same(adapted(wrapped, state), adapted(deployment.deploying(inner, tune), inner.init(variables)))
    kept = jax.tree.map(lambda leaf: np.stack([leaf + 1.0, leaf + 3.0]), state[1])
    residual = wrapped.newcomer(KEY, kept).uplink
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(residual))  # nothing is owed by a site that sent nothing


def test_deployment_changes_no_round(normed_model, sites, trained):
    _, expected = trained(plainly)
    tuned = algorithms.fedavg(normed_model, SGD, WORK, deploy=deployment.fine_tuned(normed_model, SGD, FULL))
    everyone = sampling.everyone().draw(KEY, 0, sites)
    same(jax.jit(tuned.round)(KEY, tuned.init(jax.jit(normed_model.init)(KEY), N), everyone, sites)[0], expected)


def test_evaluation_makes_the_model_of_a_site_once_for_all_splits(plain_model, sites):
    made = []

    def model_of_site(id):
        jax.debug.callback(lambda id: made.append(int(id)), id)
        return plain_model.init(KEY)

    evaluated = jax.jit(lambda: evaluation.predict_splits(model_of_site, plain_model.predict, (sites, sites), 2))()
    jax.block_until_ready(evaluated)
    jax.effects_barrier()
    assert sorted(made) == list(range(N))
    same(evaluated[0], evaluated[1])
    scored = jax.jit(lambda outputs: evaluation.score(plain_model, outputs, sites, ACCURACY))(evaluated[0])
    whole = jax.jit(lambda: evaluation.evaluate(plain_model, lambda id: plain_model.init(KEY), sites, 5, ACCURACY))()
    same(scored.site["accuracy"], whole.site["accuracy"])


def test_a_study_measures_newcomers_with_what_they_deploy(plain_model):
    """Beside plain FedAvg, which gives an unseen site the shared model, the same with tuning on its support."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4)).astype(np.float32)
    y = ((x @ rng.normal(size=(4, 3))).argmax(1) + np.repeat([0, 0, 1], 20)) % 3  # the third site labels in its own way
    dataset = data.with_support(data.from_arrays(x, y.astype(np.int32), np.repeat(["a", "b", "c"], 20), unseen=["c"]), 12, 0)
    tune = deployment.fine_tuned(plain_model, optax.sgd(0.5), batches.updates(60, 16))
    arms = [training.Arm(name, lambda _, tune=tune: algorithms.fedavg(plain_model, SGD, WORK, deploy=tune), lambda sites: sampling.everyone())
            for name, tune in (("FedAvg", None), ("FedAvg, tuned", tune))]
    study = training.Study(plain_model, data.stack([dataset]), ("a", "b"), ("c",), 2, 2, chunk=8, metrics=LOSS)
    fits = training.fit(study, arms, [0], training.seeds_of([0], stacked=True), progress=False)
    splits = dataset.device()

    @jax.jit
    def loss(variables):
        return evaluation.evaluate(plain_model, lambda id: variables, splits.unseen, 8, LOSS).site["loss"][0]

    for (name, fit), deployed in zip(fits.items(), (None, tune), strict=True):
        state = jax.tree.map(lambda leaf: leaf[0], fit.state)
        variables = state.shared if deployed is None else at_site(deployed)(KEY, state.shared, splits.support, 0)
        rows = fit.rows[(fit.rows["split"] == "unseen") & (fit.rows["metric"] == "loss")]
        np.testing.assert_allclose(rows["value"].to_numpy(), [loss(variables)], rtol=1e-5)
    unseen, seen = (pd.concat([fit.rows for fit in fits.values()]).query(f"split == '{split}' and metric == 'loss'") for split in ("unseen", "test"))
    of = {split: {arm: rows[rows["site"].isin(["c", "mean"])]["value"].item() for arm, rows in table.groupby("arm")}
          for split, table in (("unseen", unseen), ("test", seen))}
    assert of["unseen"]["FedAvg, tuned"] < of["unseen"]["FedAvg"] - 0.3  # its own way of labelling is learned from twelve records
    assert of["test"]["FedAvg, tuned"] != of["test"]["FedAvg"]


def test_a_site_that_joins_late_is_a_newcomer_until_then(normed_model, sites):
    joins = np.array([0, 0, 0, 0, 0, 2])
    late = sampling.with_presence(sampling.everyone(), joins)
    algorithm = personally(normed_model)
    state, round = algorithm.init(jax.jit(normed_model.init)(KEY), N), jax.jit(algorithm.round)
    start = jax.tree.map(lambda leaf: leaf[5], state.clients)
    for r in range(3):
        before = state
        state, metrics = round(jax.random.fold_in(KEY, r), state, late.draw(KEY, jnp.int32(r), sites), sites)
        assert int(metrics.server["participants"]) == (6 if r == 2 else 5)
        assert differ(jax.tree.map(lambda leaf: leaf[5], state.clients), start) == (r == 2)
    # before it joins it can be welcomed with the state of those who are there, and its own is not touched
    welcomed = jax.jit(algorithm.welcome)(KEY, before, jnp.int32(5), sites)
    assert differ(welcomed.params["Dense_1"], start.leaves.params["Dense_1"])
    same(welcomed.params["Dense_0"], before.shared.params["Dense_0"])
