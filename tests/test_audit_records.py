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
    x = np.random.default_rng(5).normal(size=(records, features)).astype(np.float32)
    x[:, own:] = 0
    site = Sites(jnp.asarray(x), jnp.asarray(x.sum(1)), jnp.array([0], jnp.int32), jnp.array([records], jnp.int32))
    return audit.with_records(site, 0, np.eye(features, dtype=np.float32)[own:], np.full(canaries, LABEL, np.float32))


def trained(key, sites, model, canaries, work, *, clip=CLIP, noise=NOISE, form=gradients.private):
    """How far the parameters of a federated run went along each canary's feature, towards its label: all that the server sees."""
    algorithm = algorithms.fedavg(model, optax.sgd(1.0), work, gradient=form(model, clip, noise))
    features = sites.x.shape[1]
    axes = {"Dense_0": {"kernel": np.eye(features, dtype=np.float32)[features - canaries:, :, None]}}
    state = algorithm.init(Variables({"Dense_0": {"kernel": jnp.zeros((features, 1))}}, {}), 1)
    return -audit.watched(algorithm, sampling.everyone(), state, sites, ROUNDS, audit.moved(axes), key)


def scores(num_runs, mechanism, faults):
    """The scores of each fault of `faults` [k, ...], all in one program. mechanism: (fault) -> what `trained` is given."""
    sites = site_with(1, FEATURES)

    def run(key, present):
        own = audit.blank(sites, jnp.array([RECORDS]), present[None])
        return jax.vmap(lambda fault: trained(key, own, MODEL, 1, **mechanism(fault))[0])(faults)

    found = audit.repeated(run, jax.random.key(11), num_runs)
    return [audit.Scores(*sides) for sides in zip(found.inside.T, found.outside.T, strict=True)]


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
    claim = claimed(poisson(1.0))
    assert claim == pytest.approx(dp_accounting.get_epsilon_gaussian(NOISE / 2, DELTA), rel=1e-3)
    # as it should be; then noise left out, halved, and not clipped
    mechanisms = np.array([(CLIP, NOISE), (CLIP, 0), (CLIP, NOISE / 2), (1e6, NOISE * CLIP / 1e6)], np.float32)
    faultless, *faulty = scores(
        500, lambda fault: {"work": poisson(1.0), "clip": fault[0], "noise": fault[1], "form": form}, mechanisms)
    assert 0.5 * claim < audit.gaussian_bound(faultless, DELTA) < claim
    for found in faulty:
        assert audit.gaussian_bound(found, DELTA) > 1.1 * claim


def test_sampling_that_is_not_random_is_caught():
    """Claimed is a coin of .1 for each record in each step; a key that is used again and again draws the canary's batch every time."""
    honest = poisson(0.1)
    coins = jax.vmap(jax.random.key)(jnp.arange(1_000))
    unlucky = jax.jit(lambda: first_with_canary(honest, jax.vmap(lambda key: honest.order(key, jnp.int32(RECORDS + 1)))(coins)))()

    def draw(stuck, own, t):
        either = jax.tree.map(lambda a, b: jnp.where(stuck, a, b), unlucky, own)
        return honest.draw(either, jnp.where(stuck, 0, t))

    stuck, faultless = scores(
        2_000, lambda stuck: {"work": honest._replace(draw=functools.partial(draw, stuck))}, np.array([True, False]))
    claim = claimed(honest)
    assert claim < claimed(poisson(1.0)) / 3
    assert audit.counting_bound(stuck, DELTA) > 1.2 * claim
    assert audit.counting_bound(faultless, DELTA) < claim
    assert audit.area_under_curve(faultless) > 0.52  # it sees the canary, in the few steps that have it


def first_with_canary(work, orders):
    index, mask = jax.vmap(lambda own: work.draw(own, jnp.int32(0)))(orders)
    has_canary = ((index == RECORDS) & (mask > 0)).any(1)
    return jax.tree.map(lambda leaf: leaf[jnp.argmax(has_canary)], orders)


def test_the_control_stays_below_the_claim_in_nearly_all_repeats():
    (found,), claim = scores(4_000, lambda _: {"work": poisson(1.0)}, np.zeros(1)), claimed(poisson(1.0))
    parts = zip(np.split(found.inside, 40), np.split(found.outside, 40), strict=True)
    assert np.mean([audit.gaussian_bound(audit.Scores(*part), DELTA) <= claim for part in parts]) >= 0.95
    assert audit.gaussian_bound(found, DELTA) <= claim


def test_one_run_with_many_canaries_bounds_the_claim_from_below():
    """A thousand records with a feature each, there by a coin; noise that is left out is seen, noise that is halved is not."""
    features = FEATURES + CANARIES
    model = models.bridge(models.LinearCox(), jax.ShapeDtypeStruct((1, features), jnp.float32), models.squared_error)
    sites, rows = site_with(CANARIES, features), RECORDS + jnp.arange(CANARIES)
    work = batches.poisson(1.0, STEPS, RECORDS + CANARIES)

    def run(key, present):
        own = audit.blank(sites, rows, present)
        shown = jax.vmap(lambda noise: trained(key, own, model, CANARIES, work, noise=noise))
        return shown(jnp.array([NOISE, NOISE / 2, 1e-3])).T

    found = audit.one_run(run, jax.random.key(2), CANARIES)
    sides = zip(found.inside.T, found.outside.T, strict=True)
    faultless, halved, left_out = (audit.one_run_bound(audit.Scores(*side), DELTA) for side in sides)
    claim = claimed(poisson(1.0))
    assert 0.2 * claim < faultless < claim
    assert halved < 1.1 * claim
    assert left_out > faultless


def test_a_blank_record_is_none():
    sites = site_with(2, FEATURES)
    sites, left = jax.device_get((sites, jax.jit(audit.blank)(sites, np.array([RECORDS, RECORDS + 1]), np.array([True, False]))))
    assert left.size.tolist() == [RECORDS + 2] and (left.y[-2:] == [LABEL, 0]).all() and (left.x[-1] == 0).all()
    np.testing.assert_array_equal(left.x[:-1], sites.x[:-1])
    slope, *_ = jax.jit(gradients.plain(MODEL).compute)(
        jax.random.key(0), (), {"Dense_0": {"kernel": np.ones((FEATURES, 1), np.float32)}}, {},
        Batch(left.x[-1:], left.y[-1:], np.ones(1, np.float32)))
    assert not np.any(slope["Dense_0"]["kernel"])
