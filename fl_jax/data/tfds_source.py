"""Any data set that TFDS has prepared on this machine, by name."""

import difflib
import json
import re
from pathlib import Path

import numpy as np

from fl_jax.data.prepared import DataMissing, is_whole, read, resolve_data_dir
from fl_jax.data.source import Source
from fl_jax.errors import FlJaxError


def tfds_source(
    name: str, split: str = "train", *, x: str | None = None, y: str | None = None, data_dir: str | Path | None = None
) -> Source:
    """The records of a prepared TFDS data set, to be dealt to sites by a partition: `from_arrays(s.x, s.y, iid(rng, len(s.y), 10))`.

    name: "NAME", "NAME/CONFIG" or either with ":VERSION"; the newest version otherwise. x, y: names of the features that are input
    and label, default: TFDS's `supervised_keys`. x [R, ...] as TFDS decodes it; y int32[R] where it is of integers. Records of
    different shapes (images of several sizes) have to be brought to one before. TFDS must have kept them as array_record
    (`builder.download_and_prepare(file_format="array_record")`), which needs no TensorFlow to read. Downloads nothing.
    Raises DataMissing where the data set is not prepared, FlJaxError for other mistakes.
    """
    folder = find_prepared(name, data_dir)
    import tensorflow_datasets as tfds

    info = tfds.builder_from_directory(str(folder)).info
    features = list(info.features)
    keys = info.supervised_keys or (None, None)
    chosen = [given or default for given, default in zip((x, y), keys, strict=False)]
    for role, feature in zip("xy", chosen, strict=True):
        if feature not in features:
            what = f"has no feature '{feature}'" if feature else f"does not say which feature is {role}"
            raise FlJaxError(f"Data set '{name}' {what}: set {role} to one of {', '.join(sorted(features))}.")
    columns = read(folder, split, chosen)
    label = columns[chosen[1]]
    return Source(
        name=name,
        x=columns[chosen[0]],
        y=label.astype(np.int32) if np.issubdtype(label.dtype, np.integer) else label,
        class_names=tuple(getattr(info.features[chosen[1]], "names", None) or ()),
        feature_names=(),
        notes=(f"{len(label):,} records of the TFDS data set '{name}' ({folder.name}), split {split}; sites are simulated.",),
    )


def find_prepared(name: str, data_dir: str | Path | None = None) -> Path:
    """The folder of a prepared TFDS data set, found without asking TFDS, which would go to the network.

    Raises DataMissing where there is none, FlJaxError where several configurations fit or it is not kept as array_record.
    """
    root = resolve_data_dir(data_dir)
    path, _, version = name.partition(":")
    there = prepared_names(data_dir)
    fitting = [
        known for known in there if (known == path or known.startswith(f"{path}/")) and (not version or version in there[known])
    ]
    if not fitting:
        close = difflib.get_close_matches(name, there, n=1, cutoff=0.6)
        known = (
            f"did you mean '{close[0]}'?"
            if close
            else f"prepared are {', '.join(there) or 'none'}; prepare it with TFDS, as array_record."
        )
        raise DataMissing(f"There is no TFDS data set '{name}' prepared in '{root}': {known}")
    if len(fitting) > 1:
        raise FlJaxError(f"Data set '{path}' is prepared in several configurations: choose one of {', '.join(fitting)}.")
    folder = root / fitting[0] / (version or there[fitting[0]][-1])
    kept_as = json.loads((folder / "dataset_info.json").read_text()).get("fileFormat") or "tfrecord"
    if kept_as != "array_record":
        raise FlJaxError(
            f"'{folder}' is kept as {kept_as}, which needs TensorFlow: prepare it again with file_format=\"array_record\"."
        )
    return folder


def prepared_names(data_dir: str | Path | None = None) -> dict[str, list[str]]:
    """ "NAME" or "NAME/CONFIG" -> versions, oldest first, of all data sets that are prepared whole."""
    root = resolve_data_dir(data_dir)
    there: dict[str, list[str]] = {}
    for info in sorted([*root.glob("[!.]*/*/dataset_info.json"), *root.glob("[!.]*/*/*/dataset_info.json")]):
        if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name) and is_whole(info.parent):
            there.setdefault(info.parent.parent.relative_to(root).as_posix(), []).append(info.parent.name)
    return {name: sorted(versions, key=lambda v: [int(n) for n in v.split(".")]) for name, versions in there.items()}
