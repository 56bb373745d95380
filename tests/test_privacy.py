"""Accounting against reference values and closed forms; a ledger that is never too small, never mixes units and survives its JSON."""

import json
import math
import time

import dp_accounting as dp
import jax
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import binom, norm

from fl_jax import aggregators, algorithms, batches, privacy, sampling
from fl_jax.errors import FlJaxError
from fl_jax.privacy import Accountant, Cost, NeighboringRelation, PrivacyLedger, Unit, accounting
from fl_jax.types import FederatedAlgorithm

ADD, REPLACE = NeighboringRelation.ADD_OR_REMOVE_ONE, NeighboringRelation.REPLACE_ONE
RDP, PLD = Accountant.RDP, Accountant.PLD
DELTA = 1e-5
CLOCK = 0.002  # seconds an epsilon may cost a round


def ledger_of(event, count=1, relation=ADD, unit=Unit.CLIENT) -> PrivacyLedger:
    return PrivacyLedger(unit, relation).spend(Cost(event, unit), count)


def algorithm_of(plain_model, noise) -> FederatedAlgorithm:
    return algorithms.fedsgd(plain_model, 0.1, batches.epochs(1, 4), aggregator=aggregators.private_mean(1.0, noise, 5))


def gaussian_epsilon(deviation: float, delta: float) -> float:
    """Balle & Wang 2018, Theorem 8, for a sensitivity of 1."""

    def excess(epsilon):
        a, b = 0.5 / deviation, epsilon * deviation
        return norm.cdf(a - b) - np.exp(epsilon + norm.logcdf(-a - b)) - delta

    return brentq(excess, 0, 0.5 / deviation**2 + 10 / deviation, xtol=1e-13)


@pytest.mark.parametrize("rate, noise, rounds, by_rdp, by_pld", [
    (0.04, 1.5, 2250, 7.3293347, 6.76879),
    (150 / 60_000, 1.3, 6000, 0.7242234026, 0.640111),
])
def test_poisson_references(rate, noise, rounds, by_rdp, by_pld):
    ledger = ledger_of(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise)), rounds)
    assert ledger.epsilon(DELTA) == pytest.approx(by_rdp, rel=1e-7)
    assert ledger.epsilon(DELTA, PLD) == pytest.approx(by_pld, rel=1e-5)


def test_a_cohort_of_fixed_size_is_accounted_under_replace_one_with_noise_over_two_clips(plain_model):
    """The reference is for noise of one sensitivity, which under replace-one is noise of two clips."""
    cost = privacy.client_cost(algorithm_of(plain_model, 2.0), sampling.fixed_size(5, 100, sampling.equal))
    ledger = privacy.open_ledger(cost)
    assert ledger.relation is REPLACE and ledger.unit is Unit.CLIENT
    assert ledger.spend(cost, 100).epsilon(DELTA) == pytest.approx(6.4665847, rel=1e-7)
    assert cost.label == "Gaussian noise of 2 clips, on 5 of 100 drawn without replacement"


@pytest.mark.parametrize("relation, sensitivity", [(ADD, 1), (REPLACE, 2), (NeighboringRelation.REPLACE_SPECIAL, 1)])
def test_everyone_in_every_round_is_one_gaussian(plain_model, relation, sensitivity):
    noise, rounds = 4.0, 25
    cost = privacy.client_cost(algorithm_of(plain_model, noise), sampling.everyone())
    assert cost.label == "Gaussian noise of 4 clips, no amplification by sampling"
    ledger = privacy.open_ledger(cost, relation).spend(cost, rounds)
    exact = gaussian_epsilon(noise / sensitivity / math.sqrt(rounds), DELTA)
    assert ledger.epsilon(DELTA, PLD) == pytest.approx(exact, rel=1e-9)
    assert exact < ledger.epsilon(DELTA) < 1.1 * exact  # RDP's bound, which alone would not notice a factor
    # one step of Poisson sampling at rate 1 goes through the grids of dp_accounting, which must double by themselves
    by_grid = ledger_of(dp.PoissonSampledDpEvent(1.0, dp.GaussianDpEvent(noise)), rounds, relation).epsilon(DELTA, PLD)
    assert by_grid == pytest.approx(exact, rel=1e-4) and by_grid > exact - 1e-9


