"""Laws of splitting: proportions, no group in two splits, every site trains."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_jax.data.split import TEST, TRAIN, VALIDATION, even_pattern, split_records
from fl_jax.errors import FlJaxError

fractions = st.tuples(st.floats(0, 0.45), st.floats(0, 0.5))


@settings(deadline=None, max_examples=100)
@given(n=st.integers(1, 300), share=fractions)
def test_pattern_has_rounded_counts_and_any_stretch_is_in_proportion(n, share):
    pattern = even_pattern(n, *share)
    counts = np.bincount(pattern, minlength=3)
    assert counts.sum() == n and counts[TRAIN] >= 1
    if n > 20:
        assert abs(counts[VALIDATION] - share[0] * n) <= 0.5 + 1e-6
        assert abs(counts[TEST] - share[1] * n) <= 0.5 + 1e-6
    for split in (TRAIN, VALIDATION, TEST):
        ahead = np.cumsum(pattern == split) - counts[split] * np.arange(1, n + 1) / n
        assert np.abs(np.append(ahead, 0)).max() <= 1.5  # so a stretch is off by at most 3


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), share=fractions, num_groups=st.integers(1, 60), num_sites=st.integers(1, 5))
def test_no_group_is_in_two_splits_even_across_sites(seed, share, num_groups, num_sites):
    rng = np.random.default_rng(seed)
    group, site, label = rng.integers(num_groups, size=120), rng.integers(num_sites, size=120), rng.integers(3, size=120)
    barred = rng.random(120) < 0.05
    split = split_records(rng, site, validation=share[0], test=share[1], label=label, group=group, test_only=barred)
    for g in np.unique(group):
        assert len(np.unique(split[group == g])) == 1
    assert (split[np.isin(group, group[barred])] == TEST).all()


def test_split_is_stratified_within_every_site():
    site = np.repeat([0, 1, 2], [200, 100, 50])
    label = np.random.default_rng(1).integers(2, size=350)
    split = split_records(np.random.default_rng(0), site, validation=0.1, test=0.4, label=label)
    for s in range(3):
        for k in range(2):
            here = split[(site == s) & (label == k)]
            for which, share in ((TRAIN, 0.5), (VALIDATION, 0.1), (TEST, 0.4)):
                assert abs((here == which).sum() - share * len(here)) <= 2


def test_every_record_is_equally_likely_to_be_tested():
    site, label = np.zeros(10, int), np.array([0] * 7 + [1] * 3)
    rng = np.random.default_rng(0)
    draws = np.stack([split_records(rng, site, validation=0.2, test=0.3, label=label) for _ in range(3000)])
    for k in (0, 1):  # exchangeable within a stratum: equal rates, up to sampling error
        rate = (draws[:, label == k] == TEST).mean(0)
        assert np.ptp(rate) < 6 * np.sqrt(0.25 / 3000)


@pytest.mark.parametrize("n", [3, 7])
def test_a_rare_label_is_tested_as_often_as_others_at_small_sites(n):
    site, label = np.repeat(np.arange(2000), n), np.tile([0] * (n - 1) + [1], 2000)
    split = split_records(np.random.default_rng(0), site, validation=0.2, test=0.2, label=label)
    for which in (VALIDATION, TEST):
        rates = [(split[label == k] == which).mean() for k in (0, 1)]
        assert rates == pytest.approx([1 / n, 1 / n], abs=5 * np.sqrt(0.25 / 2000))


def test_site_of_one_record_trains():
    assert split_records(np.random.default_rng(0), np.array([0]), validation=0.3, test=0.6).tolist() == [TRAIN]


def test_seed_decides_the_split():
    site = np.repeat([0, 1], 30)
    draws = [split_records(np.random.default_rng(seed), site, validation=0.2, test=0.2) for seed in (3, 3, 4)]
    assert (draws[0] == draws[1]).all() and (draws[0] != draws[2]).any()


@pytest.mark.parametrize("validation, test", [(0.5, 0.5), (-0.1, 0.2), (0.2, float("nan"))])
def test_fractions_that_leave_nothing_are_refused(validation, test):
    with pytest.raises(FlJaxError, match="leave nothing to train on"):
        split_records(np.random.default_rng(0), np.zeros(4, int), validation=validation, test=test)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"label": np.array([0, -1, 0, 1])}, "integers from 0"),
        ({"label": np.zeros(4)}, "integers from 0"),
        ({"group": np.array([1, np.nan, 2, np.nan])}, "group of 2 records is missing"),
        ({"group": np.array(["p", None, "q", "p"])}, "group of 1 records is missing"),
    ],
)
def test_what_cannot_be_split_by_is_named(change, message):
    with pytest.raises(FlJaxError, match=message):
        split_records(np.random.default_rng(0), np.zeros(4, int), validation=0.2, test=0.2, **change)


def test_labels_of_any_integer_type_stratify_alike():
    label = np.arange(40) % 3
    draws = [
        split_records(np.random.default_rng(0), np.zeros(40, int), validation=0.2, test=0.2, label=label.astype(kind))
        for kind in (np.int64, np.uint8, np.uint64)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    np.testing.assert_array_equal(draws[0], draws[2])
