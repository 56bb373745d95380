"""Records of unseen sites by which they adapt: apart from the tested ones, whole groups, and zero copies on the device."""

import numpy as np
import pytest

from fl_jax import data
from fl_jax.errors import FlJaxError


def dataset(seed: int = 0):
    rng = np.random.default_rng(seed)
    site = np.repeat([0, 1, 2, 3], [20, 20, 12, 9])
    return data.from_arrays(np.arange(61.0)[:, None], rng.integers(0, 2, 61), site, seed=seed, unseen=["2", "3"])


def test_support_and_test_records_divide_those_of_each_unseen_site():
    before, after = dataset(), data.with_support(dataset(), 4, 1)
    splits = after.device()
    for i, size in enumerate((12, 9)):
        support, tested = (
            {float(sites.x[k, 0]) for k in range(int(sites.offset[i]), int(sites.offset[i] + sites.size[i]))}
            for sites in (splits.support, splits.unseen))
        assert len(support) == 4 and len(tested) == size - 4 and not support & tested
        assert support | tested == set(before.unseen.x[before.unseen.offsets[i] : before.unseen.offsets[i + 1], 0])
    assert splits.support.x is splits.unseen.x
    assert any("support" in note for note in after.notes)


def test_the_seed_draws_it_and_labels_stay_with_their_records():
    first, again, other = (data.with_support(dataset(), 4, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.unseen.x, again.unseen.x)
    assert (first.unseen.x != other.unseen.x).any()
    before = dict(zip(dataset().unseen.x[:, 0], dataset().unseen.y, strict=True))
    assert all(before[x] == y for x, y in zip(first.unseen.x[:, 0], first.unseen.y, strict=True))


def test_support_is_of_whole_groups():
    group = np.repeat(np.arange(7), 3)
    found = data.with_support(dataset(), 7, 0, group=group)
    assert found.support == (6, 6)
    of_record = dict(zip(dataset().unseen.x[:, 0], group, strict=True))
    for i in range(2):
        rows = found.unseen.x[found.unseen.offsets[i] : found.unseen.offsets[i + 1], 0]
        groups = [of_record[x] for x in rows]
        assert not set(groups[:6]) & set(groups[6:])


def test_draws_of_a_federation_stack_with_their_support():
    splits = data.stack([data.with_support(dataset(seed), 3, seed) for seed in (0, 1)])
    assert splits.support.size.tolist() == [[3, 3], [3, 3]] and splits.unseen.size.tolist() == [[9, 6], [9, 6]]
    assert data.stack([dataset()]).support is None
    with pytest.raises(FlJaxError, match="all have support"):
        data.stack([dataset(), data.with_support(dataset(), 3, 0)])


@pytest.mark.parametrize("num_records, sentence", [(-1, "0 or more"), (9, "leave none to test"), (30, "leave none to test")])
def test_numbers_that_do_not_fit_are_refused(num_records, sentence):
    with pytest.raises(FlJaxError, match=sentence):
        data.with_support(dataset(), num_records, 0)


def test_sites_are_held_out_before_support_is_drawn():
    with pytest.raises(FlJaxError, match="first"):
        data.hold_out(data.with_support(dataset(), 3, 0), ["0"])
    assert data.with_support(dataset(), 0, 0).device().support.size.tolist() == [0, 0]