def test_rdp_of_replacing_one_is_that_of_half_the_noise_in_every_nesting():
    gaussian, half = dp.GaussianDpEvent(3.0), dp.GaussianDpEvent(1.5)
    nestings = [
        lambda event: event,
        lambda event: dp.SelfComposedDpEvent(event, 3),
        lambda event: dp.ComposedDpEvent([event, dp.SelfComposedDpEvent(event, 2), dp.NoOpDpEvent()]),
    ]
    for nest in nestings:
        assert ledger_of(nest(gaussian), 7, REPLACE).epsilon(DELTA) == ledger_of(nest(half), 7, ADD).epsilon(DELTA)
        assert ledger_of(nest(gaussian), 7, REPLACE).epsilon(DELTA, PLD) == pytest.approx(ledger_of(nest(half), 7).epsilon(DELTA, PLD))
    whole_sample = dp.SampledWithoutReplacementDpEvent(50, 50, dp.ComposedDpEvent([gaussian, gaussian]))
    assert ledger_of(whole_sample, 7, REPLACE).epsilon(DELTA) == pytest.approx(ledger_of(half, 14).epsilon(DELTA))


def test_composition_adds():
    first, second = Cost(dp.GaussianDpEvent(5.0), Unit.CLIENT), Cost(dp.PoissonSampledDpEvent(0.1, dp.GaussianDpEvent(2.0)), Unit.CLIENT)
    empty = PrivacyLedger(Unit.CLIENT, ADD)
    assert empty.epsilon(DELTA) == empty.epsilon(DELTA, PLD) == 0 and empty.spend(first, 0) == empty
    resumed = empty.spend(first, 30).spend(second, 4).spend(first, 30)
    assert resumed == empty.spend(first, 60).spend(second, 4) and [entry.rounds for entry in resumed.entries] == [60, 4]
    together = dp.ComposedDpEvent([dp.SelfComposedDpEvent(first.event, 60), dp.SelfComposedDpEvent(second.event, 4)])
    for accountant in (RDP, PLD):
        assert resumed.epsilon(DELTA, accountant) == pytest.approx(ledger_of(together).epsilon(DELTA, accountant), rel=1e-9)
    assert resumed.epsilon(DELTA) > empty.spend(first, 60).epsilon(DELTA) > empty.spend(first, 30).epsilon(DELTA)
    assert empty.entries == ()  # spending made new ledgers


def test_what_one_site_pays_does_not_add_to_another():
    at = {site: Cost(dp.GaussianDpEvent(noise), Unit.RECORD, site=site) for site, noise in (("A", 8.0), ("B", 6.0))}
    everywhere = Cost(dp.GaussianDpEvent(9.0), Unit.RECORD)
    empty = PrivacyLedger(Unit.RECORD, ADD)
    ledger = empty.spend(at["A"], 10).spend(at["B"], 10).spend(everywhere, 3)
    assert ledger.epsilon(DELTA) == empty.spend(at["B"], 10).spend(everywhere, 3).epsilon(DELTA)
    assert ledger.epsilon(DELTA) > empty.spend(at["A"], 10).spend(everywhere, 3).epsilon(DELTA)


@pytest.mark.parametrize("event, relation, accountants", [
    (dp.NonPrivateDpEvent(), ADD, (RDP, PLD)),
    (dp.UnsupportedDpEvent(), ADD, (RDP, PLD)),
    (dp.GaussianDpEvent(0.0), REPLACE, (RDP, PLD)),
    (dp.GaussianDpEvent(1e-200), ADD, (RDP, PLD)),
    (dp.ComposedDpEvent([dp.GaussianDpEvent(5.0), dp.NonPrivateDpEvent()]), ADD, (RDP, PLD)),
    (dp.PoissonSampledDpEvent(0.05, dp.GaussianDpEvent(5.0)), REPLACE, (RDP,)),
    (dp.SampledWithoutReplacementDpEvent(100, 5, dp.GaussianDpEvent(5.0)), ADD, (RDP, PLD)),
    (dp.SampledWithoutReplacementDpEvent(100, 5, dp.GaussianDpEvent(5.0)), REPLACE, (PLD,)),
    (dp.SampledWithoutReplacementDpEvent(100, 5, dp.NonPrivateDpEvent()), REPLACE, (RDP, PLD)),
    (dp.SampledWithReplacementDpEvent(100, 5, dp.GaussianDpEvent(5.0)), REPLACE, (RDP, PLD)),
    (dp.PoissonSampledDpEvent(0.05, dp.SampledWithoutReplacementDpEvent(9, 5, dp.GaussianDpEvent(5.0))), ADD, (RDP, PLD)),
    (dp.LaplaceDpEvent(5.0), REPLACE, (RDP, PLD)),  # dp_accounting's RDP gives a number, over a sensitivity that nobody stated
    (dp.ZCDpEvent(0.1), REPLACE, (RDP, PLD)),
    (dp.TruncatedSubsampledGaussianDpEvent(100, 0.05, 8, 5.0), ADD, (RDP,)),
    (dp.TruncatedSubsampledGaussianDpEvent(100, 0.05, 20, 0.0), ADD, (RDP, PLD)),
])
def test_what_cannot_be_accounted_for_is_infinite(event, relation, accountants):
    for accountant in accountants:
        ledger = ledger_of(event, 3, relation)
        assert ledger.epsilon(DELTA, accountant) == math.inf
        assert ledger.spend(Cost(dp.GaussianDpEvent(100.0), Unit.CLIENT)).epsilon(DELTA, accountant) == math.inf


