"""The table: its numbers are the data set's, its columns are aligned, and 1,000 sites stay readable."""

import numpy as np

from fl_jax.data.arrays import from_arrays
from fl_jax.data.describe import class_counts, describe
from fl_jax.data.records import Records


def draw(num_sites, num_classes, n, **changes):
    rng = np.random.default_rng(0)
    site = np.concatenate([np.arange(num_sites), rng.integers(num_sites, size=n - num_sites)])
    return from_arrays(np.zeros((n, 2), np.float32), rng.integers(num_classes, size=n), site, **changes)


def cells(text, start):
    line = next(line for line in text.splitlines() if line.startswith(start))
    return line.replace(",", "").split()


def test_numbers_are_those_of_the_data_set():
    data = draw(5, 2, 400, unseen=["4"], notes=["Real: nothing."], missing={"1": 7}, class_names=["no", "yes"])
    text = describe(data)
    for i, name in enumerate(data.site_names):
        row = cells(text, f"{name} ")
        assert row[1:4] == [str(t.sizes[i]) for t in (data.train, data.validation, data.test)]
        labels = np.concatenate([t.y[t.sites == i] for t in (data.train, data.validation, data.test)])
        assert [row[4], row[7]] == [str((labels == k).sum()) for k in (0, 1)]
        assert row[-1] == ("7" if name == "1" else "-")
    assert cells(text, "total")[1:4] == [str(len(t.y)) for t in (data.train, data.validation, data.test)]
    assert cells(text, "4 (unseen)")[2:5] == ["-", "-", str(len(data.unseen.y))]
    assert text.endswith("Real: nothing.")


def test_columns_are_aligned():
    body = [line for line in describe(draw(12, 3, 3000)).splitlines()[2:] if line]
    assert len({len(line) for line in body}) == 1


def test_a_thousand_sites_are_summed_up():
    data = draw(1000, 10, 20000, unseen=[str(i) for i in range(900, 1000)])
    text = describe(data)
    assert len(text.splitlines()) < 40 and max(map(len, text.splitlines())) <= 110
    sizes = data.train.sizes
    assert cells(text, "median")[1] == str(round(np.median(sizes))) and cells(text, "maximum")[1] == str(sizes.max())
    assert "all 100 unseen" in text


def test_class_counts_of_masks_and_of_no_classes():
    y = np.array([[[0, 1], [2, 2]], [[1, 1], [1, 0]], [[2, 2], [2, 2]]])
    table = Records(np.zeros((3, 1)), y, np.array([0, 2, 3]))
    np.testing.assert_array_equal(class_counts(table, 3), [[2, 4, 2], [0, 0, 4]])
    assert class_counts(table, 0).shape == (2, 0)
    assert "total" in describe(from_arrays(np.zeros((6, 1)), np.linspace(0, 1, 6), [0, 0, 0, 1, 1, 1]))
