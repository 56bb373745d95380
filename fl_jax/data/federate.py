"""From a source with an official test set to a federation."""

from collections.abc import Sequence

import numpy as np

from fl_jax.data.arrays import from_arrays
from fl_jax.data.federated import FederatedDataset
from fl_jax.data.partition import iid
from fl_jax.data.source import Source
from fl_jax.errors import FlJaxError


def federate(
    train: Source,
    site: Sequence | np.ndarray,
    *,
    test: Source,
    validation: float = 0.0,
    seed: int | np.random.Generator = 0,
    notes: Sequence[str] = (),
) -> FederatedDataset:
    """A federation of the training records of a source, whose official test records are common to all sites.

    site: [R] of the training records, e.g. `shards(rng, train.y, 100)`. validation: a fraction of every site's training records,
    drawn by `seed`. The test records are dealt out evenly, by chance, whatever the sites' training records look like: "pooled" in a
    study's results is then the metric of a global model on the official test set, each record predicted once; the test metrics of a
    single site are those of its model on a random part of that set. (To test sites on what they train on, split the training
    records by from_arrays.) Set a study's `chunk` to no more than the test records of a site.
    notes: what the sites are. Raises FlJaxError where the two sources differ in kind.
    """
    if train.x.shape[1:] != test.x.shape[1:] or train.x.dtype != test.x.dtype or train.class_names != test.class_names:
        raise FlJaxError(f"'{test.name}' is no test set for '{train.name}': they differ in the shape of x or in their classes.")
    own = np.asarray(site)
    rng = np.random.default_rng(seed)
    names = np.unique(own)
    dealt = names[iid(rng, len(test.y), len(names))]
    return from_arrays(
        np.concatenate([train.x, test.x]),
        np.concatenate([train.y, test.y]),
        np.concatenate([own, dealt]),
        name=train.name,
        seed=rng,
        validation=validation,
        test=np.arange(len(own) + len(dealt)) >= len(own),
        num_classes=len(train.class_names),
        class_names=train.class_names,
        feature_names=train.feature_names,
        notes=(*train.notes, *notes, f"The {len(test.y):,} official test records are dealt to the sites by chance."),
    )
