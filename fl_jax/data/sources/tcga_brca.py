"""TCGA-BRCA: survival of breast cancer patients in six regions, and FLamby's split of them (Fed-TCGA-BRCA)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fl_jax.data.arrays import from_arrays
from fl_jax.data.federated import FederatedDataset
from fl_jax.data.prepared import ensure, read
from fl_jax.data.published import Columns, Published, RawFile, choice, number, read_rows
from fl_jax.errors import FlJaxError
from fl_jax.types import Survival

_URL = "https://raw.githubusercontent.com/owkin/FLamby/main/flamby/datasets/fed_tcga_brca/"
_PATIENTS, _SPLITS, _CENTERS = "brca.csv", "train_test_split.csv", "centers.csv"
_SHA256 = {
    _PATIENTS: "07cb53423f7d579d33cfdbf2cba57b2aee75318b85866c68ce39a75b1f1ba020",
    _SPLITS: "1249c6543a4060ff0fdaf8510fc37017755836db6c9fc5e6af96057c36510990",
    _CENTERS: "d610df2dae0203ea229c9579747ed3eb8d28e137c5378f55acc6fe6b4632bb1d",
}
REGIONS = ("Northeast", "South", "West", "Midwest", "Europe", "Canada")
"""FLamby's centres 0 to 5."""

FEATURES = (
    "age_at_index",
    *(f"ethnicity_{level}" for level in ("not hispanic or latino", "not reported")),
    *(f"race_{level}" for level in ("asian", "black or african american", "not reported", "white")),
    "ajcc_pathologic_m_MX",
    *(f"ajcc_pathologic_n_{level}" for level in ("N0 (i-)", "N1", "N1a", "N2", "N2a")),
    *(f"ajcc_pathologic_stage_Stage {level}" for level in ("IA", "IIA", "IIB", "IIIA", "IIIC")),
    *(f"ajcc_pathologic_t_{level}" for level in ("T1c", "T2", "T3")),
    *(f"ajcc_staging_system_edition_{level}" for level in ("5th", "6th", "7th")),
    "icd_10_code_C50.9",
    *(f"morphology_{level}" for level in ("8500/3", "8520/3")),
    *(f"primary_diagnosis_{level}" for level in ("Infiltrating duct carcinoma, NOS", "Lobular carcinoma, NOS")),
    "prior_malignancy_yes",
    "synchronous_malignancy_Not Reported",
    *(f"treatment_or_therapy_{level}" for level in ("not reported", "yes")),
    *(f"tumor_stage_stage {level}" for level in ("i", "ia", "iia", "iib", "iiia", "iiic")),
)
_SPLIT_NAMES = ("train", "test", "none")


def _parse(folder: Path) -> Mapping[str, Columns]:
    regions = _regions(folder / _CENTERS)
    places = _places(folder / _SPLITS)
    path = folder / _PATIENTS
    pid: list[str] = []
    values: list[list[float]] = []
    for line, cells in read_rows(path, _SHA256[_PATIENTS], rows=1096, columns=("pid", *FEATURES, "E", "T")):
        if cells[0][5:7] not in regions:
            raise FlJaxError(
                f"'{path}', line {line}: '{cells[0]}' names no tissue source site of '{_CENTERS}'; get the file again."
            )
        pid.append(cells[0])
        values.append([number(path, line, name, text) for name, text in zip((*FEATURES, "E", "T"), cells[1:], strict=True)])
    if stray := set(places) - set(pid):
        raise FlJaxError(
            f"'{folder / _SPLITS}', line {places[min(stray)][2]}: '{min(stray)}' is no patient of '{_PATIENTS}'; get both again."
        )
    for name in pid:
        if name in places and regions[name[5:7]] != REGIONS[places[name][0]]:
            raise FlJaxError(
                f"'{folder / _SPLITS}', line {places[name][2]}: '{name}' is in centre {places[name][0]} but from the region "
                f"{regions[name[5:7]]}; get the files again."
            )
    table = np.asarray(values, np.float32)
    return {
        "train": {
            "pid": np.asarray(pid),
            "features": table[:, :-2],
            "E": table[:, -2].astype(np.int32),
            "T": table[:, -1],
            "region": np.asarray([regions[name[5:7]] for name in pid]),
            "centre": np.asarray([places[name][0] if name in places else -1 for name in pid], np.int32),
            "split": np.asarray([places[name][1] if name in places else _SPLIT_NAMES.index("none") for name in pid], np.int64),
        }
    }


