"""Published data: the protocols against independent restatements, and raw files that are not as published."""

import gzip
import shutil
from functools import partial
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from fl_jax import data
from fl_jax.data import prepared
from fl_jax.data.catalog import CATALOG, published
from fl_jax.data.sources.heart_disease import HOSPITALS, POOLED
from fl_jax.data.sources.pneumonia_mnist import PNEUMONIA_MNIST
from fl_jax.data.sources.tcga_brca import FEATURES, REGIONS
from fl_jax.errors import FlJaxError
from fl_jax.types import Survival


def parts(records):
    return [(records.x[a:b], records.y[a:b]) for a, b in pairwise(records.offsets)]


@pytest.fixture(scope="module")
def heart_reference(raw_files):
    """FLamby's protocol in pandas and scikit-learn, in the words of its authors: features before standardisation, by hospital."""
    from sklearn.model_selection import train_test_split

    folder = raw_files("fed_heart_disease")
    tables, test = [], []
    for name in HOSPITALS:
        table = pd.read_csv(folder / f"processed.{name}.data", header=None, na_values="?").drop(columns=[10, 11, 12]).dropna()
        sick = (table[13] > 0).astype(int)
        stratify = sick if sick.nunique() > 1 and sick.value_counts().min() > 2 else None
        rows = train_test_split(np.arange(len(table)), test_size=0.34, train_size=0.66, random_state=43, stratify=stratify)[1]
        test.append(np.isin(np.arange(len(table)), rows))
        tables.append(table.assign(sick=sick, hospital=name))
    joined = pd.concat(tables, ignore_index=True)
    x = pd.get_dummies(joined.drop(columns=[13, "sick", "hospital"]), columns=[2, 6], drop_first=True).astype(float)
    return x.to_numpy(), joined["sick"].to_numpy(), joined["hospital"].to_numpy(), np.concatenate(test)


def test_heart_disease_is_flambys(published_data, heart_reference):
    x, y, hospital, test = heart_reference
    dataset = data.fed_heart_disease(data_dir=published_data("fed_heart_disease"))
    assert dataset.site_names == HOSPITALS and len(dataset.feature_names) == 13 and dataset.num_classes == 2
    np.testing.assert_array_equal(dataset.train.sizes, [199, 172, 30, 85])
    np.testing.assert_array_equal(dataset.test.sizes, [104, 89, 16, 45])
    assert not dataset.validation.sizes.any()
    for k, name in enumerate(HOSPITALS):
        train, held = x[(hospital == name) & ~test], x[(hospital == name) & test]
        mean, deviation = (
            train.mean(0),
            train.std(0, ddof=1) + 1e-9,
        )  # FLamby's guard; one constant column (cholesterol, always 0)
        for (found, label), rows in ((parts(dataset.train)[k], train), (parts(dataset.test)[k], held)):
            np.testing.assert_allclose(found, (rows - mean) / deviation, rtol=2e-5, atol=2e-5)  # float32 of at most 600
            np.testing.assert_array_equal(label, y[(hospital == name) & (test == (rows is held))])
    pooled = data.fed_heart_disease(data_dir=published_data("fed_heart_disease"), statistics=POOLED)
    np.testing.assert_allclose(pooled.train.x, (x[~test] - x[~test].mean(0)) / x[~test].std(0, ddof=1), rtol=2e-5, atol=2e-5)


def test_validation_records_of_heart_disease_are_taken_from_training_and_from_its_statistics(published_data):
    load = partial(data.fed_heart_disease, data_dir=published_data("fed_heart_disease"), validation=0.2)
    dataset, other = load(seed=1), load(seed=2)
    np.testing.assert_array_equal(dataset.train.sizes + dataset.validation.sizes, [199, 172, 30, 85])
    np.testing.assert_array_equal(dataset.test.y, other.test.y)
    assert not np.array_equal(dataset.validation.x, other.validation.x)
    for x, _ in parts(dataset.train):
        np.testing.assert_allclose(x.mean(0), 0, atol=1e-5)
        spread = x.std(0, ddof=1)
        np.testing.assert_allclose(spread[spread > 0], 1, rtol=1e-4)
    held_out = load(unseen=["va"])
    assert held_out.unseen_names == ("va",) and len(held_out.unseen.y) == 130 and held_out.num_sites == 3


