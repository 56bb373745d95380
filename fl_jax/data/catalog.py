"""The published data sets that fl_jax knows by name."""

import difflib
from pathlib import Path

from fl_jax.data import prepared
from fl_jax.data.published import Published
from fl_jax.data.sources.heart_disease import HEART_DISEASE
from fl_jax.data.sources.idx_images import FASHION_MNIST, MNIST
from fl_jax.data.sources.tcga_brca import TCGA_BRCA
from fl_jax.errors import FlJaxError

CATALOG: dict[str, Published] = {p.name: p for p in (HEART_DISEASE, TCGA_BRCA, MNIST, FASHION_MNIST)}


def published(name: str) -> Published:
    """The data set of this name. Raises FlJaxError, with the names that there are, for any other."""
    if name not in CATALOG:
        close = difflib.get_close_matches(name, CATALOG, n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'?" if close else f"choose one of {', '.join(CATALOG)}."
        raise FlJaxError(f"'{name}' is no data set that fl_jax knows: {hint}")
    return CATALOG[name]


def ensure_prepared(name: str, data_dir: str | Path | None = None) -> Path:
    """Make sure that a published data set is prepared, from the raw files in FL_JAX_RAW if need be; returns its folder.

    Downloads nothing. data_dir: default TFDS_DATA_DIR, else ~/tensorflow_datasets. Raises DataMissing where the data are not on this
    machine, so that who needs them can be reported as not run, and FlJaxError for an unknown name and for raw files that are not the published ones.
    """
    return prepared.ensure(published(name), data_dir)
