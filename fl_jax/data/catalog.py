"""The published data sets that fl_jax knows by name."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fl_jax.data import prepared
from fl_jax.data.federated import FederatedDataset
from fl_jax.data.published import Published
from fl_jax.data.source import Source, from_sources
from fl_jax.data.sources.heart_disease import HEART_DISEASE, fed_heart_disease
from fl_jax.data.sources.idx_images import FASHION_MNIST, MNIST, fashion_mnist, mnist
from fl_jax.data.sources.pneumonia_mnist import PNEUMONIA_MNIST, pneumonia_mnist
from fl_jax.data.sources.tcga_brca import TCGA_BRCA, fed_tcga_brca
from fl_jax.errors import FlJaxError


class Entry(NamedTuple):
    """A data set and the federation that it is without further choices: (data_dir) -> FederatedDataset, at one site if it has none."""

    published: Published
    federation: Callable[[str | Path | None], FederatedDataset]


def _one_site(source: Callable[..., Source], validation: str | None = None) -> Callable[[str | Path | None], FederatedDataset]:
    def federation(data_dir: str | Path | None) -> FederatedDataset:
        train, test = (source(split, data_dir=data_dir) for split in ("train", "test"))
        official = 0.0 if validation is None else source(validation, data_dir=data_dir)
        return from_sources(train, np.full(len(train.y), "all images"), test=test, validation=official)

    return federation


CATALOG: dict[str, Entry] = {
    entry.published.name: entry
    for entry in (
        Entry(HEART_DISEASE, lambda data_dir: fed_heart_disease(data_dir=data_dir)),
        Entry(TCGA_BRCA, lambda data_dir: fed_tcga_brca(data_dir=data_dir)),
        Entry(MNIST, _one_site(mnist)),
        Entry(FASHION_MNIST, _one_site(fashion_mnist)),
        Entry(PNEUMONIA_MNIST, _one_site(pneumonia_mnist, "validation")),
    )
}


def published(name: str) -> Published:
    """The data set of this name. Raises FlJaxError, with the names that there are, for any other."""
    if name not in CATALOG:
        close = difflib.get_close_matches(name, CATALOG, n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'?" if close else f"choose one of {', '.join(CATALOG)}."
        raise FlJaxError(f"'{name}' is no data set that fl_jax knows: {hint}")
    return CATALOG[name].published


def ensure_prepared(name: str, data_dir: str | Path | None = None) -> Path:
    """Make sure that a published data set is prepared, from the raw files in FL_JAX_RAW if need be; returns its folder.

    Downloads nothing. data_dir: default TFDS_DATA_DIR, else ~/tensorflow_datasets. Raises DataMissing where the data are not on this
    machine, so that who needs them can be reported as not run, and FlJaxError for an unknown name and for raw files that are not the published ones.
    """
    return prepared.ensure(published(name), data_dir)
