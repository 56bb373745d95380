"""Data sets from NumPy arrays: every record once, groups kept together, mistakes named."""

import numpy as np
import pytest

from fl_jax.data.arrays import from_arrays
from fl_jax.errors import FlJaxError


def test_from_arrays_keeps_every_record_once_at_its_site():
    rng = np.random.default_rng(0)
    site = np.array(["s10", "s2", "s1"])[rng.integers(3, size=90)]
    ident = np.arange(90)
    data = from_arrays(ident[:, None].astype(np.float32), rng.integers(2, size=90), site, seed=1, unseen=["s1"])
    assert data.site_names == ("s2", "s10") and data.unseen_names == ("s1",) and data.num_classes == 2
    seen = []
    for table in (data.train, data.test, data.validation, data.unseen):
        names = data.unseen_names if table is data.unseen else data.site_names
        for i, name in enumerate(names):
            own = table.x[table.offsets[i] : table.offsets[i + 1], 0].astype(int)
            assert (site[own] == name).all()
            seen += own.tolist()
    assert sorted(seen) == ident.tolist()


def test_from_arrays_lets_no_group_of_an_unseen_site_into_training():
    rng = np.random.default_rng(0)
    site, group = rng.integers(4, size=200), rng.integers(60, size=200)
    x = np.stack([group, site], 1).astype(np.float32)
    data = from_arrays(x, rng.integers(2, size=200), site, group=group, unseen=["3"], test=0.3)
    splits = [set(table.x[:, 0].tolist()) for table in (data.train, data.validation, data.test)]
    assert not (splits[0] & splits[1] or splits[0] & splits[2] or splits[1] & splits[2])
    assert not (splits[0] | splits[1]) & set(data.unseen.x[:, 0].tolist())


def test_from_arrays_draws_by_seed_or_generator_and_takes_pytrees():
    x = {"image": np.zeros((40, 2, 2)), "age": np.arange(40.0)}
    y = np.arange(40) / 40
    ages = [
        from_arrays(x, y, np.arange(40) % 2, seed=seed).train.x["age"].tolist() for seed in (5, 5, np.random.default_rng(5), 6)
    ]
    assert ages[0] == ages[1] == ages[2] != ages[3]


def test_from_arrays_site_of_one_record_trains_and_has_no_test():
    data = from_arrays(np.zeros((11, 1)), np.arange(11) % 2, [0] * 10 + [1], test=0.3)
    assert data.train.sizes[1] == 1 and data.test.sizes[1] == data.validation.sizes[1] == 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"y": np.zeros(4, int)}, "10 sites of records, but y has the shape \\[4\\]"),
        ({"group": [1, 2]}, "group has the shape"),
        ({"unseen": ["9"]}, "'9' is no site"),
        ({"unseen": ["0", "1"]}, "leaves nothing to train on"),
        ({"label": np.zeros(4, int)}, "label has the shape"),
        ({"y": np.array(["a", "b"] * 5)}, "labels of the training records .* must be numbers"),
        ({"site": np.array([np.nan] + [1.0] * 9)}, "site of 1 records is missing"),
        ({"site_names": ["only"]}, "integers from 0 to 0"),
        ({"y": np.array([0] * 9 + [-1])}, "label -1"),
    ],
)
def test_from_arrays_names_mistakes(change, message):
    arguments = {"x": np.zeros((10, 1)), "y": np.arange(10) % 2, "site": np.arange(10) % 2}
    with pytest.raises(FlJaxError, match=message):
        from_arrays(**{**arguments, **change})


def test_truth_values_are_two_classes_and_sites_may_be_held_out_by_number_or_one_name():
    x, y, site = np.zeros((24, 1)), np.arange(24) % 2 > 0, np.array([1, 2, 12])[np.arange(24) % 3]
    data = from_arrays(x, y, site, unseen=[12])
    assert data.num_classes == 2 and data.train.y.dtype == np.int32 and data.unseen_names == ("12",)
    assert from_arrays(x, y, site, unseen="12").site_names == ("1", "2")  # and not the sites 1 and 2


def test_given_test_records_stay_and_validation_is_carved_from_the_others():
    rng = np.random.default_rng(2)
    site, test = rng.integers(3, size=120), rng.random(120) < 0.3
    x = np.arange(120.0)[:, None]
    data = from_arrays(x, rng.integers(2, size=120), site, test=test, validation=0.25, seed=4)
    assert set(data.test.x[:, 0]) == set(np.flatnonzero(test))
    assert set(data.train.x[:, 0]) | set(data.validation.x[:, 0]) == set(np.flatnonzero(~test))
    np.testing.assert_allclose(data.validation.sizes, 0.25 * np.bincount(site[~test]), atol=0.5)
    held_out = from_arrays(x, rng.integers(2, size=120), site, test=test, validation=0.0, unseen=["1"])
    assert set(held_out.unseen.x[:, 0]) == set(np.flatnonzero(site == 1)) and not held_out.validation.sizes.any()
    group = np.arange(120) // 2
    with pytest.raises(FlJaxError, match="has records for testing and others"):
        from_arrays(x, rng.integers(2, size=120), site, test=test, group=group)
    assert set(from_arrays(x, site, site, test=test[group], group=group).test.x[:, 0]) == set(np.flatnonzero(test[group]))
    with pytest.raises(FlJaxError, match="test has the shape"):
        from_arrays(x, site, site, test=test[:5])
