"""LEAF's JSON files: what FedProx's code writes is read back, and mistakes are named by file and user."""

import json

import numpy as np
import pytest

from fl_jax.data.leaf import read_leaf
from fl_jax.errors import FlJaxError


def leaf(users):
    """The content of a file: user -> (x, y)."""
    return {
        "users": list(users),
        "num_samples": [len(y) for _, y in users.values()],
        "user_data": {user: {"x": np.asarray(x).tolist(), "y": np.asarray(y).tolist()} for user, (x, y) in users.items()},
    }


def drawn(rng, *sizes):
    return [(rng.normal(size=(n, 3)), rng.integers(4, size=n).astype(float)) for n in sizes]


@pytest.fixture
def folders(tmp_path):
    """Users f_2, f_10 and f_1 in two files of the training folder, f_10, f_1 and a new one in the test folder."""
    a, b, c, d, e, f = drawn(np.random.default_rng(0), 5, 9, 7, 2, 3, 4)
    for name, users in (
        ("train/part_0.json", {"f_2": a}),
        ("train/part_1.json", {"f_10": b, "f_1": c}),
        ("test/mytest.json", {"f_1": d, "f_10": e, "f_7": f}),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(leaf(users)))
    return tmp_path, (a, b, c, d, e, f)


def test_users_are_sites_and_those_without_training_records_are_unseen(folders):
    folder, (a, b, c, d, e, f) = folders
    dataset = read_leaf(folder / "train", folder / "test")
    assert dataset.site_names == ("f_1", "f_2", "f_10") and dataset.unseen_names == ("f_7",) and dataset.num_classes == 4
    for records, users in ((dataset.train, (c, a, b)), (dataset.test, (d, ([], []), e)), (dataset.unseen, (f,))):
        np.testing.assert_array_equal(records.sizes, [len(y) for _, y in users])
        np.testing.assert_array_equal(records.x, np.concatenate([np.reshape(x, (-1, 3)) for x, _ in users]).astype(np.float32))
        np.testing.assert_array_equal(records.y, np.concatenate([y for _, y in users]))
    assert dataset.train.x.dtype == np.float32 and dataset.train.y.dtype == np.int32
    carved = read_leaf(folder / "train", folder / "test", validation=0.3, seed=1)
    np.testing.assert_array_equal(carved.validation.sizes, [2, 2, 3])  # .3 of 7, 5 and 9, rounded half up
    np.testing.assert_array_equal(carved.test.x, dataset.test.x)
    alone = read_leaf(folder / "train" / "part_1.json")
    assert alone.site_names == ("f_1", "f_10") and not alone.test.sizes.any()


def test_texts_need_an_encoding(tmp_path):
    content = {"users": ["a"], "num_samples": [2], "user_data": {"a": {"x": ["ab", "ca"], "y": ["c", "b"]}}}
    (tmp_path / "play.json").write_text(json.dumps(content))
    with pytest.raises(FlJaxError, match=r"play\.json': the records of user 'a' are not numbers .*encode_x or encode_y"):
        read_leaf(tmp_path)

    def letters(texts):
        return np.array([[ord(c) - ord("a") for c in text] for text in texts], np.int32)

    dataset = read_leaf(tmp_path, encode_x=letters, encode_y=lambda texts: letters(texts)[:, 0], num_classes=26)
    np.testing.assert_array_equal(dataset.train.x, [[0, 1], [2, 0]])
    np.testing.assert_array_equal(dataset.train.y, [2, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["user_data"]["u"]["x"].pop(), r"user 'u' has 2 records x and 3 labels y, but num_samples says 3"),
        (lambda c: c["user_data"].clear(), r"user_data of user 'u' has no lists x and y"),
        (lambda c: c["num_samples"].append(1), r"names 1 users, but has 2 num_samples"),
        (lambda c: c.pop("users"), r"not in LEAF's format: it has no list 'users'"),
        (lambda c: c["user_data"]["u"]["x"][1].append(0.0), r"records of user 'u' are not numbers of one shape"),
        (lambda c: c["user_data"]["u"]["y"].__setitem__(0, 0.5), r"records of user 'u' .* whole classes \(not whole numbers\)"),
        (lambda c: c["user_data"]["u"]["x"][0].__setitem__(0, float("nan")), r"Site 'u' has 1 values .* NaN or infinite"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, message):
    content = leaf({"u": (np.zeros((3, 2)), [0, 1, 1])})
    change(content)
    (tmp_path / "file.json").write_text(json.dumps(content))
    with pytest.raises(FlJaxError, match=message):
        read_leaf(tmp_path)


def test_files_that_are_not_leafs_are_named(tmp_path):
    with pytest.raises(FlJaxError, match="holds no JSON file"):
        read_leaf(tmp_path)
    whole = json.dumps(leaf({"u": (np.zeros((3, 2)), [0, 1, 1])}))
    for text, message in (
        (whole[:40], r"a\.json' is no JSON \(.*line 1 column"),
        ("[1]", "it holds no object"),
        ("\xff", "is no JSON"),
    ):
        (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(FlJaxError, match=message):
            read_leaf(tmp_path)
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(whole)
    with pytest.raises(FlJaxError, match=r"b\.json': user 'u' has records in another place too"):
        read_leaf(tmp_path)
    (tmp_path / "b.json").write_text(json.dumps(leaf({"v": (np.zeros((3, 4)), [0, 1, 1])})))
    with pytest.raises(FlJaxError, match="not all of one shape"):
        read_leaf(tmp_path)
    with pytest.raises(FlJaxError, match="Could not read"):
        read_leaf(tmp_path / "absent.json")
