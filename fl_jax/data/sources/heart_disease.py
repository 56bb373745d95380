"""UCI Heart Disease: patients of four hospitals, and FLamby's protocol for them (Fed-Heart-Disease)."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fl_jax.data.arrays import from_arrays
from fl_jax.data.federated import FederatedDataset
from fl_jax.data.prepared import ensure, read
from fl_jax.data.published import Columns, Published, RawFile, choice, number, read_rows
from fl_jax.data.standardize import Statistics, pooled_statistics, site_statistics, standardize_features

_URL = "https://archive.ics.uci.edu/ml/machine-learning-databases/heart-disease/"
HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
_ROWS_AND_SHA256 = {
    "cleveland": (303, "a74b7efa387bc9d108d7d0115d831fe9b414b29ae7124f331b622b4efa0427c8"),
    "hungarian": (294, "d1ad108f785768cd3d7e82dc522e6f5a61eea93cccfb3a46ee8076f73fc3d796"),
    "switzerland": (123, "834a405ccf5b66ab4056bb77794adc8df0b7125186454c0a1d002d33c6c3b314"),
    "va": (200, "e7c93d8d0d2acdadfa4c5e8de768e2191e7f618b952e29623f1f0d5949ff6b8f"),
}
FEATURES = ("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak", "slope", "ca", "thal")
_DROPPED = ("slope", "ca", "thal")  # columns 10 to 12, mostly missing outside of Cleveland
_CATEGORIES = ("cp", "restecg")  # columns 2 and 6: kind of chest pain, resting ECG


def _parse(folder: Path) -> Mapping[str, Columns]:
    rows: list[list[float]] = []
    num: list[int] = []
    hospital: list[int] = []
    for k, name in enumerate(HOSPITALS):
        path = folder / f"processed.{name}.data"
        count, sha256 = _ROWS_AND_SHA256[name]
        for line, cells in read_rows(path, sha256, rows=count, columns=len(FEATURES) + 1):
            rows.append([number(path, line, c, text, missing="?") for c, text in zip(FEATURES, cells[:-1], strict=True)])
            num.append(int(choice(path, line, "num", cells[-1], "01234")))
            hospital.append(k)
    values = np.asarray(rows, np.float32)
    return {
        "train": {
            **{name: values[:, k] for k, name in enumerate(FEATURES)},
            "num": np.asarray(num, np.int32),
            "hospital": np.asarray(hospital, np.int64),
        }
    }


def _features() -> dict[str, Any]:
    import tensorflow_datasets as tfds

    columns: dict[str, Any] = {name: tfds.features.Scalar(np.float32) for name in FEATURES}
    return columns | {"num": tfds.features.Scalar(np.int32), "hospital": tfds.features.ClassLabel(names=list(HOSPITALS))}


HEART_DISEASE = Published(
    name="fed_heart_disease",
    version="1.0.0",
    about=(
        "UCI Heart Disease, the four processed files: 920 patients of hospitals in Cleveland, Hungary, Switzerland and Long Beach (VA), 13 "
        "features each (NaN where '?' is published), num from 0 (no disease) to 4. One record is one patient; the hospitals stand in "
        "one split, 'train', in the order of their files."
    ),
    licence="CC BY 4.0",
    citation=(
        "Janosi, A., Steinbrunn, W., Pfisterer, M. and Detrano, R. (1989). Heart Disease. UCI Machine Learning Repository. "
        "doi 10.24432/C52P4X. Protocol: Ogier du Terrail et al. (2022), FLamby, arXiv 2210.04620."
    ),
    homepage="https://archive.ics.uci.edu/dataset/45/heart+disease",
    files=tuple(RawFile(f"processed.{name}.data", f"{_URL}processed.{name}.data") for name in HOSPITALS),
    features=_features,
    parse=_parse,
)


PER_HOSPITAL: Statistics = partial(site_statistics, ddof=1)
"""How FLamby standardises for its federated and local arms: each hospital by its own training records."""

POOLED: Statistics = partial(pooled_statistics, ddof=1)
"""How FLamby standardises for its pooled arm: by the training records of all hospitals."""


def fed_heart_disease(
    *,
    statistics: Statistics = PER_HOSPITAL,
    validation: float = 0.0,
    seed: int | np.random.Generator = 0,
    unseen: Sequence[str] = (),
    data_dir: str | Path | None = None,
) -> FederatedDataset:
    """Fed-Heart-Disease of FLamby (arXiv 2210.04620): x float32[R, 13], y int32[R] (1: heart disease), 740 patients of 4 hospitals.

    Without the columns 10-12 (slope, ca, thal) and then without patients with a missing value; cp and restecg in one-hot form over all
    hospitals, first level dropped: 13 features. Split by scikit-learn's train_test_split(test_size=.34, random_state=43) in each
    hospital, stratified by y where both classes have more than 2 patients: train/test 199/104, 172/89, 30/16 and 85/45.
    statistics: PER_HOSPITAL, as in FLamby's federated and local arms, or POOLED, as in its pooled arm: means and standard deviations
    (ddof 1) of training records. validation: a fraction of each hospital's training patients, drawn by
    `seed`, from which no statistic is computed either; the test patients are always the same. unseen: hospitals held out whole.
    Raises DataMissing where the data are not on this machine.
    """
    columns = read(ensure(HEART_DISEASE, data_dir), "train")
    values = {name: columns[name].astype(np.float64) for name in FEATURES if name not in _DROPPED}
    whole = ~np.isnan(np.stack(list(values.values()))).any(0)
    hospital, y = columns["hospital"][whole], (columns["num"][whole] > 0).astype(np.int32)
    names = [name for name in values if name not in _CATEGORIES]
    x = [values[name][whole] for name in names]
    for name in _CATEGORIES:
        levels = np.unique(values[name][whole])[1:]
        names += [f"{name} = {level:g}" for level in levels]
        x += [values[name][whole] == level for level in levels]
    dropped = ", ".join(f"{np.sum(columns['hospital'][~whole] == k)} of {name}" for k, name in enumerate(HOSPITALS))
    scale = getattr(statistics, "func", statistics).__name__.replace("_", " ")
    dataset = from_arrays(
        np.stack(x, 1).astype(np.float64),
        y,
        hospital,
        name=HEART_DISEASE.name,
        seed=seed,
        validation=validation,
        test=_test_records(hospital, y),
        unseen=unseen,
        site_names=HOSPITALS,
        class_names=("no disease", "disease"),
        feature_names=names,
        notes=(
            "Real: patients of UCI Heart Disease at their hospitals, one record each; nothing is simulated.",
            f"FLamby's protocol: without slope, ca and thal; patients with a missing value are left out ({dropped}).",
            f"Features are standardised by {scale} of the training records.",
        ),
    )
    return standardize_features(dataset, statistics)


def _test_records(hospital: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which records FLamby tests on: bool[R]."""
    from sklearn.model_selection import train_test_split  # a second, which nobody else need pay

    test = np.zeros(len(y), bool)
    for k in range(len(HOSPITALS)):
        rows = np.flatnonzero(hospital == k)
        stratify = y[rows] if np.bincount(y[rows], minlength=2).min() > 2 else None
        # as FLamby writes it: 1 - .66 is not .34, and the size of a split is rounded up from it
        test[train_test_split(rows, test_size=1.0 - 0.66, train_size=0.66, random_state=43, stratify=stratify)[1]] = True
    return test
