"""What FLamby's example of differential privacy does by Opacus: its noise, its denominators and its one generator.

flamby/dp_example and flamby/strategies at github.com/owkin/FLamby: every hospital calls PrivacyEngine().make_private_with_epsilon
with epochs=15, max_grad_norm=1.1 and a generator. Opacus takes batches for Poisson samples at rate 1 / (batches of a pass) and
looks for the noise with which int(15 / rate) steps have the target epsilon, by its RDP accountant (in later versions by
another, with less noise). Three things are otherwise in what is then run:

- a hospital makes 1,500 steps; 15 passes are 750 at the largest hospital and 120 at the smallest;
- the Poisson sampler that Opacus returns is not used: batches come from the shuffled loader, each record once a pass;
- all hospitals' generators have one seed and so draw the same normals: the noise in two messages is proportional, and does not
  average out. Whoever sees two messages can take it away.

A clipped and noised sum is divided by int(records * rate), which is 3 at three hospitals and 4 at one.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from fl_jax import aggregators, batches, clients, gradients
from fl_jax.core import federate
from fl_jax.privacy import Accountant, Cost, Unit, open_ledger
from fl_jax.types import (
    Array,
    Batch,
    Batches,
    Client,
    FederatedAlgorithm,
    Gradient,
    Key,
    Metrics,
    Model,
    PyTree,
    Site,
    not_private,
)

CLIP = 1.1
ORDERS = np.array([1 + x / 10 for x in range(1, 100)] + list(range(12, 64)))
TOLERANCE = 0.01
_REACH, _POINTS = 12, 16  # of an integral: standard deviations beyond the outermost means, and points in one


def sample_rate(num_records: int, batch_size: int) -> float:
    """The rate of the Poisson samples that Opacus takes a loader's batches for: 1 / (batches of a pass)."""
    return 1 / -(-num_records // batch_size)


def renyi(noise: float, rate: float) -> npt.NDArray[np.float64]:
    """The Renyi divergences of one step at ORDERS, float64[151]: a Gaussian of so much noise, in clips, on a Poisson sample.

    log A / (order - 1) of Mironov et al. 2019 (arXiv 1908.10530), section 3.3, with A by the trapezoidal rule, where Opacus has
    series.
    """
    x = np.arange(-_REACH * noise, ORDERS[-1] + _REACH * noise, noise / _POINTS)
    ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * x - 1) / (2 * noise**2))
    exponent = ORDERS[:, None] * ratio - x**2 / (2 * noise**2)
    most = exponent.max(axis=1)
    total = np.exp(exponent - most[:, None]).sum(axis=1) / (_POINTS * math.sqrt(2 * math.pi))
    return np.asarray((most + np.log(total)) / (ORDERS - 1))


def epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """Epsilon as Opacus' RDP accountant has it (Balle et al. 2020, arXiv 1905.09982, Theorem 21)."""
    conversion = -(math.log(delta) + np.log(ORDERS)) / (ORDERS - 1) + np.log((ORDERS - 1) / ORDERS)
    return float(np.min(steps * renyi(noise, rate) + conversion))


@functools.cache
def noise_multiplier(target: float, delta: float, num_records: int, batch_size: int, epochs: int) -> float:
    """The noise, in clips, that Opacus finds for a hospital: by bisection until epsilon is at most TOLERANCE below the target."""
    rate = sample_rate(num_records, batch_size)
    steps = int(epochs / rate)
    low, high, found = 0.0, 10.0, math.inf
    while found > target:
        high *= 2
        found = epsilon(high, rate, steps, delta)
    while target - found > TOLERANCE:
        middle = (low + high) / 2
        value = epsilon(middle, rate, steps, delta)
        if value < target:
            high, found = middle, value
        else:
            low = middle
    return high


class Spent(NamedTuple):
    """What so much noise costs a record in truth. rdp, pld: had the batches been Poisson samples, for adding or removing it.
    passes: with the batches that there are, of which no amplification is known, for replacing it."""

    rdp: float
    pld: float
    passes: float


