"""What image data sets have in common: 28 x 28 grey values with a label, kept as bytes."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fl_jax.data.prepared import ensure, read
from fl_jax.data.published import Published
from fl_jax.data.source import Source

IMAGE = (28, 28)


def image_features(class_names: tuple[str, ...]) -> dict[str, Any]:
    """The TFDS features of a record: image uint8[28, 28, 1] and label."""
    import tensorflow_datasets as tfds

    return {
        # PNG, which TFDS uses for images, would need TensorFlow to write
        "image": tfds.features.Tensor(shape=(*IMAGE, 1), dtype=np.uint8, encoding="bytes"),
        "label": tfds.features.ClassLabel(names=list(class_names)),
    }


def image_source(published: Published, class_names: tuple[str, ...], split: str, data_dir: str | Path | None) -> Source:
    """A split as a Source: x uint8[R, 28, 28, 1], y int32[R], read-only and read once in a process."""
    x, y = _arrays(ensure(published, data_dir), split)
    note = f"Real: {len(y):,} images of {published.about.split(':')[0]}, official {split} split."
    return Source(published.name, x, y, class_names, (), (note,))


@lru_cache(maxsize=4)
def _arrays(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    columns = read(folder, split)
    x, y = columns["image"], columns["label"].astype(np.int32)
    for array in (x, y):
        array.setflags(write=False)  # all who ask get the same
    return x, y
