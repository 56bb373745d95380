"""CSV to features: imputation, flags, categories, and no leakage from validation, test or unseen sites."""

import numpy as np
import pytest

from fl_jax.data.describe import describe
from fl_jax.data.standardize import as_measured, site_statistics
from fl_jax.data.tabular import read_csv, read_table
from fl_jax.errors import FlJaxError


def write(path, rows):
    path.write_text("clinic,patient,age,sex,always,outcome\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


def study(seed=0, n=120):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        age = "" if i % 9 == 0 else round(rng.normal(60, 10), 3)
        sex = "?" if i % 11 == 0 else rng.choice(["f", "m"])
        rows.append([f"c{i % 3}", f"p{i // 2}", age, sex, i, ["no", "yes"][rng.integers(2)]])
    return rows


def tables(data):
    return {split: getattr(data, split) for split in ("train", "validation", "test", "unseen")}


def row_numbers(data, statistics_free):
    """Which line of the file each record is, from the column 'always' that numbers them."""
    return statistics_free.x[:, data.feature_names.index("always")].astype(int)


def test_features_have_names_and_imputation_is_the_training_median_and_mode(tmp_path):
    rows = study()
    data = read_table(write(tmp_path / "s.csv", rows), "clinic", "outcome", group="patient").dataset(3, statistics=as_measured)
    assert data.feature_names == ("age", "age (missing)", "sex = f", "sex = m", "sex (missing)", "always")
    assert data.class_names == ("no", "yes") and data.train.x.dtype == np.float32 and data.train.y.dtype == np.int32
    training = row_numbers(data, data.train)
    median = np.median([rows[i][2] for i in training if rows[i][2] != ""])
    sexes = [rows[i][3] for i in training if rows[i][3] != "?"]
    mode = max("fm", key=sexes.count)
    for table in (data.train, data.validation, data.test):
        for x, y, i in zip(table.x, table.y, row_numbers(data, table), strict=True):
            age, sex = rows[i][2], rows[i][3]
            assert x[0] == pytest.approx(median if age == "" else age) and x[1] == (age == "")
            assert x[2] == ((mode if sex == "?" else sex) == "f") and x[2] + x[3] == 1 and x[4] == (sex == "?")
            assert data.class_names[y] == rows[i][5]


def test_missing_values_are_counted_per_site_and_named(tmp_path):
    rows = study()
    data = read_csv(write(tmp_path / "s.csv", rows), "clinic", "outcome", group="patient")
    for clinic in ("c0", "c1", "c2"):
        assert data.missing.get(clinic, 0) == sum((r[2] == "") + (r[3] == "?") for r in rows if r[0] == clinic)
    text = describe(data)
    assert "missing" in text and f"age {sum(r[2] == '' for r in rows)}" in text


@pytest.mark.parametrize("statistics", [site_statistics, None])
def test_no_number_from_outside_the_training_records_reaches_a_feature(tmp_path, statistics):
    rows = study()
    chosen = {} if statistics is None else {"statistics": statistics}
    whole = read_table(write(tmp_path / "s.csv", rows), "clinic", "outcome", drop=["patient"])
    plain = whole.dataset(1, unseen=["c2"], statistics=as_measured)
    data = whole.dataset(1, unseen=["c2"], **chosen)
    outside = np.concatenate([row_numbers(plain, table) for split, table in tables(plain).items() if split != "train"])
    changed = [list(row) for row in rows]
    for i in outside:  # other ages; which are missing, the labels and the line numbers stay
        if changed[i][2] != "":
            changed[i][2] = 1e6
            changed[i][3] = "f"
    other = read_table(write(tmp_path / "t.csv", changed), "clinic", "outcome", drop=["patient"]).dataset(
        1, unseen=["c2"], **chosen
    )
    np.testing.assert_array_equal(data.train.x, other.train.x)
    # the reverse: a training record's number does reach the features
    inside = row_numbers(plain, plain.train)
    for i in inside[:5]:
        changed[i][2] = 1e6
    third = read_table(write(tmp_path / "u.csv", changed), "clinic", "outcome", drop=["patient"])
    third = third.dataset(1, unseen=["c2"], **chosen)
    assert (third.train.x != data.train.x).any()


def test_seeds_draw_splits_with_the_same_features_and_no_patient_in_two(tmp_path):
    rows = study()
    table = read_table(write(tmp_path / "s.csv", rows), "clinic", "outcome", group="patient")
    drawn = [table.dataset(seed, statistics=as_measured) for seed in (0, 0, 1)]
    assert drawn[0].feature_names == drawn[2].feature_names
    np.testing.assert_array_equal(drawn[0].train.x, drawn[1].train.x)
    assert drawn[0].train.x.shape != drawn[2].train.x.shape or (drawn[0].train.x != drawn[2].train.x).any()
    for data in drawn:
        patients = [{rows[i][1] for i in row_numbers(data, t)} for t in (data.train, data.validation, data.test)]
        assert not (patients[0] & patients[1] or patients[0] & patients[2] or patients[1] & patients[2])


def test_a_column_without_a_training_value_is_named(tmp_path):
    path = tmp_path / "s.csv"
    path.write_text("site,x,z,label\n" + "".join(f"a,{i},,{i % 2}\n" for i in range(10)))
    with pytest.raises(FlJaxError, match="Column 'z' of 's.csv' has no value in any training record"):
        read_csv(path, "site", "label")