def test_tcga_brca_is_flambys(published_data, raw_files):
    folder = raw_files("fed_tcga_brca")
    table = pd.read_csv(folder / "brca.csv").merge(pd.read_csv(folder / "train_test_split.csv"), on="pid")
    dataset = data.fed_tcga_brca(data_dir=published_data("fed_tcga_brca"))
    assert dataset.site_names == REGIONS and dataset.num_classes == 0
    np.testing.assert_array_equal(dataset.train.sizes, [248, 156, 164, 129, 129, 40])
    np.testing.assert_array_equal(dataset.test.sizes, [63, 40, 42, 33, 33, 11])
    for split, records in (("train", dataset.train), ("test", dataset.test)):
        assert isinstance(records.y, Survival) and records.y.time.dtype == np.float32 and records.y.event.dtype == bool
        expected = pd.concat([table[table["fold2"] == f"{split}_{k}"] for k in range(6)])
        np.testing.assert_array_equal(records.x, expected[list(FEATURES)].to_numpy(np.float32))
        np.testing.assert_array_equal(records.y.time, expected["T"])
        np.testing.assert_array_equal(records.y.event, expected["E"] == 1)
    assert "Europe 7/2, Canada 2/1" in dataset.notes[1]
    carved = data.fed_tcga_brca(data_dir=published_data("fed_tcga_brca"), validation=0.25)
    assert (
        carved.validation.sizes.sum() == pytest.approx(866 / 4, abs=3)
        and carved.train.x.shape[0] + carved.validation.x.shape[0] == 866
    )
    np.testing.assert_array_equal(carved.test.x, dataset.test.x)


@pytest.mark.slow
def test_mnist_is_as_published_and_its_test_set_is_common(published_data, raw_files):
    train, test = (data.mnist(split, data_dir=published_data("mnist")) for split in ("train", "test"))
    with gzip.open(raw_files("mnist") / "train-images-idx3-ubyte.gz") as file:
        np.testing.assert_array_equal(train.x.reshape(-1), np.frombuffer(file.read()[16:], np.uint8))
    with gzip.open(raw_files("mnist") / "t10k-labels-idx1-ubyte.gz") as file:
        np.testing.assert_array_equal(test.y, np.frombuffer(file.read()[8:], np.uint8))
    assert train.x.shape == (60_000, 28, 28, 1) and train.y.dtype == np.int32
    np.testing.assert_array_equal(np.bincount(train.y), [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949])  # published
    assert data.mnist(data_dir=published_data("mnist")).x is train.x and not train.x.flags.writeable

    site = data.shards(np.random.default_rng(0), train.y, 100)
    dataset = data.from_sources(train, site, test=test, validation=0.1)
    np.testing.assert_array_equal(dataset.test.sizes, np.full(100, 100))
    np.testing.assert_array_equal(np.sort(dataset.test.x.sum((1, 2, 3))), np.sort(test.x.sum((1, 2, 3))))  # each once
    np.testing.assert_array_equal(dataset.train.sizes + dataset.validation.sizes, np.bincount(site))
    np.testing.assert_array_equal(dataset.train.x.sum(0) + dataset.validation.x.sum(0), train.x.sum(0))


def test_fashion_mnist_is_as_published_however_it_is_zipped(raw_files, tmp_path):
    for file in raw_files("fashion_mnist").glob("*.gz"):
        if "images" in file.name:
            shutil.copy(file, tmp_path)
        else:
            (tmp_path / file.name).write_bytes(gzip.compress(gzip.decompress(file.read_bytes()), 1))
    splits = published("fashion_mnist").parse(tmp_path)
    assert {split: columns["image"].shape for split, columns in splits.items()} == {
        "train": (60_000, 28, 28, 1),
        "test": (10_000, 28, 28, 1),
    }
    np.testing.assert_array_equal(np.bincount(splits["train"]["label"]), np.full(10, 6000))  # published: balanced


