"""The data set type: what it refuses, and that device, stack, pooled and held-out forms hold the same records."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fl_jax.data.federated import FederatedDataset, hold_out, pooled_train, stack
from fl_jax.data.records import Records, no_records
from fl_jax.errors import FlJaxError


def records(sizes, seed=0):
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    x = rng.normal(size=(n, 2)).astype(np.float32)
    return Records(x, rng.integers(3, size=n).astype(np.int32), np.cumsum([0, *sizes]))


def dataset(**changes):
    fields = {
        "name": "d",
        "train": records([3, 1, 4]),
        "validation": records([1, 0, 2]),
        "test": records([2, 0, 1]),
        "unseen": records([2]),
        "site_names": ("a", "b", "c"),
        "unseen_names": ("u",),
        "num_classes": 3,
        "feature_names": ("age", "dose"),
        "missing": {"a": 2},
    }
    return FederatedDataset(**{**fields, **changes})


def tables(data):
    return {split: getattr(data, split) for split in ("train", "validation", "test", "unseen")}


def spoiled(split, field, row, value):
    table = getattr(dataset(), split)
    array = getattr(table, field).copy()
    array[row] = value
    return {split: table._replace(**{field: array})}


MISTAKES = [
    ({"train": records([3, 0, 5])}, "Site 'b' has none of the training records"),
    (spoiled("test", "x", (2, 1), np.nan), "Site 'c' has 1 values of feature 'dose' that are NaN or infinite in the test"),
    (spoiled("train", "x", (3, 0), np.inf), "Site 'b' has 1 values of feature 'age'"),
    (spoiled("unseen", "x", (slice(None), 0), np.nan), "Site 'u' has 2 values of feature 'age'"),
    (spoiled("train", "y", 7, 3), "Site 'c' has the label 3 in the training records of data set 'd', but .* from 0 to 2"),
    (spoiled("validation", "y", 0, -1), "Site 'a' has the label -1"),
    ({"train": records([3, 1, 4])._replace(offsets=np.array([0, 5, 3, 8]))}, "never decrease"),
    ({"train": records([3, 1, 4])._replace(offsets=np.array([0, 3, 4, 7]))}, "end at the number of records, 8"),
    ({"train": records([3, 1, 4])._replace(offsets=np.array([1, 3, 4, 8]))}, "start at 0"),
    ({"train": records([3, 5])}, "3 offsets for 3 sites"),
    ({"train": records([3, 1, 4])._replace(y=np.zeros(7, np.int32))}, "one length"),
    ({"train": records([3, 1, 4])._replace(y=[0] * 8)}, "NumPy arrays"),
    ({"test": records([2, 0, 1])._replace(x=np.zeros((3, 5), np.float32))}, "look different from the training records"),
    ({"train": records([3, 1, 4])._replace(x=np.full((8, 2), "z"))}, "must be numbers"),
    ({"feature_names": ("age",)}, "1 feature names"),
    ({"class_names": ("no", "yes")}, "3 classes but 2 class names"),
    ({"unseen_names": ("a",)}, "two sites named 'a'"),
    ({"missing": {"z": 1}}, "'z', which is none of its sites"),
    ({"site_names": ()}, "has no site"),
    ({"site_names": ("a", "", "c")}, "a site named ''"),
    ({"site_names": ("a", "b\nb", "c")}, "a name is one line"),
    ({"unseen_names": ("mean",)}, "a site named 'mean'"),
]


@pytest.mark.parametrize("change, message", MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes_are_named(change, message):
    with pytest.raises(FlJaxError, match=message):
        dataset(**change)


def test_labels_that_are_no_classes_must_be_finite():
    survival = {s: t._replace(y={"time": t.x[:, 0] ** 2, "event": t.y > 0}) for s, t in tables(dataset()).items()}
    assert dataset(num_classes=0, **survival).class_names == ()
    with pytest.raises(FlJaxError, match="one integer array"):
        dataset(**survival)
    survival["train"].y["time"][0] = np.nan
    with pytest.raises(FlJaxError, match="NaN or infinite"):
        dataset(num_classes=0, **survival)


def rows(sites, i):
    a, n = int(sites.offset[i]), int(sites.size[i])
    return np.asarray(sites.x)[a : a + n]


def test_device_holds_every_site_s_own_rows():
    data = dataset()
    splits = data.device()
    for host, device in zip((data.train, data.validation, data.test, data.unseen), splits[:4], strict=True):
        assert device.offset.dtype == device.size.dtype == jnp.int32 and isinstance(device.x, jax.Array)
        for i in range(len(host.sizes)):
            np.testing.assert_array_equal(rows(device, i), host.x[host.offsets[i] : host.offsets[i + 1]])


def test_empty_tables_can_be_gathered_from():
    empty = no_records(records([2]))
    splits = dataset(unseen=empty, unseen_names=()).device()
    assert splits.unseen.size.shape == (0,) and splits.unseen.x.shape == (1, 2)
    assert jnp.take(splits.unseen.x, jnp.zeros(3, jnp.int32), axis=0).shape == (3, 2)


def test_sites_without_records_are_sites():
    empty = no_records(records([2, 3]), 2)
    assert empty.sizes.tolist() == [0, 0] and empty.x.shape == (0, 2) and empty.x.dtype == records([2]).x.dtype


def test_device_does_not_alias_the_host():
    data = dataset()
    splits = data.device()
    before = np.array(splits.train.x)
    data.train.x[:] = 7
    np.testing.assert_array_equal(splits.train.x, before)


def test_stack_pads_at_the_end_and_each_draw_keeps_its_rows():
    draws = [dataset(), dataset(train=records([2, 6, 5], seed=1))]
    stacked = stack(draws)
    assert stacked.train.x.shape == (2, 13, 2) and stacked.train.offset.shape == (2, 3)
    for s, draw in enumerate(draws):
        own, alone = jax.tree.map(lambda leaf, s=s: leaf[s], stacked), draw.device()
        for split, single in zip(own[:4], alone[:4], strict=True):
            for i in range(len(single.size)):
                np.testing.assert_array_equal(rows(split, i), rows(single, i))
    assert not np.asarray(stacked.train.x[0, 8:]).any()


@pytest.mark.parametrize(
    "other, message",
    [
        (dataset(unseen=no_records(records([2])), unseen_names=()), "equal numbers of sites"),
        (
            dataset(
                feature_names=(),
                **{s: table._replace(x=table.x[:, :1]) for s, table in tables(dataset()).items()},
            ),
            "one shape and dtype",
        ),
    ],
)
def test_stack_refuses_what_does_not_fit(other, message):
    with pytest.raises(FlJaxError, match=message):
        stack([dataset(), other])
    with pytest.raises(FlJaxError, match="nothing to stack"):
        stack([])


def test_pooled_train_is_one_site_of_all_records_alone_stacked_and_inside_vmap():
    draws = [dataset(), dataset(train=records([2, 6, 5], seed=1))]
    stacked = stack(draws)
    results = [pooled_train(stacked), jax.jit(jax.vmap(pooled_train))(stacked)]
    for result in results:
        np.testing.assert_array_equal(result.train.offset, [[0], [0]])
        np.testing.assert_array_equal(result.train.size, [[8], [13]])
        assert result.train.size.dtype == jnp.int32
        for before, after in zip(jax.tree.leaves(stacked[1:]), jax.tree.leaves(result[1:]), strict=True):
            np.testing.assert_array_equal(before, after)
    alone = pooled_train(draws[1].device())
    np.testing.assert_array_equal(rows(alone.train, 0), draws[1].train.x)


def test_pooled_data_set_has_one_site_with_all_records():
    pooled = dataset().pooled()
    assert pooled.site_names == ("pooled",) and pooled.train.sizes.tolist() == [8] and pooled.test.sizes.tolist() == [3]
    assert pooled.unseen_names == ("u",) and pooled.missing["pooled"] == 2


def test_hold_out_moves_all_of_a_site_and_nothing_else():
    data = dataset()
    held = hold_out(data, ["a"])
    assert held.site_names == ("b", "c") and held.unseen_names == ("u", "a")
    assert held.unseen.sizes.tolist() == [2, 3 + 1 + 2]
    moved = np.concatenate([data.train.x[:3], data.validation.x[:1], data.test.x[:2]])
    np.testing.assert_array_equal(held.unseen.x[2:], moved)
    np.testing.assert_array_equal(held.train.x, data.train.x[3:])
    np.testing.assert_array_equal(held.test.y, data.test.y[2:])
    assert hold_out(replace(data, site_names=("a", "b", "ab")), "ab").site_names == ("a", "b")
    same = hold_out(data, [])
    np.testing.assert_array_equal(same.unseen.x, data.unseen.x)
    with pytest.raises(FlJaxError, match="'z' is no site .* 'a', 'b', 'c'"):
        hold_out(data, ["z"])
    with pytest.raises(FlJaxError, match="leaves nothing to train on"):
        hold_out(data, ["a", "b", "c"])


def test_notes_and_names_survive_replace():
    assert replace(dataset(), notes=("Real.",)).notes == ("Real.",)
