"""Federated data sets: the type, ways to get one (arrays, CSV, partitions, simulated hospitals), and what is in it."""

from fl_jax.data.arrays import from_arrays
from fl_jax.data.catalog import ensure_prepared
from fl_jax.data.csv_table import parse_csv
from fl_jax.data.describe import class_counts, describe, site_class_counts
from fl_jax.data.federated import FederatedDataset, as_one_site, hold_out, pooled_train, stack
from fl_jax.data.hospitals import simulated_hospitals
from fl_jax.data.leaf import read_leaf
from fl_jax.data.partition import (
    by_column,
    case_mix,
    classes_per_client,
    dirichlet_per_class,
    dirichlet_per_client,
    iid,
    quantity_dirichlet,
    quantity_lognormal,
    shards,
)
from fl_jax.data.plots import label_distribution
from fl_jax.data.prepared import DataMissing
from fl_jax.data.records import Records, no_records
from fl_jax.data.shift import Calibration, calibrate, draw_calibration, shift_features
from fl_jax.data.sklearn_sources import breast_cancer, digits
from fl_jax.data.source import Source, from_sources
from fl_jax.data.sources.heart_disease import fed_heart_disease
from fl_jax.data.sources.idx_images import fashion_mnist, mnist
from fl_jax.data.sources.pneumonia_mnist import pneumonia_mnist
from fl_jax.data.sources.tcga_brca import fed_tcga_brca
from fl_jax.data.split import split_records
from fl_jax.data.standardize import (
    as_measured,
    pooled_statistics,
    site_statistics,
    standardize_features,
)
from fl_jax.data.support import with_support
from fl_jax.data.synthetic import fedprox_iid, fedprox_synthetic
from fl_jax.data.tabular import Table, read_csv, read_table
from fl_jax.data.tfds_source import tfds_source

__all__ = [
    "Calibration",
    "DataMissing",
    "FederatedDataset",
    "Records",
    "Source",
    "Table",
    "as_measured",
    "as_one_site",
    "breast_cancer",
    "by_column",
    "calibrate",
    "case_mix",
    "class_counts",
    "classes_per_client",
    "describe",
    "digits",
    "dirichlet_per_class",
    "dirichlet_per_client",
    "draw_calibration",
    "ensure_prepared",
    "fashion_mnist",
    "fed_heart_disease",
    "fed_tcga_brca",
    "fedprox_iid",
    "fedprox_synthetic",
    "from_arrays",
    "from_sources",
    "hold_out",
    "iid",
    "label_distribution",
    "mnist",
    "no_records",
    "parse_csv",
    "pneumonia_mnist",
    "pooled_statistics",
    "pooled_train",
    "quantity_dirichlet",
    "quantity_lognormal",
    "read_csv",
    "read_leaf",
    "read_table",
    "shards",
    "shift_features",
    "simulated_hospitals",
    "site_class_counts",
    "site_statistics",
    "split_records",
    "stack",
    "standardize_features",
    "tfds_source",
    "with_support",
]
