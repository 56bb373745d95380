"""Prepared data: published records as TFDS keeps them (array_record, no TensorFlow), whole or not there at all.

A data set is written beside its place and renamed into it when everything is on the disk, so what is found there is whole; a run
that is killed leaves a hidden folder, which the next one removes. Nothing is downloaded unless `prepare` is called.
"""

import contextlib
import fcntl
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fl_jax.data.download import download
from fl_jax.data.published import Columns, Published
from fl_jax.errors import FlJaxError
from fl_jax.files import disk_errors, sync_folder

RAW = "FL_JAX_RAW"
_CHUNK = 4096


class DataMissing(FlJaxError):
    """A data set is not prepared and its raw files are not on this machine: who needs it cannot run, and nothing is wrong."""


def resolve_data_dir(data_dir: str | Path | None = None) -> Path:
    """Where prepared data are: `data_dir`, else the environment's TFDS_DATA_DIR, else ~/tensorflow_datasets, as for TFDS itself."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets").expanduser()


def raw_folder(published: Published, given: str | Path | None = None) -> Path | None:
    """The folder of a data set's raw files, None if there is none.

    given: this folder, or a parent with one sub-folder for each data set; default: the environment's FL_JAX_RAW, such a parent.
    """
    if given is not None:
        candidates = [Path(given) / published.name, Path(given)]
    else:
        candidates = [Path(os.environ[RAW]).expanduser() / published.name] if os.environ.get(RAW) else []
    return next((folder for folder in candidates if any((folder / file.name).is_file() for file in published.files)), None)


def place_of(published: Published, data_dir: str | Path | None = None) -> Path:
    """The folder that holds, or would hold, the prepared data set."""
    return resolve_data_dir(data_dir) / published.name / published.version


def is_prepared(published: Published, data_dir: str | Path | None = None) -> bool:
    """Whether the data set is prepared."""
    return is_whole(place_of(published, data_dir))


def is_whole(folder: Path) -> bool:
    """Whether a folder holds a TFDS data set with all its files, by the record that TFDS keeps of them."""
    try:
        info = json.loads((folder / "dataset_info.json").read_text())
        named = {"DATASET": info["name"], "FILEFORMAT": info.get("fileFormat", "tfrecord")}
        shards = [
            split["filepathTemplate"].format(
                **named, SPLIT=split["name"], SHARD_X_OF_Y=f"{k:05d}-of-{len(split['shardLengths']):05d}"
            )
            for split in info["splits"]
            for k in range(len(split["shardLengths"]))
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(shards) and all((folder / name).is_file() for name in [*shards, "features.json"])


def ensure(published: Published, data_dir: str | Path | None = None) -> Path:
    """The folder of the prepared data set; it is prepared now from the raw files in FL_JAX_RAW, if they are there.

    Downloads nothing. Raises DataMissing where there are no raw files, FlJaxError where these are not the published ones.
    """
    place = place_of(published, data_dir)
    if is_whole(place):
        return place
    folder = raw_folder(published)
    if folder is None:
        where = (
            f"'{os.environ[RAW]}' ({RAW}) has no folder '{published.name}' with its files"
            if os.environ.get(RAW)
            else (f"{RAW} names no folder of raw files")
        )
        raise DataMissing(
            f"Data set '{published.name}' is not prepared in '{resolve_data_dir(data_dir)}' and {where}: run `python -m fl_jax.data prepare "
            f"{published.name}`, which downloads it, with --from FOLDER where you have its files."
        )
    return prepare(published, folder=folder, data_dir=data_dir, progress=sys.stderr.isatty())


def prepare(
    published: Published,
    *,
    folder: str | Path | None = None,
    data_dir: str | Path | None = None,
    mirror: str | None = None,
    progress: bool = True,
) -> Path:
    """Verify the raw files and write them as a TFDS data set; returns its folder, at once where it is prepared already.

    folder: of the raw files; None downloads them from their canonical addresses, or from `mirror`, an address under which they
    have the same names. progress: bars on stderr. Two processes may prepare at the same time: the second waits.
    Raises FlJaxError for files that are missing or not as published, and where the disk or network fails; nothing is prepared then.
    """
    place = place_of(published, data_dir)
    if is_whole(place):
        return place
    root = resolve_data_dir(data_dir)
    with disk_errors(f"prepare '{published.name}' in '{root}'"):
        root.mkdir(parents=True, exist_ok=True)
        with _only_one(root / f".{published.name}.lock"):
            if is_whole(place):  # by the process that we waited for
                return place
            for left in root.glob(f".{published.name}-*.incomplete"):
                shutil.rmtree(left, ignore_errors=True)
            if place.exists():
                raise FlJaxError(
                    f"'{place}' holds something that is not the whole data set: remove this folder and prepare it again."
                )
            staging = Path(tempfile.mkdtemp(prefix=f".{published.name}-", suffix=".incomplete", dir=root))
            try:
                raw = Path(folder) if folder is not None else download(published, staging, mirror, progress=progress)
                written = _write(published, published.parse(raw), staging, progress)
                place.parent.mkdir(exist_ok=True)
                os.rename(written, place)
                sync_folder(place.parent)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    return place


@contextlib.contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Waits until no other process is in the block; the lock of a process that dies is free at once."""
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(published: Published, splits: Mapping[str, Columns], staging: Path, progress: bool) -> Path:
    """The splits as a TFDS data set under `staging`, on the disk; returns its folder."""
    import tensorflow_datasets as tfds

    count = {name: len(next(iter(columns.values()))) for name, columns in splits.items()}
    bar = tqdm(total=sum(count.values()), unit=" records", desc=f"preparing {published.name}", disable=not progress, leave=False)

    def records(split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for k in range(count[split]):
            yield k, {name: column[k] for name, column in splits[split].items()}
            bar.update()

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # TFDS has no types
        name = published.name
        VERSION = tfds.core.Version(published.version)

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"{published.about} Licence: {published.licence}.",
                features=tfds.features.FeaturesDict(published.features()),
                supervised_keys=published.supervised,
                homepage=published.homepage,
                citation=published.citation,
                license=published.licence,
                disable_shuffling=True,  # records stay in the order that protocols refer to
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
            return {split: records(split) for split in splits}

        def _generate_examples(self) -> None:  # which TFDS wants to be there
            raise NotImplementedError

    tfds.disable_progress_bar()  # its bars count shards; the one here counts records
    try:
        with bar, contextlib.redirect_stdout(io.StringIO()):  # TFDS talks of downloads that there are not
            builder = Builder(data_dir=str(staging), file_format="array_record")
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    finally:
        tfds.enable_progress_bar()
    written = Path(builder.data_dir)
    for file in written.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    sync_folder(written)
    return written


def read(folder: Path, split: str, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """All records of a split of a prepared data set, in the order in which they are kept: one array [R, ...] for each feature.

    names: of the features, default all. Texts are arrays of str. Raises FlJaxError for a split that there is not, features that
    are not of one shape, and damaged files.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(str(folder))
        if split not in builder.info.splits:
            raise FlJaxError(
                f"The data set in '{folder}' has no split '{split}': choose one of {', '.join(builder.info.splits)}."
            )
        source = builder.as_data_source(split)
        columns: dict[str, np.ndarray] = {}
        for start in range(0, len(source), _CHUNK):
            chunk = source.__getitems__(range(start, min(start + _CHUNK, len(source))))
            for name in names or chunk[0]:
                part = _stack(folder, name, builder.info.features[name], [record[name] for record in chunk])
                if name not in columns:
                    columns[name] = np.empty((len(source), *part.shape[1:]), part.dtype)
                columns[name][start : start + len(part)] = part
    except FlJaxError:
        raise
    except Exception as error:  # what TFDS and array_record raise for a damaged file has no type of its own
        raise FlJaxError(
            f"The data set in '{folder}' cannot be read ({error}): remove this folder and prepare it again."
        ) from error
    return {name: column.astype(str) if column.dtype == object else column for name, column in columns.items()}


def _stack(folder: Path, name: str, feature: Any, values: list[Any]) -> np.ndarray:
    if len({np.shape(value) for value in values}) > 1 or isinstance(values[0], dict):
        raise FlJaxError(
            f"Feature '{name}' of the data set in '{folder}' differs in shape between records, or is no array: bring it to one shape."
        )
    if isinstance(values[0], bytes):
        return np.asarray([value.decode() for value in values], object)  # of any length
    return np.asarray(values, feature.np_dtype)  # TFDS decodes scalars to Python's numbers
