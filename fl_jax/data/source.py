"""Records that are not yet dealt to sites, and the federation that a partition makes of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fl_jax.data.arrays import from_arrays
from fl_jax.data.federated import FederatedDataset
from fl_jax.data.partition import iid
from fl_jax.data.records import Records
from fl_jax.errors import FlJaxError


class Source(NamedTuple):
    """Records before they are dealt to sites: x [R, ...], y int32[R], and the names of classes and features."""

    name: str
    x: np.ndarray
    y: np.ndarray
    class_names: tuple[str, ...]
    feature_names: tuple[str, ...]
    notes: tuple[str, ...]


def from_sources(
    train: Source,
    site: Sequence | np.ndarray,
    *,
    test: Source,
    validation: float | Source = 0.0,
    seed: int | np.random.Generator = 0,
    notes: Sequence[str] = (),
) -> FederatedDataset:
    """A federation of training records dealt to sites by a partition, whose official test records are common to all sites.

    site: [R], of each training record, e.g. `shards(rng, train.y, 100)`; sites are ordered by name. validation: a fraction of every
    site's training records, or an official validation set. `seed` draws the rest:
    An official set is dealt out evenly, by chance, whatever the sites' training records look like. "pooled" in a study's results is
    then the metric of a global model on the official test set, every record predicted once; the test metric of a single site is
    that of its model on a random part of the set. (from_arrays splits a site's own records instead.) A study's `chunk` need not be
    larger than a site's part. notes: what the sites are. Raises FlJaxError where the sources differ in kind.
    """
    rng = np.random.default_rng(seed)
    official = isinstance(validation, Source)
    dataset = from_arrays(
        train.x,
        train.y,
        site,
        name=train.name,
        seed=rng,
        validation=0.0 if isinstance(validation, Source) else validation,
        test=0.0,
        num_classes=len(train.class_names),
        class_names=train.class_names,
        feature_names=train.feature_names,
        notes=(
            *train.notes,
            *notes,
            f"The official test {'and validation sets are' if official else 'set is'} dealt to the sites by chance.",
        ),
    )
    dataset = replace(dataset, test=_deal(rng, train, test, dataset.num_sites))
    return (
        replace(dataset, validation=_deal(rng, train, validation, dataset.num_sites))
        if isinstance(validation, Source)
        else dataset
    )


def _deal(rng: np.random.Generator, train: Source, source: Source, num_sites: int) -> Records:
    """The records of an official set, as even parts of the sites."""
    if train.x.shape[1:] != source.x.shape[1:] or train.x.dtype != source.x.dtype or train.class_names != source.class_names:
        raise FlJaxError(
            f"'{source.name}' cannot validate or test what '{train.name}' trains: they differ in the shape of x or in their classes."
        )
    owner = iid(rng, len(source.y), num_sites)
    rows = np.argsort(owner, kind="stable")
    return Records(source.x[rows], source.y[rows], np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=num_sites))]))