def test_an_algorithm_that_is_not_private_costs_infinitely_much(plain_model):
    algorithm = algorithms.fedsgd(plain_model, 0.1, batches.epochs(1, 4))
    for sampler in (sampling.everyone(), sampling.fixed_size(2, 6)):
        cost = privacy.client_cost(algorithm, sampler)
        assert privacy.open_ledger(cost).spend(cost).epsilon(DELTA) == math.inf and "not private" in cost.label
        assert "amplification" not in cost.label


def test_poisson_sampling_under_replace_one_is_accounted_by_privacy_losses():
    """One round against the hockey-stick divergence of the two mixtures, integrated: noise of z clips, summands a clip apart from 0."""
    rate, noise = 0.05, 0.8
    x = np.linspace(-14, 14, 400_001)
    p, q = ((1 - rate) * norm.pdf(x, 0, noise) + rate * norm.pdf(x, shift, noise) for shift in (-1, 1))
    exact = brentq(lambda epsilon: np.sum(np.maximum(p - np.exp(epsilon) * q, 0)) * (x[1] - x[0]) - DELTA, 0.1, 20)
    event = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise))
    assert ledger_of(event, 1, REPLACE).epsilon(DELTA, PLD) == pytest.approx(exact, rel=1e-4)


def test_a_whole_number_as_noise_is_not_cheaper():
    """dp_accounting's RDP accountant stops composing at an int: it would forget all Gaussians of a sampled composition but one."""
    for number in (1, np.float32(1), np.int64(1), jax.numpy.float32(1)):
        pair = dp.ComposedDpEvent([dp.GaussianDpEvent(number), dp.GaussianDpEvent(number)])
        single = dp.GaussianDpEvent(1 / math.sqrt(2))
        assert ledger_of(dp.PoissonSampledDpEvent(0.02, pair), 50).epsilon(DELTA) == pytest.approx(
            ledger_of(dp.PoissonSampledDpEvent(0.02, single), 50).epsilon(DELTA))


def test_little_noise_gives_a_large_number_and_not_an_endless_computation():
    event = dp.PoissonSampledDpEvent(0.5, dp.GaussianDpEvent(0.1))
    by_rdp, by_pld = (ledger_of(event, 100).epsilon(DELTA, accountant) for accountant in (RDP, PLD))
    assert by_pld == pytest.approx(3542.4, rel=1e-3) and by_pld < by_rdp < 1.5 * by_pld


@pytest.mark.parametrize("rate", [1e-9, 0.3, 1.0])
@pytest.mark.parametrize("noise", [0.02, 2.0, 1e6])
def test_no_corner_of_the_numerics_is_too_small(rate, noise):
    """Between the best guess of an observer who sees one output and no sampling at all."""
    ledger = ledger_of(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise)))
    unsampled = gaussian_epsilon(noise, DELTA) if noise < 1e5 else 0
    for accountant in (RDP, PLD):
        epsilon = ledger.epsilon(DELTA, accountant)
        # removing: P[output > t | out] <= e^epsilon P[output > t | in] + delta, and the reverse, at the best of many thresholds t
        t = np.linspace(-1, 40, 4000) * noise + 1
        into = rate * norm.sf((t - 1) / noise) + (1 - rate) * norm.sf(t / noise)
        assert np.all(into <= np.exp(np.minimum(epsilon + norm.logsf(t / noise), 1)) + DELTA + 1e-12)
        assert epsilon <= 1.2 * unsampled + 1e-3


