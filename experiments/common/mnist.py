"""MNIST and Fashion-MNIST dealt to clients by a partition: to choose by validation images, and to measure by the official test set."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fl_jax import models
from fl_jax.data import FederatedDataset, Records, Source, fashion_mnist, from_sources, mnist, no_records
from fl_jax.types import Array, Model, Sites, Splits

Partition = Callable[[np.random.Generator, np.ndarray], np.ndarray]
"""(rng, labels int[R]) -> the client of each training image, e.g. lambda rng, y: data.shards(rng, y, 100)."""

Load = Callable[[str], Source]
"""("train" or "test") -> the images."""

IMAGES: dict[str, Load] = {"mnist": mnist, "fashion_mnist": fashion_mnist}
"""The sources by the names of fl_jax.data's catalog."""


def to_measure(images: Load, partition: Partition, seed: int) -> FederatedDataset:
    """All training images at the clients, the official test set dealt to them evenly ("all" in the metrics is the test set); no
    validation images. The seed draws the partition."""
    return _dealt(images, partition, seed, 0.0)


def to_choose(images: Load, partition: Partition, seed: int, validation: float) -> FederatedDataset:
    """The same clients, a share of whose own training images is for validation; without the test images, which can then play no part.

    validation: e.g. 1/12, which is 5,000 of 60,000. A client keeps the other images for training.
    """
    dataset = _dealt(images, partition, seed, validation)
    return replace(dataset, test=no_records(dataset.train, dataset.num_sites))


def _dealt(images: Load, partition: Partition, seed: int, validation: float) -> FederatedDataset:
    train, test = images("train"), images("test")
    rng = np.random.default_rng(seed)
    return from_sources(train, partition(rng, train.y), test=test, validation=validation, seed=rng)


def stacked(datasets: Sequence[FederatedDataset]) -> Splits:
    """As data.stack, for draws of the partition alone: what `to_measure` or what `to_choose` gives, of several seeds.

    The records of all draws lie in one table, of which each row of the study has its part, so that no program copies a draw's images
    out of a stack of them. Test images are those of the first draw for all: the official set is the same, whoever it is dealt to.
    """
    splits = [dataset.device() for dataset in datasets]

    def side_by_side(draws: Sequence[Sites]) -> Sites:
        x, y = (jnp.concatenate([getattr(sites, name) for sites in draws])[None] for name in ("x", "y"))
        first = np.cumsum([0, *(len(sites.y) for sites in draws[:-1])])
        offset = jnp.stack([sites.offset + start for sites, start in zip(draws, first, strict=True)])
        return Sites(x, y, offset.astype(jnp.int32), jnp.stack([sites.size for sites in draws]))

    test, unseen = (jax.tree.map(lambda leaf: leaf[None], sites) for sites in (splits[0].test, splits[0].unseen))
    return Splits(side_by_side([s.train for s in splits]), side_by_side([s.validation for s in splits]), test, unseen)


def by_class(tables: Sequence[Records], num_classes: int) -> Sites:
    """The records of each class as those of one site, stacked over draws: an official test set has no owners, but classes.

    "all" is then the whole set, and the worst client's accuracy follows from its mix of classes.
    """
    length = max(1, *(len(table.y) for table in tables))

    def padded(leaf: np.ndarray) -> np.ndarray:
        return np.pad(leaf, [(0, length - len(leaf)), *[(0, 0)] * (leaf.ndim - 1)])

    def sites(table: Records) -> tuple[np.ndarray, ...]:
        order, size = np.argsort(table.y, kind="stable"), np.bincount(table.y, minlength=num_classes)
        return padded(table.x[order]), padded(table.y[order]), (np.cumsum(size) - size).astype(np.int32), size.astype(np.int32)

    return Sites(*(jnp.asarray(np.stack(leaves)) for leaves in zip(*map(sites, tables), strict=True)))


def some(images: Load, count: int, seed: int) -> Load:
    """The images, of the training ones only so many, drawn by chance; all where there are no more."""

    def load(split: str) -> Source:
        source = images(split)
        if split != "train" or count >= len(source.y):
            return source
        kept = np.sort(np.random.default_rng([seed, 1]).permutation(len(source.y))[:count])
        return source._replace(x=source.x[kept], y=source.y[kept])

    return load


def unit_pixels(x: Array) -> Array:
    """uint8 pixels as float32 in [0, 1]."""
    return x.astype(jnp.float32) / 255


def centred_pixels(x: Array) -> Array:
    """uint8 pixels as float32 in [-1, 1]."""
    return 2 * unit_pixels(x) - 1


def classifier(
    module: nn.Module, shape: tuple[int, ...] = (28, 28, 1), *, pixels: Callable[[Array], Array] = unit_pixels
) -> Model:
    """A network of grey images uint8[B, 28, 28, 1], trained by softmax cross-entropy; pixels: what it sees of them."""
    example = jax.ShapeDtypeStruct((1, *shape), jnp.uint8)
    return models.bridge(module, example, models.softmax_cross_entropy, preprocess=pixels)
