"""Laws of partitions: every record at one site, no site empty, seeded, and each form's own heterogeneity."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_jax.data import partition
from fl_jax.errors import FlJaxError

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [120, 100, 80, 60, 40]))

PARTITIONERS = {
    "iid": lambda rng, y, n: partition.iid(rng, len(y), n),
    "shards": lambda rng, y, n: partition.shards(rng, y, n),
    "dirichlet_per_client": lambda rng, y, n: partition.dirichlet_per_client(rng, y, n, 0.3),
    "dirichlet_per_class": lambda rng, y, n: partition.dirichlet_per_class(rng, y, n, 0.5, min_size=2),
    "dirichlet_per_class, uncapped": lambda rng, y, n: partition.dirichlet_per_class(rng, y, n, 1.0, min_size=1, capped=False),
    "classes_per_client": lambda rng, y, n: partition.classes_per_client(rng, y, n, 2),
    "quantity_lognormal": lambda rng, y, n: partition.quantity_lognormal(rng, len(y), n, 1.5),
    "quantity_dirichlet": lambda rng, y, n: partition.quantity_dirichlet(rng, len(y), n, 1.0, min_size=1),
}


@pytest.mark.parametrize("name", PARTITIONERS)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), num_sites=st.integers(3, 12))
def test_every_record_has_one_site_and_no_site_is_empty(name, seed, num_sites):
    site = PARTITIONERS[name](np.random.default_rng(seed), LABELS, num_sites)
    assert site.shape == LABELS.shape and np.issubdtype(site.dtype, np.integer)
    assert sorted(set(site.tolist())) == list(range(num_sites))
    assert (site == PARTITIONERS[name](np.random.default_rng(seed), LABELS, num_sites)).all()
    assert (site != PARTITIONERS[name](np.random.default_rng(seed + 1), LABELS, num_sites)).any()


def test_case_mix_has_the_sizes_and_the_odds_that_were_asked_for():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1], [2600, 7400]))
    sizes, log_odds = np.array([5000, 3000, 2000]), np.array([0.0, -1.0, 1.0])
    site = partition.case_mix(np.random.default_rng(1), labels, sizes, log_odds)
    cases = np.array([labels[site == i].sum() for i in range(3)])
    assert np.bincount(site).tolist() == sizes.tolist() and cases.sum() == 7400
    found = np.log(cases / (sizes - cases))
    np.testing.assert_allclose(found - found[0], log_odds, atol=0.01)  # counts are whole: one record of 200 is .005
    assert (site != partition.case_mix(np.random.default_rng(2), labels, sizes, log_odds)).any()
    np.testing.assert_allclose(np.abs(partition.spread_log_odds(1.5, 4)), [0.5, 0.5, 1.5, 1.5])
    with pytest.raises(FlJaxError, match="a size and log-odds for each site"):
        partition.case_mix(np.random.default_rng(1), labels, sizes - 1, log_odds)


@pytest.mark.parametrize("name", PARTITIONERS)
def test_more_sites_than_records_is_refused(name):
    with pytest.raises(FlJaxError, match="cannot fill 9 sites"):
        PARTITIONERS[name](np.random.default_rng(0), np.arange(8) % 4, 9)


def table(site, num_sites):
    return np.stack([np.bincount(LABELS[site == i], minlength=5) for i in range(num_sites)])


def test_iid_sizes_are_equal():
    assert np.ptp(np.bincount(partition.iid(np.random.default_rng(0), 103, 10))) == 1


def test_shards_give_a_site_few_classes_and_equal_sizes():
    counts = table(partition.shards(np.random.default_rng(0), LABELS, 20), 20)
    assert (counts.sum(1) == 20).all()
    # a shard of 10 of the sorted labels touches at most two classes; with these class sizes exactly one
    assert ((counts > 0).sum(1) <= 2).all()


def test_per_client_dirichlet_has_equal_sizes_and_its_alpha():
    labels = np.random.default_rng(1).permutation(np.arange(20000) % 2)

    def mixes(alpha):
        site = partition.dirichlet_per_client(np.random.default_rng(2), labels, 400, alpha)
        assert (np.bincount(site) == 50).all()
        return np.array([labels[site == i].mean() for i in range(200)])  # early sites: no class is used up yet

    # the share of class 1 is Beta(alpha/2, alpha/2): variance 1 / (4 (alpha + 1)), plus binomial E[q(1-q)] / 50
    for alpha in (1.0, 10.0):
        variance = 1 / (4 * (alpha + 1))
        expected = variance + (0.25 - variance) / 50
        assert mixes(alpha).var() == pytest.approx(expected, rel=0.3)
    assert mixes(1e6).std() < 0.1


def test_per_class_dirichlet_deals_each_class_by_its_alpha():
    labels = np.zeros(2000, int)
    shares = []
    for seed in range(300):
        site = partition.dirichlet_per_class(np.random.default_rng(seed), labels, 4, 2.0, min_size=0, capped=False, max_draws=50)
        shares.append(np.bincount(site, minlength=4) / 2000)
    # Dirichlet(2, 2, 2, 2): mean 1/4, variance (1/4)(3/4) / 9
    assert np.mean(shares, 0) == pytest.approx(0.25, abs=0.03)
    assert np.var(shares, 0) == pytest.approx(0.1875 / 9, rel=0.3)


def test_per_class_dirichlet_keeps_the_minimum_and_the_cap_evens_sizes_out():
    draws = [
        [
            np.bincount(
                partition.dirichlet_per_class(np.random.default_rng(s), LABELS, 6, 0.5, min_size=8, capped=capped), minlength=6
            )
            for s in range(30)
        ]
        for capped in (True, False)
    ]
    assert np.min(draws) >= 8
    assert np.std(draws[0], axis=1).mean() < np.std(draws[1], axis=1).mean()


def test_impossible_minimum_is_reported_not_looped():
    with pytest.raises(FlJaxError, match="In 20 draws .* larger alpha"):
        partition.dirichlet_per_class(np.random.default_rng(0), LABELS, 20, 0.01, min_size=15, max_draws=20)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), num_sites=st.integers(1, 12), k=st.integers(1, 5))
def test_classes_per_client_holds_k_classes_in_equal_parts(seed, num_sites, k):
    if num_sites * k < 5:
        with pytest.raises(FlJaxError, match="without a site"):
            partition.classes_per_client(np.random.default_rng(seed), LABELS, num_sites, k)
        return
    counts = table(partition.classes_per_client(np.random.default_rng(seed), LABELS, num_sites, k), num_sites)
    assert ((counts > 0).sum(1) == k).all()
    for column in counts.T:
        assert np.ptp(column[column > 0]) <= 1


def test_lognormal_sizes_have_their_sigma_and_zero_is_equal():
    sizes = np.bincount(partition.quantity_lognormal(np.random.default_rng(0), 2_000_000, 2000, 0.8))
    assert np.log(sizes).std() == pytest.approx(0.8, rel=0.05)
    assert np.ptp(np.bincount(partition.quantity_lognormal(np.random.default_rng(0), 1000, 7, 0.0))) <= 1


def test_quantity_dirichlet_keeps_its_minimum():
    assert np.bincount(partition.quantity_dirichlet(np.random.default_rng(0), 400, 8, 0.5)).min() >= 10


@settings(deadline=None, max_examples=100)
@given(
    shares=st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30), total=st.integers(30, 1000), minimum=st.sampled_from([0, 1])
)
def test_apportion_sums_up_keeps_the_minimum_and_is_proportional(shares, total, minimum):
    whole = partition.apportion(np.array(shares), total, minimum=minimum)
    assert whole.sum() == total and whole.min() >= minimum
    if minimum == 0:
        assert np.abs(whole - total * np.array(shares) / np.sum(shares)).max() < 1 + 1e-6


def test_by_column_orders_sites_as_people_do():
    site, names = partition.by_column(["site 10", "site 2", "site 10", "a"])
    assert names == ("a", "site 2", "site 10") and site.tolist() == [2, 1, 2, 0]
    assert partition.by_column(np.array([10, -1, 2]))[1] == ("-1", "2", "10")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda r: partition.dirichlet_per_client(r, LABELS, 5, 0.0), "alpha must be a positive"),
        (lambda r: partition.dirichlet_per_class(r, LABELS, 5, float("nan")), "alpha must be a positive"),
        (lambda r: partition.quantity_lognormal(r, 100, 5, -1.0), "sigma must be"),
        (lambda r: partition.classes_per_client(r, LABELS, 5, 6), "choose from 1 to 5"),
        (lambda r: partition.shards(r, LABELS, 5, 0), "at least one shard"),
        (lambda r: partition.iid(r, 10, 0), "at least one site"),
        (lambda r: partition.by_column([]), "one value for each record"),
        (lambda r: partition.by_column(np.array([1.0, np.nan])), "site of 1 records is missing"),
        (lambda r: partition.by_column([None, "a", None]), "site of 2 records is missing"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(FlJaxError, match=message):
        call(np.random.default_rng(0))


def test_per_client_dirichlet_with_a_small_alpha_stays_at_few_classes_to_the_end():
    """Where all classes of a site's mix are used up, the rest comes from another sparse mix, not from every class that is left."""
    for seed in range(20):
        counts = table(partition.dirichlet_per_client(np.random.default_rng(seed), LABELS, 20, 1e-6), 20)
        # sites of 20 of at least 40 a class: a site finishes at most one class and begins another; only the last ones see scraps
        assert np.mean((counts > 0).sum(1) <= 2) >= 0.8


def test_capped_per_class_dirichlet_with_a_small_alpha_gives_each_class_to_one_site():
    for seed in range(20):
        site = partition.dirichlet_per_class(np.random.default_rng(seed), LABELS, 3, 1e-6, min_size=1)
        assert ((table(site, 3) > 0).sum(0) == 1).all()