def test_a_divergence_that_rounds_below_zero_is_left_out():
    event = dp.PoissonSampledDpEvent(1e-12, dp.GaussianDpEvent(1e4))
    assert np.any(dp.rdp.RdpAccountant().compose(event).rdp < 0)
    assert np.all(accounting._rdp_of_one(event, ADD) >= 0)
    assert ledger_of(event, 1000).epsilon(DELTA) < 0.1


def test_a_round_costs_little_time():
    cost = Cost(dp.PoissonSampledDpEvent(0.01, dp.GaussianDpEvent(1.1)), Unit.CLIENT)
    ledger = PrivacyLedger(Unit.CLIENT, ADD).spend(cost)
    ledger.epsilon(DELTA)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        ledger = ledger.spend(cost)
        ledger.epsilon(DELTA)
        times.append(time.perf_counter() - start)
    assert min(times) < CLOCK and ledger.entries[0].rounds == 21


def test_units_are_never_mixed():
    ledger = PrivacyLedger(Unit.CLIENT, ADD)
    with pytest.raises(FlJaxError, match="cost to a record cannot be added to the ledger of a client"):
        ledger.spend(Cost(dp.GaussianDpEvent(1.0), Unit.RECORD))


EVENTS = [
    dp.GaussianDpEvent(1 / 3),
    dp.SampledWithoutReplacementDpEvent(100, 5, dp.GaussianDpEvent(0.1 + 0.2)),
    dp.PoissonSampledDpEvent(0.1, dp.ComposedDpEvent([dp.GaussianDpEvent(1.0), dp.SelfComposedDpEvent(dp.GaussianDpEvent(2.0), 3)])),
    dp.TruncatedSubsampledGaussianDpEvent(100, 0.05, 20, 5.0),
    dp.SingleEpochTreeAggregationDpEvent(1.5, [3, 4]),
    dp.RandomizedResponseDpEvent(0.5, 2),
    dp.NonPrivateDpEvent(),
    dp.NoOpDpEvent(),
    dp.ZCDpEvent(0.1),
]


def a_ledger() -> PrivacyLedger:
    ledger = PrivacyLedger(Unit.RECORD, REPLACE)
    for count, event in enumerate(EVENTS, 1):
        ledger = ledger.spend(Cost(event, Unit.RECORD, site="site é" if count % 2 else None), count)
    return ledger


def test_json_round_trip_is_exact():
    ledger = a_ledger()
    again = PrivacyLedger.from_json(ledger.to_json())
    assert again == ledger and again.to_json() == ledger.to_json() and again.unit is Unit.RECORD
    assert [type(entry.cost.event) for entry in again.entries] == [type(event) for event in EVENTS]
    reordered = dict(reversed(json.loads(ledger.to_json()).items()))
    assert PrivacyLedger.from_json(json.dumps(reordered)) == ledger  # a store may sort the keys or drop the indentation
    spent = ledger_of(EVENTS[1], 7, REPLACE)
    assert PrivacyLedger.from_json(spent.to_json()).epsilon(DELTA) == spent.epsilon(DELTA)