def test_pneumonia_mnist_is_the_same_in_whatever_order(published_data, raw_files, tmp_path):
    raw = raw_files("pneumoniamnist") / "pneumoniamnist.npz"
    arrays = dict(np.load(raw))
    order = np.random.default_rng(0).permutation(4708)
    np.savez(
        tmp_path / raw.name,
        **{**arrays, "train_images": arrays["train_images"][order], "train_labels": arrays["train_labels"][order]},
    )
    train = data.pneumonia_mnist(data_dir=published_data("pneumoniamnist"))
    shuffled = PNEUMONIA_MNIST.parse(tmp_path)["train"]
    np.testing.assert_array_equal(train.x, shuffled["image"])
    np.testing.assert_array_equal(train.y, shuffled["label"])
    np.testing.assert_array_equal(train.x.sum(0)[..., 0], arrays["train_images"].sum(0))
    np.testing.assert_array_equal(np.bincount(train.y), [1214, 3494])  # published
    assert len(data.pneumonia_mnist("validation", data_dir=published_data("pneumoniamnist")).y) == 524

    for wrong, message in (
        ({"test_labels": 1 - arrays["test_labels"]}, "checksum of its test records"),
        ({"val_images": arrays["val_images"][:-1]}, r"'val_images' as uint8\[523, 28, 28\], expected uint8\[524"),
    ):
        np.savez(tmp_path / raw.name, **{**arrays, **wrong})
        with pytest.raises(FlJaxError, match=message):
            PNEUMONIA_MNIST.parse(tmp_path)
    np.savez(tmp_path / raw.name, **{name: array for name, array in arrays.items() if name != "train_labels"})
    with pytest.raises(FlJaxError, match="no array 'train_labels'"):
        PNEUMONIA_MNIST.parse(tmp_path)
    for damaged in (raw.read_bytes()[:100_000], b"", b"no zip"):
        (tmp_path / raw.name).write_bytes(damaged)
        with pytest.raises(FlJaxError, match=r"pneumoniamnist\.npz' cannot be read .* truncated or damaged"):
            PNEUMONIA_MNIST.parse(tmp_path)


def lines(change):
    """A change of a file as a change of its lines (from 0)."""

    def changed(content: bytes) -> bytes:
        rows = content.split(b"\n")
        return b"\n".join(change(rows))

    return changed


def with_row(number, change):
    return lines(lambda rows: [change(row) if k == number else row for k, row in enumerate(rows)])


