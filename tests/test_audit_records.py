"""Audits of DP-SGD as it runs, by records: every planted fault is caught, also a sampling that is not random, and a faultless run is not
accused."""

import functools

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fl_jax import algorithms, audit, batches, gradients, models, privacy, sampling
from fl_jax.types import Batch, Sites, Variables

DELTA, CLIP, NOISE, ROUNDS, STEPS = 1e-5, 0.5, 1.0, 2, 2
FEATURES, RECORDS, CANARIES, LABEL = 4, 8, 1_000, 100.0
MODEL = models.bridge(models.LinearCox(), jax.ShapeDtypeStruct((1, FEATURES), jnp.float32), models.squared_error)


def site_with(canaries, features, records=RECORDS):
    """One site of ordinary records and, at its end, of canaries. The last features are the canaries' own, and their label is so far away
    that their gradient is above the clip and has one sign whatever the noise did: the worst case of a record."""
    own = features - canaries
    x = jax.random.normal(jax.random.key(5), (records, features)).at[:, own:].set(0)
    site = Sites(x, x @ jnp.ones(features), jnp.array([0], jnp.int32), jnp.array([records], jnp.int32))
    return audit.with_records(site, 0, jnp.eye(features)[own:], jnp.full(canaries, LABEL))


def trained(key, sites, model, canaries, work, *, clip=CLIP, noise=NOISE, form=gradients.private):
    """How far the parameters of a federated run went along each canary's feature, towards its label: all that the server sees."""
    algorithm = algorithms.fedavg(model, optax.sgd(1.0), work, gradient=form(model, clip, noise))
    features = sites.x.shape[1]
    axes = {"Dense_0": {"kernel": jnp.eye(features)[features - canaries:, :, None]}}
    state = algorithm.init(Variables({"Dense_0": {"kernel": jnp.zeros((features, 1))}}, {}), 1)
    return -audit.watched(algorithm, sampling.everyone(), state, sites, ROUNDS, audit.moved(axes), key)


def scores(work, num_runs, **fault):
    sites = site_with(1, FEATURES)

    def run(key, present):
        return trained(key, audit.blank(sites, jnp.array([RECORDS]), present[None]), MODEL, 1, work, **fault)[0]

    return audit.repeated(run, jax.random.key(11), num_runs)


def poisson(rate):
    return batches.poisson(rate, STEPS, RECORDS + 1)


def claimed(work):
    """Epsilon of what the gradient and the sampling of records state of themselves."""
    algorithm = algorithms.fedavg(MODEL, optax.sgd(1.0), work, gradient=gradients.private(MODEL, CLIP, NOISE))
    cost, = privacy.record_costs(algorithm, {"site": RECORDS + 1})
    return privacy.open_ledger(cost).spend(cost, ROUNDS).epsilon(DELTA, privacy.Accountant.PLD)


@pytest.mark.parametrize("form", [gradients.private, gradients.private_reference])
def test_every_fault_of_dp_sgd_is_caught_and_the_faultless_is_not_accused(form):
    """Every record in each of four steps of multiplier 1: one Gaussian of 1/2."""
    measured = functools.partial(scores, poisson(1.0), 500, form=form)
    claim = claimed(poisson(1.0))
    assert claim == pytest.approx(dp_accounting.get_epsilon_gaussian(NOISE / 2, DELTA), rel=1e-3)
    assert 0.5 * claim < audit.gaussian_bound(measured(), DELTA) < claim
    for fault in ({"noise": 0.0}, {"noise": NOISE / 2}, {"clip": 1e6, "noise": NOISE * CLIP / 1e6}):  # left out, halved, not clipped
        assert audit.gaussian_bound(measured(**fault), DELTA) > 1.1 * claim


def test_sampling_that_is_not_random_is_caught():
    """Claimed is a coin of .1 for each record in each step; a key that is used again and again draws the canary's batch every time."""
    honest = poisson(0.1)
    coins = (honest.order(jax.random.key(i), jnp.int32(RECORDS + 1)) for i in range(1_000))
    unlucky = next(own for own in coins if has_canary(*honest.draw(own, jnp.int32(0))))
    stuck = honest._replace(draw=lambda own, t: honest.draw(unlucky, jnp.int32(0)))
    claim = claimed(honest)
    assert claim < claimed(poisson(1.0)) / 3
    assert audit.counting_bound(scores(stuck, 2_000), DELTA) > 1.2 * claim
    faultless = scores(honest, 2_000)
    assert audit.counting_bound(faultless, DELTA) < claim
    assert audit.area_under_curve(faultless) > 0.52  # it sees the canary, in the few steps that have it


def has_canary(index, mask):
    return bool(((index == RECORDS) & (mask > 0)).any())


def test_the_control_stays_below_the_claim_in_nearly_all_repeats():
    found, claim = scores(poisson(1.0), 4_000), claimed(poisson(1.0))
    parts = zip(np.split(found.inside, 40), np.split(found.outside, 40), strict=True)
    assert np.mean([audit.gaussian_bound(audit.Scores(*part), DELTA) <= claim for part in parts]) >= 0.95
    assert audit.gaussian_bound(found, DELTA) <= claim


def test_one_run_with_many_canaries_bounds_the_claim_from_below():
    """A thousand records with a feature each, there by a coin; noise that is left out is seen, noise that is halved is not."""
    features = FEATURES + CANARIES
    model = models.bridge(models.LinearCox(), jax.ShapeDtypeStruct((1, features), jnp.float32), models.squared_error)
    sites, rows = site_with(CANARIES, features), RECORDS + jnp.arange(CANARIES)
    work = batches.poisson(1.0, STEPS, RECORDS + CANARIES)

    def shown(noise):
        def run(key, present):
            return trained(key, audit.blank(sites, rows, present), model, CANARIES, work, noise=noise)

        return audit.one_run_bound(audit.one_run(run, jax.random.key(2), CANARIES), DELTA)

    claim = claimed(poisson(1.0))
    assert 0.2 * claim < shown(NOISE) < claim
    assert shown(NOISE / 2) < 1.1 * claim
    assert shown(1e-3) > shown(NOISE)


def test_a_blank_record_is_none():
    sites = site_with(2, FEATURES)
    left = audit.blank(sites, jnp.array([RECORDS, RECORDS + 1]), jnp.array([True, False]))
    assert left.size.tolist() == [RECORDS + 2] and (left.y[-2:] == jnp.array([LABEL, 0])).all() and (left.x[-1] == 0).all()
    np.testing.assert_array_equal(left.x[:-1], sites.x[:-1])
    slope, *_ = gradients.plain(MODEL).compute(jax.random.key(0), (), {"Dense_0": {"kernel": jnp.ones((FEATURES, 1))}}, {},
                                               Batch(left.x[-1:], left.y[-1:], jnp.ones(1)))
    assert (slope["Dense_0"]["kernel"] == 0).all()