def spent(noise: float, num_records: int, batch_size: int, steps: int, delta: float) -> Spent:
    """Epsilon of all steps at a hospital, whose noise is taken to be its own."""
    gaussian = dp_accounting.GaussianDpEvent(noise)
    sampled = dp_accounting.PoissonSampledDpEvent(sample_rate(num_records, batch_size), gaussian)

    def of(event: dp_accounting.DpEvent, count: int, accountant: Accountant) -> float:
        cost = Cost(event, Unit.RECORD)
        return open_ledger(cost).spend(cost, count).epsilon(delta, accountant)

    own = batches.updates(steps, batch_size).account(gaussian, num_records)
    return Spent(of(sampled, steps, Accountant.RDP), of(sampled, steps, Accountant.PLD), of(own, 1, Accountant.PLD))


def passes(num_steps: int, batch_size: int) -> Batches:
    """Batches of the shuffled loader, with Opacus' denominator: the whole part of the mean number of records of a batch."""

    def expected(order: batches.Order) -> Array:
        return (order.num_records // -(-order.num_records // batch_size)).astype(jnp.float32)

    return batches.updates(num_steps, batch_size)._replace(expected=expected)


class Draws(NamedTuple):
    """What a site keeps of a generator that all sites seed alike. drawn: int32, how often. inner: the oracle's own state."""

    drawn: Array
    inner: PyTree


def one_generator(model: Model, noise_multiplier: float | Array, key: Key) -> Gradient:
    """DP-SGD's gradient whose t-th normals are the same at every site, as from generators of one seed. key: that of all sites.

    Its event is not private: scaled messages of two sites, one minus the other, have no noise.
    """

    def oracle(drawn: Array) -> Gradient:
        return gradients.private(
            model, CLIP, noise_multiplier, noise=lambda _, tree: gradients.gaussian(jax.random.fold_in(key, drawn), tree))

    def init(params: PyTree) -> Draws:
        return Draws(jnp.int32(0), oracle(jnp.int32(0)).init(params))

    def compute(own: Key, state: Draws, params: PyTree, stats: PyTree, batch: Batch) -> tuple[PyTree, Draws, PyTree, Metrics]:
        gradient, inner, stats, metrics = oracle(state.drawn).compute(own, state.inner, params, stats, batch)
        return gradient, Draws(state.drawn + 1, inner), stats, metrics

    return Gradient(init, compute, oracle(jnp.int32(0)).metrics)


class Own(NamedTuple):
    """What a site carries from step to step. value: of the hyper-parameter that is its own. carry: its client's."""

    value: Array
    carry: PyTree


def by_site(build: Callable[[Array], Client], values: Array) -> Client:
    """A client whose hyper-parameter differs from site to site: values[i] at site i.

    build: (value) -> client; what it initialises, deploys and draws must not depend on the value. Its event is not private: what
    a site pays is no function of its number of records alone.
    """

    def begin(key: Key, shared: PyTree, kept: PyTree, site: Site) -> Own:
        value = values[site.id]
        return Own(value, build(value).begin(key, shared, kept, site))

    def step(key: Key, carry: Own, shared: PyTree, batch: Batch) -> Own:
        return Own(carry.value, build(carry.value).step(key, carry.carry, shared, batch))

    def end(carry: Own, shared: PyTree, kept: PyTree) -> tuple[PyTree, PyTree, Metrics]:
        return build(carry.value).end(carry.carry, shared, kept)

    return build(values[0])._replace(begin=begin, step=step, end=end, event=not_private)


def fedavg(
    model: Model, learning_rate: float | Array, work: Batches, noise_multipliers: Array, key: Key | None = None
) -> FederatedAlgorithm:
    """FedAvg with FLamby's private steps. noise_multipliers: of each site. key: of the one generator of all sites; None: each its
    own."""

    def client(noise: Array) -> Client:
        gradient = gradients.private(model, CLIP, noise) if key is None else one_generator(model, noise, key)
        return clients.local_training(model, gradient, optax.sgd(learning_rate), work)

    return federate(by_site(client, noise_multipliers), aggregators.mean(), optax.sgd(1.0))