DAMAGE = [
    ("fed_heart_disease", "processed.va.data", lambda c: c[:5000], r"va\.data', line 1\d\d: there are \d+ values, expected 14"),
    (
        "fed_heart_disease",
        "processed.va.data",
        lines(lambda rows: [*rows[:150], b""]),
        r"line 150: the file ends after 150 records, expected 200",
    ),
    (
        "fed_heart_disease",
        "processed.va.data",
        lines(lambda rows: [rows[0], *rows]),
        r"line 201: .* 201 records, expected 200: lines were added",
    ),
    (
        "fed_heart_disease",
        "processed.hungarian.data",
        with_row(4, lambda row: row + b",1"),
        r"line 5: there are 15 values, expected 14",
    ),
    (
        "fed_heart_disease",
        "processed.hungarian.data",
        with_row(0, lambda row: row.replace(b"28", b"x")),
        r"line 1: 'x' in column 'age' is no number",
    ),
    (
        "fed_heart_disease",
        "processed.hungarian.data",
        with_row(2, lambda row: row[:-1] + b"7"),
        r"line 3: '7' in column 'num' is none of 0, 1",
    ),
    (
        "fed_heart_disease",
        "processed.cleveland.data",
        with_row(2, lambda row: b"\xff" + row),
        r"cleveland\.data', line 3: this is no text",
    ),
    (
        "fed_heart_disease",
        "processed.cleveland.data",
        lambda c: c.replace(b"233.0", b"234.0", 1),
        r"cleveland\.data' is not .* checksum \(sha256\)",
    ),
    (
        "fed_heart_disease",
        "processed.switzerland.data",
        lambda c: b"",
        r"switzerland\.data', line 1: the file ends after 0 records",
    ),
    (
        "fed_tcga_brca",
        "brca.csv",
        lambda c: c.replace(b",race_white,", b",", 1),
        r"brca\.csv', line 1: the column 'race_white' is missing",
    ),
    (
        "fed_tcga_brca",
        "brca.csv",
        with_row(0, lambda row: row + b",more"),
        r"brca\.csv', line 1: there are 43 columns, expected 42",
    ),
    (
        "fed_tcga_brca",
        "brca.csv",
        with_row(0, lambda row: row.replace(b"E,T", b"T,E")),
        r"line 1: column 41 is 'T', expected 'E'",
    ),
    ("fed_tcga_brca", "brca.csv", with_row(9, lambda row: row + b'"x'), r"brca\.csv', line 10: "),
    (
        "fed_tcga_brca",
        "brca.csv",
        with_row(9, lambda row: b"TCGA-??" + row[7:]),
        r"line 10: 'TCGA-\?\?-.*' names no tissue source site",
    ),
    (
        "fed_tcga_brca",
        "centers.csv",
        with_row(3, lambda row: row.replace(b"Northeast", b"North")),
        r"centers\.csv', line 4: 'North' in column 'Region'",
    ),
    (
        "fed_tcga_brca",
        "train_test_split.csv",
        with_row(7, lambda row: row[:-1] + b"9"),
        r"split\.csv', line 8: 'train_9' in column 'fold2'",
    ),
    (
        "fed_tcga_brca",
        "train_test_split.csv",
        lines(lambda rows: [*rows[:-1], rows[-2]]),
        r"split\.csv', line 1089: '.*' is there twice",
    ),
    ("mnist", "t10k-labels-idx1-ubyte.gz", lambda c: c[:2000], r"t10k-labels-idx1-ubyte\.gz' cannot be unzipped .* truncated"),
    ("mnist", "t10k-labels-idx1-ubyte.gz", lambda c: gzip.decompress(c), r"t10k-labels-idx1-ubyte\.gz' cannot be unzipped"),
    (
        "mnist",
        "t10k-labels-idx1-ubyte.gz",
        lambda c: gzip.compress(gzip.decompress(c)[:-1]),
        r"holds no idx data of the shape \[10000\]",
    ),
    (
        "mnist",
        "t10k-labels-idx1-ubyte.gz",
        lambda c: gzip.compress(gzip.decompress(c)[:-1] + b"\0"),
        r"checksum \(sha256\) of its unzipped content",
    ),
]


@pytest.mark.parametrize(("name", "file", "damage", "message"), DAMAGE, ids=[f"{d[1]}-{k}" for k, d in enumerate(DAMAGE)])
def test_what_is_wrong_with_a_raw_file_is_named_and_nothing_is_prepared(raw_files, tmp_path, name, file, damage, message):
    folder = tmp_path / name
    folder.mkdir()
    for original in raw_files(name).iterdir():
        (folder / original.name).symlink_to(original)
    (folder / file).unlink()
    (folder / file).write_bytes(damage((raw_files(name) / file).read_bytes()))
    with pytest.raises(FlJaxError, match=message) as caught:
        prepared.prepare(published(name), folder=folder, data_dir=tmp_path / "prepared", progress=False)
    assert file in str(caught.value) and not isinstance(caught.value, data.DataMissing)
    assert [path.name for path in (tmp_path / "prepared").iterdir()] == [f".{name}.lock"]


def test_every_data_set_says_where_it_comes_from_and_on_what_terms():
    for entry in CATALOG.values():
        source = entry.published
        assert source.licence and source.citation and source.homepage.startswith("http") and source.about.endswith(".")
        assert all(file.url.startswith("http") and file.name in file.url for file in source.files)