@pytest.mark.parametrize("damage", [
    lambda text: text[: len(text) // 2],
    lambda text: "",
    lambda text: "[]",
    lambda text: "{}",
    lambda text: text.replace('"rounds": 2', '"rounds": 1'),
    lambda text: text.replace("REPLACE_ONE", "ADD_OR_REMOVE_ONE"),
    lambda text: text.replace('"unit": "record"', '"unit": "client"'),
    lambda text: text.replace('"noise_multiplier": 5.0', '"noise_multiplier": 50.0'),
    lambda text: text.replace('"format": 1', '"format": 2'),
])
def test_a_damaged_ledger_is_refused(damage):
    text = a_ledger().to_json()
    assert damage(text) != text
    with pytest.raises(FlJaxError, match="damaged or was edited"):
        PrivacyLedger.from_json(damage(text))


@pytest.mark.parametrize("delta", [0, 1, -1e-5, 1.5, math.nan, math.inf])
def test_delta_lies_between_0_and_1(delta):
    with pytest.raises(FlJaxError, match="delta must lie between 0 and 1"):
        ledger_of(dp.GaussianDpEvent(1.0)).epsilon(delta)


@pytest.mark.parametrize("count, words", [(-1, "not be negative"), (1.5, "must be whole"), ("3", "must be whole")])
def test_rounds_are_counted(count, words):
    with pytest.raises(FlJaxError, match=words):
        ledger_of(dp.GaussianDpEvent(1.0), count)


@pytest.mark.parametrize("event, words", [
    (dp.GaussianDpEvent(-1.0), "noise_multiplier of a GaussianDpEvent must not be negative"),
    (dp.GaussianDpEvent(math.nan), "must be a finite number"),
    (dp.GaussianDpEvent(math.inf), "must be a finite number"),
    (dp.GaussianDpEvent(None), "must be a number"),
    (dp.PoissonSampledDpEvent(1.1, dp.GaussianDpEvent(1.0)), "at most 1"),
    (dp.SampledWithoutReplacementDpEvent(5, 6, dp.GaussianDpEvent(1.0)), "6 cannot be sampled out of 5"),
    (dp.SampledWithoutReplacementDpEvent(0, 0, dp.GaussianDpEvent(1.0)), "above 0"),
    (dp.SelfComposedDpEvent(dp.GaussianDpEvent(1.0), 0), "above 0"),
    (dp.SelfComposedDpEvent(dp.GaussianDpEvent(1.0), 2.5), "whole number"),
    ("Gaussian", "str is none"),
])
def test_an_event_that_makes_no_sense_is_refused(event, words):
    with pytest.raises(FlJaxError, match=words):
        Cost(event, Unit.CLIENT)


def test_a_traced_noise_is_refused_and_a_foreign_event_too():
    def epsilon_inside(noise):
        Cost(dp.GaussianDpEvent(noise), Unit.CLIENT)

    with pytest.raises(FlJaxError, match="known outside of jit"):
        jax.make_jaxpr(epsilon_inside)(1.0)

    class Cheap(dp.GaussianDpEvent):
        """Looks like an event that the accountants know."""

    for event in (Cheap(1.0), dp.SelfComposedDpEvent(Cheap(1.0), 2)):
        with pytest.raises(FlJaxError, match="Cheap is none"):
            Cost(event, Unit.CLIENT)


def truncated(n, rate, capacity, noise=1.1) -> dp.DpEvent:
    return dp.TruncatedSubsampledGaussianDpEvent(n, rate, capacity, noise)


def test_samples_that_are_seldom_cut_cost_what_samples_that_never_are_do_at_a_smaller_delta():
    n, rate, noise, steps = 60_000, 256 / 60_000, 1.1, 14_062
    poisson = ledger_of(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise)), steps)
    assert poisson.epsilon(DELTA) == pytest.approx(2.5965559, rel=1e-7) and poisson.epsilon(DELTA, PLD) == pytest.approx(2.38169, rel=1e-5)
    for capacity in (360, 377):
        cut = steps * binom.sf(capacity - 1, n, rate)
        assert 0 < cut < DELTA
        ledger = ledger_of(dp.SelfComposedDpEvent(truncated(n, rate, capacity), 2), steps // 2)
        for accountant in (RDP, PLD):
            if accountant is RDP or cut < 0.05 * DELTA:
                assert ledger.epsilon(DELTA, accountant) == pytest.approx(poisson.epsilon(DELTA - cut, accountant), rel=1e-9)
    work = batches.poisson(rate, 2, n)
    whole = ledger_of(work.account(dp.GaussianDpEvent(noise), n), steps // 2)
    assert whole.epsilon(DELTA) == pytest.approx(2.5965559, rel=1e-6) and whole.epsilon(DELTA, PLD) == pytest.approx(2.38169, rel=1e-3)
    assert ledger_of(truncated(n, rate, 330), steps).epsilon(DELTA) == math.inf  # cut too often for RDP to say anything


@pytest.mark.parametrize("n, rate, capacity, noise, epsilon", [(1, 0.9, 1, 1.5, 1.0), (2, 0.95, 2, 2.0, 1.0)])
def test_delta_of_samples_that_are_seldom_cut_bounds_the_mechanism_that_runs(n, rate, capacity, noise, epsilon):
    """Against the hockey-stick divergence of one step's sum, integrated. The other records add 1 each, so that where the sample is cut, the
    one in question pushes another out: it then moves the sum by 2, for which plain sampling has no provision."""
    grid = np.linspace(-12, n + 12, 6_001)
    plain_delta = pld_delta(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise)), epsilon)
    bound = binom.sf(capacity - 1, n, rate)

    def outputs(others):
        return norm.pdf(grid, others, noise)

    without = sum(binom.pmf(k, n, rate) * outputs(min(k, capacity)) for k in range(n + 1))
    with_it = (1 - rate) * without
    for k in range(n + 1):
        stays = min(1.0, capacity / (k + 1))  # of a uniformly random subset
        with_it += binom.pmf(k, n, rate) * rate * (stays * outputs(min(k, capacity - 1) - 1) + (1 - stays) * outputs(capacity))
    exact = [np.sum(np.maximum(p - np.exp(epsilon) * q, 0)) * (grid[1] - grid[0]) for p, q in ((with_it, without), (without, with_it))]
    assert plain_delta < max(exact) <= plain_delta + bound
    # and what the ledger says is what plain sampling says at a delta that is smaller by this bound
    event, plain = truncated(n, rate, capacity, noise), dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise))
    assert ledger_of(event).epsilon(bound + 0.02) == pytest.approx(ledger_of(plain).epsilon(0.02), rel=1e-9)


