"""Intervals over seeds cover what they promise, equal scipy's, and say what they left out."""

import numpy as np
import pytest
import scipy.stats

from fl_jax.errors import FlJaxError
from fl_jax.statistics import Interval, bootstrap_interval, bounded, mean_interval, paired_difference


@pytest.mark.parametrize(("n", "confidence"), [(3, 0.95), (10, 0.95), (5, 0.8)])
def test_the_interval_covers_the_true_mean_as_often_as_it_says(n, confidence):
    runs, truth = 3000, 0.7
    samples = np.random.default_rng(n).normal(truth, 0.05, (runs, n))
    intervals = [mean_interval(sample, confidence) for sample in samples]
    covered = sum(i.low <= truth <= i.high for i in intervals)
    # Four standard deviations of a binomial: one false alarm in 16,000.
    assert abs(covered - runs * confidence) < 4 * np.sqrt(runs * confidence * (1 - confidence))


def test_clipping_to_the_bounds_loses_no_coverage():
    truth, bounds = 0.97, (0.0, 1.0)
    samples = np.random.default_rng(0).beta(97, 3, (500, 4))
    clipped = 0
    for sample in samples:
        free, cut = mean_interval(sample), mean_interval(sample, bounds=bounds)
        assert bounds[0] <= cut.low <= cut.mean <= cut.high <= bounds[1]
        assert (free.low <= truth <= free.high) == (cut.low <= truth <= cut.high)
        assert (cut.note == "clipped to [0, 1]") == (free.high > 1 or free.low < 0)
        assert cut.note or cut == free
        clipped += bool(cut.note)
    assert 0 < clipped < 500


def test_the_intervals_equal_scipys():
    a, b = np.random.default_rng(1).normal(size=(2, 8))
    expected = scipy.stats.ttest_1samp(a, 0).confidence_interval(0.9)
    np.testing.assert_allclose(mean_interval(a, 0.9)[:3], [a.mean(), expected.low, expected.high])
    expected = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
    np.testing.assert_allclose(paired_difference(a, b)[:3], [np.mean(a - b), expected.low, expected.high])


def test_pairing_removes_what_is_common_to_a_seed():
    rng = np.random.default_rng(2)
    seed_effect = rng.normal(scale=10, size=6)
    a, b = seed_effect + 1 + rng.normal(scale=0.01, size=6), seed_effect
    paired = paired_difference(a, b)
    assert paired.low < 1 < paired.high and paired.high - paired.low < 0.1
    assert mean_interval(a).high - mean_interval(a).low > 5
    backwards = paired_difference(b, a)
    np.testing.assert_allclose([backwards.mean, backwards.low, backwards.high], [-paired.mean, -paired.high, -paired.low])


def test_missing_seeds_are_left_out_and_counted():
    nan = np.nan
    found = mean_interval([0.1, nan, 0.3, 0.8, nan])
    assert found == mean_interval([0.1, 0.3, 0.8])._replace(missing=2) and (found.n, found.missing) == (3, 2)
    pairs = paired_difference([1.0, nan, 3.0, 7.0], [0.5, 1.0, nan, 5.0])
    assert pairs == mean_interval([0.5, 2.0])._replace(missing=2)
    found = bootstrap_interval([0.1, nan, 0.3, 0.8], seed=0)
    assert found == bootstrap_interval([0.1, 0.3, 0.8], seed=0)._replace(missing=1)


@pytest.mark.parametrize("interval", [mean_interval, lambda values: bootstrap_interval(values, seed=0)])
def test_where_there_is_no_interval_the_note_says_why(interval):
    one, none, infinite = interval([0.4, np.nan]), interval([np.nan]), interval([1.0, np.inf, -np.inf])
    assert one.mean == 0.4 and one.note == "no interval: one value" and (one.n, one.missing) == (1, 1)
    assert np.isnan(none.mean) and none.note == "no values" and (none.n, none.missing) == (0, 1)
    assert infinite.note == "no interval: infinite values" and infinite.n == 3
    assert np.isnan([(i.low, i.high) for i in (one, none, infinite)]).all()


def test_equal_values_have_an_interval_of_no_width():
    for found in (mean_interval([0.5] * 4), bootstrap_interval([0.5] * 4, seed=0, num_resamples=50)):
        assert found[:3] == (0.5, 0.5, 0.5) and found.note == ""


def test_the_bootstrap_is_repeatable_stays_in_range_and_is_nearly_normal_for_many_values():
    values = np.random.default_rng(3).exponential(size=400)
    found = bootstrap_interval(values, seed=1, num_resamples=2000)
    assert found == bootstrap_interval(values, seed=1, num_resamples=2000)
    assert found != bootstrap_interval(values, seed=2, num_resamples=2000)
    expected = mean_interval(values)
    width = expected.high - expected.low
    np.testing.assert_allclose([found.low, found.high], [expected.low, expected.high], atol=0.1 * width)
    few = bootstrap_interval([0.9, 1.0, 1.0], seed=0, confidence=0.999, num_resamples=500)
    assert 0.9 <= few.low <= few.mean <= few.high <= 1.0


def test_an_interval_within_its_bounds_stays_as_it_is():
    inside = Interval(0.5, 0.4, 0.6, 3, 0, 0.95)
    assert bounded(inside, (0, 1)) == inside and bounded(inside, None) == inside
    assert bounded(inside, (0.45, np.inf))[1:3] == (0.45, 0.6)
    empty = mean_interval([0.5], bounds=(0, 1))
    assert empty.note == "no interval: one value"


def test_misuse_is_said():
    with pytest.raises(FlJaxError, match="one value per seed"):
        mean_interval(np.zeros((2, 3)))
    with pytest.raises(FlJaxError, match="between 0 and 1"):
        mean_interval([1.0, 2.0], confidence=95)
    with pytest.raises(FlJaxError, match="leave the bounds"):
        mean_interval([0.5, 1.2], bounds=(0, 1))
    with pytest.raises(FlJaxError, match="not 2 and 3"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])
