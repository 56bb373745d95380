"""PneumoniaMNIST of MedMNIST v2: chest X-rays of children, 28 x 28 grey values, with or without pneumonia."""

import hashlib
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from fl_jax.data.published import Columns, Published, RawFile
from fl_jax.data.source import Source
from fl_jax.data.sources.images import IMAGE, image_features, image_source
from fl_jax.errors import FlJaxError
from fl_jax.files import disk_errors

_FILE = "pneumoniamnist.npz"
CLASSES = ("normal", "pneumonia")
# split -> name in the file, records, and the sha256 of the sorted sha256 of its records: the published file and copies of it
# differ in the order of their records
_SPLITS = {
    "train": ("train", 4708, "6f4f175d8f284b761e4bac8adbbc53909ab5bf726091ff048df60e31b0285e79"),
    "validation": ("val", 524, "96fd11f8a8ae3d1112cc8a9eb5228b9dd9d012f03b065853d718c1e0b0a7b046"),
    "test": ("test", 624, "76775cc8c143ecff72cb3bcb0a321228f0926dbed65082df8a321d5ea26be326"),
}


def _parse(folder: Path) -> Mapping[str, Columns]:
    path = folder / _FILE
    try:
        with disk_errors(f"read the raw file '{path}'"), open(path, "rb") as file, np.load(file) as arrays:
            held = {key: arrays[key] for key in arrays.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, FlJaxError):
            raise
        raise FlJaxError(f"'{path}' cannot be read ({error}), so it is truncated or damaged; get it again.") from error
    splits = {}
    for split, (name, count, sha256) in _SPLITS.items():
        images, labels = (
            _array(path, held, f"{name}_{kind}", shape) for kind, shape in (("images", (count, *IMAGE)), ("labels", (count, 1)))
        )
        digests = [
            hashlib.sha256(image.tobytes() + label.tobytes()).digest() for image, label in zip(images, labels, strict=True)
        ]
        # by digest: the prepared records have one order, whatever that of the file
        order = sorted(range(count), key=digests.__getitem__)
        found = hashlib.sha256(b"".join(digests[k] for k in order)).hexdigest()
        if found != sha256:
            raise FlJaxError(
                f"'{path}' does not hold the published records: the checksum of its {name} records, in whatever order, is "
                f"{found[:16]}..., expected {sha256[:16]}...; get the file again."
            )
        splits[split] = {"image": images[order][..., None], "label": labels[order, 0].astype(np.int64)}
    return splits


def _array(path: Path, held: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in held:
        raise FlJaxError(f"'{path}' holds no array '{name}', so it is another file; get it again.")
    array = held[name]
    if array.shape != shape or array.dtype != np.uint8:
        raise FlJaxError(
            f"'{path}' holds '{name}' as {array.dtype}{list(array.shape)}, expected uint8{list(shape)}; get the file again."
        )
    return array


PNEUMONIA_MNIST = Published(
    name="pneumoniamnist",
    version="1.0.0",
    about=(
        "PneumoniaMNIST: chest X-rays of children, 28 x 28 grey values, normal or with pneumonia; 4,708 images for training, 524 for "
        "validation, 624 for testing, in the order of their digests. Which images are of one patient is not published."
    ),
    licence="CC BY 4.0",
    citation=(
        "Yang, J. et al. (2023). MedMNIST v2: a large-scale lightweight benchmark for 2D and 3D biomedical image classification. "
        "Scientific Data 10, 41. Kermany, D. S. et al. (2018). Identifying medical diagnoses and treatable diseases by image-based "
        "deep learning. Cell 172(5), 1122-1131."
    ),
    homepage="https://medmnist.com",
    files=(RawFile(_FILE, f"https://zenodo.org/records/10519652/files/{_FILE}?download=1"),),
    features=partial(image_features, CLASSES),
    parse=_parse,
    supervised=("image", "label"),
)


def pneumonia_mnist(split: str = "train", *, data_dir: str | Path | None = None) -> Source:
    """PneumoniaMNIST: x uint8[R, 28, 28, 1], y int32[R] (1: pneumonia); split "train" (4,708), "validation" (524) or "test" (624).

    74 % of the training and 62 % of the test images show pneumonia. Records are in the order of their digests. Both arrays are
    read-only, and read once in a process. Raises DataMissing where the data are not on this machine.
    """
    return image_source(PNEUMONIA_MNIST, CLASSES, split, data_dir)