def pld_delta(event, epsilon):
    return dp.pld.PLDAccountant(ADD).compose(event).get_delta(epsilon)


def test_samples_that_are_often_cut_are_accounted_by_privacy_losses_for_both_numbers_of_records():
    noise = 20.0  # with little of it privacy losses spread, and take seconds
    event = truncated(50, 0.2, 11, noise)
    by_dp_accounting = [dp.pld.PLDAccountant(ADD).compose(truncated(n, 0.2, 11, noise), 4).get_epsilon(DELTA) for n in (50, 51)]
    found = ledger_of(event, 4).epsilon(DELTA, PLD)
    assert found == pytest.approx(max(by_dp_accounting), rel=1e-6) and ledger_of(event, 4).epsilon(DELTA) == math.inf
    assert found > ledger_of(dp.PoissonSampledDpEvent(0.2, dp.GaussianDpEvent(noise)), 4).epsilon(DELTA, PLD)
    # a sample that is hardly ever cut may be cut anyhow: this analysis does not hold for it, alone or beside others
    seldom, cut = truncated(50, 0.2, 31, noise), binom.sf(30, 50, 0.2)
    assert ledger_of(seldom, 4).epsilon(3 * cut, PLD) == math.inf
    plain = dp.PoissonSampledDpEvent(0.2, dp.GaussianDpEvent(noise))
    both = dp.pld.PLDAccountant(ADD).compose(truncated(51, 0.2, 11, noise), 4).compose(plain, 2)
    mixed = ledger_of(event, 4).spend(Cost(seldom, Unit.CLIENT), 2)
    assert mixed.epsilon(DELTA, PLD) == pytest.approx(both.get_epsilon(DELTA - 2 * cut), rel=1e-6)
    full = truncated(10, 1.0, 5, noise)  # with fewer records each is kept more often, so that n counts and not n + 1
    assert ledger_of(full, 4).epsilon(DELTA, PLD) == pytest.approx(
        dp.pld.PLDAccountant(ADD).compose(full, 4).get_epsilon(DELTA), rel=1e-6)


def test_one_distribution_of_privacy_losses_serves_all_numbers_of_rounds():
    first, second = dp.PoissonSampledDpEvent(0.02, dp.GaussianDpEvent(4.0)), dp.GaussianDpEvent(20.0)
    for rounds in (1, 40):
        whole = dp.pld.PLDAccountant(ADD).compose(first, rounds).compose(second, 3).get_epsilon(DELTA)
        ledger = ledger_of(first, rounds).spend(Cost(second, Unit.CLIENT), 3)
        assert ledger.epsilon(DELTA, PLD) == pytest.approx(whole, rel=1e-6)


def test_all_records_without_replacement_is_no_sampling_when_one_is_replaced():
    whole = dp.SampledWithoutReplacementDpEvent(7, 7, dp.GaussianDpEvent(6.0))
    assert ledger_of(whole, 5, REPLACE).epsilon(DELTA, PLD) == ledger_of(dp.GaussianDpEvent(6.0), 5, REPLACE).epsilon(DELTA, PLD)
    assert ledger_of(whole, 5, ADD).epsilon(DELTA, PLD) == math.inf
