"""MNIST and Fashion-MNIST: 28 x 28 grey images in the idx format, 60,000 for training and 10,000 for testing."""

import gzip
import math
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from fl_jax.data.published import Columns, Published, RawFile, check_content, read_bytes
from fl_jax.data.source import Source
from fl_jax.data.sources.images import IMAGE, image_features, image_source
from fl_jax.errors import FlJaxError

_SPLITS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}
_Digests = Mapping[str, tuple[str, str]]  # split -> sha256 of the unzipped images and labels


def read_idx(path: Path, shape: tuple[int, ...], sha256: str) -> np.ndarray:
    """The bytes of a zipped idx file as uint8 of the given shape, verified unzipped: two zips of the same bytes may differ."""
    try:
        content = gzip.decompress(read_bytes(path))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise FlJaxError(f"'{path}' cannot be unzipped ({error}), so it is truncated or damaged; get it again.") from error
    # two zero bytes, 8 for "unsigned byte", the number of axes, then their lengths
    header = b"\0\0\x08" + bytes([len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    if content[: len(header)] != header or len(content) != len(header) + math.prod(shape):
        raise FlJaxError(
            f"'{path}' holds no idx data of the shape {list(shape)}, so it is another file or damaged; get it again."
        )
    check_content(path, content, sha256, "unzipped content")
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)


def _files(split: str) -> tuple[str, str]:
    prefix = _SPLITS[split][0]
    return f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"


def _parse(digests: _Digests, folder: Path) -> Mapping[str, Columns]:
    splits = {}
    for split, (of_images, of_labels) in digests.items():
        number = _SPLITS[split][1]
        images, labels = _files(split)
        splits[split] = {
            "image": read_idx(folder / images, (number, *IMAGE), of_images)[..., None],
            "label": read_idx(folder / labels, (number,), of_labels).astype(np.int64),
        }
    return splits


def _published(name: str, url: str, digests: _Digests, class_names: tuple[str, ...], **about: str) -> Published:
    return Published(
        name=name,
        version="1.0.0",
        files=tuple(RawFile(file, url + file) for split in _SPLITS for file in _files(split)),
        features=partial(image_features, class_names),
        parse=partial(_parse, digests),
        supervised=("image", "label"),
        **about,
    )


DIGITS = tuple(str(k) for k in range(10))
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

MNIST = _published(
    "mnist",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    {
        "train": (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        ),
        "test": (
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    },
    DIGITS,
    about="MNIST: handwritten digits, 28 x 28 grey values, 60,000 images for training and 10,000 for testing, of different writers.",
    licence="CC BY-SA 3.0",
    citation="LeCun, Y., Bottou, L., Bengio, Y. and Haffner, P. (1998). Gradient-based learning applied to document recognition. "
    "Proceedings of the IEEE 86(11), 2278-2324.",
    homepage="http://yann.lecun.com/exdb/mnist/",
)

FASHION_MNIST = _published(
    "fashion_mnist",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    {
        "train": (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        ),
        "test": (
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    },
    CLOTHES,
    about="Fashion-MNIST: articles of clothing, 28 x 28 grey values, 60,000 images for training and 10,000 for testing.",
    licence="MIT",
    citation="Xiao, H., Rasul, K. and Vollgraf, R. (2017). Fashion-MNIST: a novel image dataset for benchmarking machine learning "
    "algorithms. arXiv 1708.07747.",
    homepage="https://github.com/zalandoresearch/fashion-mnist",
)


def mnist(split: str = "train", *, data_dir: str | Path | None = None) -> Source:
    """MNIST: x uint8[R, 28, 28, 1], y int32[R], the digit; split "train" (60,000) or "test" (10,000), in the published order.

    Both arrays are read-only, and read once in a process. Raises DataMissing where the data are not on this machine.
    """
    return image_source(MNIST, DIGITS, split, data_dir)


def fashion_mnist(split: str = "train", *, data_dir: str | Path | None = None) -> Source:
    """Fashion-MNIST: x uint8[R, 28, 28, 1], y int32[R]; everything else as for `mnist`."""
    return image_source(FASHION_MNIST, CLOTHES, split, data_dir)