def _regions(path: Path) -> dict[str, str]:
    """Tissue source site -> region. The code "NA" is one of the sites."""
    rows = read_rows(path, _SHA256[_CENTERS], rows=111, columns=("TSS Code", "Source Site", "Country", "State", "Region"))
    return {cells[0]: choice(path, line, "Region", cells[4], (*REGIONS, "Other")) for line, cells in rows}


def _places(path: Path) -> dict[str, tuple[int, int, int]]:
    """Patient -> (centre, split, line), from `fold2`."""
    places: dict[str, tuple[int, int, int]] = {}
    folds = [f"{split}_{k}" for split in ("train", "test") for k in range(len(REGIONS))]
    for line, (pid, _, fold) in read_rows(path, _SHA256[_SPLITS], rows=1088, columns=("pid", "fold", "fold2")):
        split, centre = choice(path, line, "fold2", fold, folds).split("_")
        if pid in places:
            raise FlJaxError(f"'{path}', line {line}: '{pid}' is there twice; get the file again.")
        places[pid] = int(centre), _SPLIT_NAMES.index(split), line
    return places


def _features() -> dict[str, Any]:
    import tensorflow_datasets as tfds

    return {
        "pid": tfds.features.Text(),
        "features": tfds.features.Tensor(shape=(len(FEATURES),), dtype=np.float32),
        "E": tfds.features.Scalar(np.int32),
        "T": tfds.features.Scalar(np.float32),
        "region": tfds.features.Text(),
        "centre": tfds.features.Scalar(np.int32),
        "split": tfds.features.ClassLabel(names=list(_SPLIT_NAMES)),
    }


TCGA_BRCA = Published(
    name="fed_tcga_brca",
    version="1.0.0",
    about=(
        "TCGA-BRCA, clinical data as FLamby publishes them: 1,096 patients with breast cancer, 39 features, E (1: died), T (days to death or "
        "last sight), region of the tissue source site, and FLamby's centre (0 to 5; -1: none) and split. One record is one patient; "
        f"all stand in one split of TFDS, 'train'. Features: {'; '.join(FEATURES)}."
    ),
    licence="GDC open access (never try to re-identify patients); FLamby's files MIT",
    citation=(
        "The Cancer Genome Atlas Network (2012). Comprehensive molecular portraits of human breast tumours. Nature 490, 61-70. "
        "Protocol: Ogier du Terrail et al. (2022), FLamby, arXiv 2210.04620."
    ),
    homepage="https://github.com/owkin/FLamby/tree/main/flamby/datasets/fed_tcga_brca",
    files=(
        RawFile(_PATIENTS, _URL + _PATIENTS),
        RawFile(_SPLITS, f"{_URL}dataset_creation_scripts/{_SPLITS}"),
        RawFile(_CENTERS, _URL + _CENTERS),
    ),
    features=_features,
    parse=_parse,
)


def fed_tcga_brca(
    *,
    validation: float = 0.0,
    seed: int | np.random.Generator = 0,
    unseen: Sequence[str] = (),
    data_dir: str | Path | None = None,
) -> FederatedDataset:
    """Fed-TCGA-BRCA of FLamby (arXiv 2210.04620): x float32[R, 39], y Survival(time float32[R] in days, event bool[R]), 6 regions.

    The split is that of its files (`fold2`): train/test 248/63, 156/40, 164/42, 129/33, 129/33 and 40/11; 8 patients of other
    regions are in none of it. Features are as published, as in FLamby: age in years, everything else 0 or 1.
    validation: a fraction of each region's training patients, drawn by `seed`, stratified by event; the test patients are always the
    same. unseen: regions held out whole. Raises DataMissing where the data are not on this machine.
    """
    columns = read(ensure(TCGA_BRCA, data_dir), "train")
    chosen = columns["centre"] >= 0
    columns = {name: column[chosen] for name, column in columns.items()}
    centre, event = columns["centre"], columns["E"] > 0
    test = columns["split"] == _SPLIT_NAMES.index("test")
    seen = [
        f"{name} {np.sum(event & ~test & (centre == k))}/{np.sum(event & test & (centre == k))}" for k, name in enumerate(REGIONS)
    ]
    return from_arrays(
        columns["features"],
        Survival(columns["T"], event),  # type: ignore[arg-type]  # NumPy until it is moved to the device
        centre,
        name=TCGA_BRCA.name,
        seed=seed,
        validation=validation,
        test=test,
        label=event.astype(np.int64),
        unseen=unseen,
        site_names=REGIONS,
        num_classes=0,
        feature_names=FEATURES,
        notes=(
            "Real: patients of TCGA-BRCA in the region of their hospital, one record each, time from diagnosis in days.",
            f"FLamby's split. Deaths in training/test records: {', '.join(seen)}.",
        ),
    )
