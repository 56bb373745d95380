"""Standardisation: training statistics only, pooled or per site."""

import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler

from fl_jax.data.arrays import from_arrays
from fl_jax.data.standardize import (
    as_measured,
    pooled_statistics,
    site_statistics,
    standardize_features,
)
from fl_jax.errors import FlJaxError


def draw(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal([1, 50, 0.7], [2, 10, 0], size=(80, 3))
    site = np.arange(80) % 3
    return from_arrays(x + site[:, None] * [3, 30, 0], rng.integers(2, size=80), site, unseen=["2"])


def test_pooled_statistics_are_those_of_a_reference_over_training_records():
    data = draw()
    scaled = standardize_features(data)
    reference = StandardScaler().fit(data.train.x)
    for split in ("train", "validation", "test", "unseen"):
        expected = reference.transform(getattr(data, split).x)
        np.testing.assert_allclose(getattr(scaled, split).x, expected, rtol=1e-5, atol=1e-5)
        assert getattr(scaled, split).x.dtype == np.float32


def test_site_statistics_are_each_site_s_own_and_pooled_for_unseen_ones():
    data = draw()
    scaled = standardize_features(data, site_statistics)
    for i in range(2):
        a, b = data.train.offsets[i : i + 2]
        c, d = data.test.offsets[i : i + 2]
        reference = StandardScaler().fit(data.train.x[a:b])
        np.testing.assert_allclose(scaled.test.x[c:d], reference.transform(data.test.x[c:d]), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(scaled.unseen.x, standardize_features(data, pooled_statistics).unseen.x)


def test_a_constant_column_is_centred_and_finite():
    for statistics in (pooled_statistics, site_statistics):
        assert np.abs(standardize_features(draw(), statistics).test.x[:, 2]).max() < 1e-6


def test_chosen_columns_only_and_as_measured():
    data = draw()
    scaled = standardize_features(data, columns=[1])
    np.testing.assert_array_equal(scaled.test.x[:, [0, 2]], data.test.x[:, [0, 2]].astype(np.float32))
    assert abs(scaled.train.x[:, 1].mean()) < 1e-5
    np.testing.assert_array_equal(standardize_features(data, as_measured).test.x, data.test.x.astype(np.float32))
    with pytest.raises(FlJaxError, match="not one table"):
        standardize_features(from_arrays(np.zeros((4, 2, 2)), [0, 1, 0, 1], [0, 0, 0, 0]))


def test_a_column_in_a_small_unit_is_not_taken_for_a_constant():
    x = np.random.default_rng(0).normal(2e-14, 1e-14, (40, 1))
    assert standardize_features(from_arrays(x, np.arange(40) % 2, np.zeros(40, int))).train.x.std() == pytest.approx(1, rel=1e-5)


def test_a_site_of_one_record_has_a_deviation_with_any_ddof():
    values, offsets = np.random.default_rng(0).normal(size=(5, 2)), np.array([0, 4, 5])
    mean, deviation = site_statistics(values, offsets, ddof=1)
    np.testing.assert_allclose(deviation, [values[:4].std(0, ddof=1), [0, 0], values.std(0, ddof=1)])
    np.testing.assert_allclose(mean, [values[:4].mean(0), values[4], values.mean(0)])
