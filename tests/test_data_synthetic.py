"""Synthetic(alpha, beta): the stated distribution."""

import numpy as np
import pytest
from scipy import stats

from fl_jax.data.synthetic import FEATURES, fedprox_iid, fedprox_synthetic, synthetic, synthetic_sizes
from fl_jax.errors import FlJaxError


def test_features_have_the_stated_mean_and_variance():
    sizes = np.full(400, 200)
    x, y, site = synthetic(np.random.default_rng(0), 1.0, 2.0, sizes)
    assert x.shape == (80_000, FEATURES) and x.dtype == np.float32 and y.dtype == np.int32 and (np.bincount(site) == sizes).all()
    grouped = x.reshape(400, 200, FEATURES)
    within = grouped.var(axis=1, ddof=1).mean(axis=0)
    np.testing.assert_allclose(within, np.arange(1, FEATURES + 1) ** -1.2, rtol=0.03)
    center = grouped.mean(axis=1)  # N(B_k, 1) around a B_k ~ N(0, 2^2) of the site
    own = center.mean(axis=1)
    assert stats.kstest(own / np.sqrt(4 + 1 / FEATURES), "norm").pvalue > 0.01
    around = (center - own[:, None]).var(axis=1, ddof=1)
    assert around.mean() == pytest.approx(1.0, abs=0.02)
    correlation = np.corrcoef(grouped[0].T)
    assert np.abs(correlation[np.triu_indices(FEATURES, 1)]).mean() < 0.1  # the covariance is diagonal


def test_alpha_and_beta_are_standard_deviations():
    """With W = u + unit noise and all features near v, the labels of a site do not depend on u; a site's B does grow with beta."""
    spread = {}
    for beta in (0.0, 3.0):
        x, _, _ = synthetic(np.random.default_rng(1), 1.0, beta, np.full(300, 5))
        spread[beta] = x.reshape(300, -1).mean(axis=1).std()
    assert spread[0.0] == pytest.approx(np.sqrt(1 / FEATURES), rel=0.2)
    assert spread[3.0] == pytest.approx(3.0, rel=0.2)


def test_labels_follow_a_linear_rule_of_the_site():
    """One site is linearly separable into its classes; iid sites share one rule, and others do not."""
    from sklearn.linear_model import LogisticRegression

    def accuracy_elsewhere(iid: bool) -> float:
        x, y, site = synthetic(np.random.default_rng(2), 1.0, 0.0, np.full(8, 1500), iid=iid)
        fitted = LogisticRegression(C=1e3, max_iter=3000).fit(x[site == 0], y[site == 0])
        assert fitted.score(x[site == 0], y[site == 0]) > 0.97
        return float(np.mean([fitted.score(x[site == k], y[site == k]) for k in range(1, 8)]))

    assert accuracy_elsewhere(True) > 0.7
    assert accuracy_elsewhere(False) < 0.4


def test_sizes_are_log_normal_and_capped():
    sizes = synthetic_sizes(np.random.default_rng(3), 4000)
    assert (
        sizes.min() >= 50
        and stats.kstest(np.log(sizes[sizes > 60] - 49.5), stats.truncnorm((np.log(10.5) - 4) / 2, np.inf, 4, 2).cdf).pvalue
        > 0.01
    )
    capped = synthetic_sizes(np.random.default_rng(3), 4000, largest=5000)
    np.testing.assert_array_equal(capped, np.minimum(sizes, 5000))
    assert (capped == 5000).any()


def test_the_seed_decides_and_mistakes_are_named():
    first, again = (synthetic(np.random.default_rng(5), 1, 1, np.array([3, 4])) for _ in range(2))
    np.testing.assert_array_equal(first.x, again.x)
    with pytest.raises(FlJaxError, match="standard deviations"):
        synthetic(np.random.default_rng(0), -1, 1, np.array([3]))
    with pytest.raises(FlJaxError, match="at least one record"):
        synthetic(np.random.default_rng(0), 1, 1, np.array([3, 0]))


def test_fedprox_federations_are_split_as_published():
    dataset = fedprox_synthetic(3, 0.5, 0.5, largest=2000)
    sizes = synthetic_sizes(np.random.default_rng(3), 30, largest=2000)
    np.testing.assert_array_equal(dataset.train.sizes, [int(0.9 * n) for n in sizes])
    np.testing.assert_array_equal(dataset.train.sizes + dataset.test.sizes, sizes)
    assert dataset.name == "Synthetic(0.5, 0.5)" and dataset.num_sites == 30 and dataset.num_classes == 10
    assert dataset.site_names[:2] == ("device 00", "device 01") and not dataset.validation.sizes.any()
    np.testing.assert_array_equal(fedprox_synthetic(3, 0.5, 0.5, largest=2000).test.x, dataset.test.x)
    assert not np.array_equal(fedprox_synthetic(4, 0.5, 0.5, num_sites=2).train.x[:9], dataset.train.x[:9])
    carved = fedprox_synthetic(3, 0.5, 0.5, largest=2000, validation=0.1)
    np.testing.assert_array_equal(carved.test.x, dataset.test.x)
    np.testing.assert_array_equal(carved.train.sizes + carved.validation.sizes, dataset.train.sizes)


def test_fedprox_iid_centers_features_at_zero_at_every_device():
    dataset = fedprox_iid(1, num_sites=40, largest=3000)
    assert dataset.name == "Synthetic-IID"
    deviation = np.arange(1, FEATURES + 1) ** -0.6
    z = [x.mean(0) / deviation * np.sqrt(len(x)) for x in np.split(dataset.train.x, dataset.train.offsets[1:-1])]
    assert stats.kstest(np.concatenate(z), "norm").pvalue > 0.01
