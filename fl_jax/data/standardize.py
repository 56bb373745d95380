"""Putting features on one scale, with statistics that see training records only.

A federation cannot pool its records, but it can agree on sums over them: `pooled_statistics` needs no more than each site's
number of records, sums and sums of squares (by secure aggregation, nobody sees a single site's). `site_statistics` needs
nothing shared.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from fl_jax.data.federated import FederatedDataset
from fl_jax.data.records import Records
from fl_jax.errors import FlJaxError

Statistics = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(training values float64[R, F], offsets int64[N + 1]) -> (mean, standard deviation), each float64[N + 1, F]: a row for every
site, and a last one for sites that have no training records."""


def pooled_statistics(values: np.ndarray, offsets: np.ndarray, *, ddof: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """One mean and standard deviation for all sites, over all training records; ddof as for numpy.std."""
    num_sites = len(offsets) - 1
    return np.tile(values.mean(0), (num_sites + 1, 1)), np.tile(values.std(0, ddof=ddof), (num_sites + 1, 1))


def site_statistics(values: np.ndarray, offsets: np.ndarray, *, ddof: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Each site's own mean and standard deviation; sites without training records get those over all training records.

    This removes any shift in gain and offset between sites, and what their patients truly differ in along with it. A site of
    one record has its features at 0. ddof as for numpy.std, for sites of more records than that.
    """
    pooled_mean, pooled_deviation = pooled_statistics(values, offsets[[0, -1]], ddof=ddof)
    parts = [values[a:b] for a, b in pairwise(offsets)]
    mean = np.stack([*(part.mean(0) for part in parts), pooled_mean[0]])
    return mean, np.stack([*(part.std(0, ddof=min(ddof, len(part) - 1)) for part in parts), pooled_deviation[0]])


def as_measured(values: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """No standardisation: mean 0 and standard deviation 1."""
    shape = (len(offsets), values.shape[1])
    return np.zeros(shape), np.ones(shape)


def standardize_features(
    dataset: FederatedDataset, statistics: Statistics = pooled_statistics, *, columns: Sequence[int] | np.ndarray | None = None
) -> FederatedDataset:
    """(x - mean) / standard deviation with training statistics in every split; x is one table [R, F], afterwards float32.

    columns: indices of the columns to standardise, None for all. A column that is constant is only centred.
    """
    train = dataset.train.x
    if not isinstance(train, np.ndarray) or train.ndim != 2:
        raise FlJaxError(f"Data set '{dataset.name}' is not one table of features [R, F]: standardise its parts before.")
    chosen = np.zeros(train.shape[1], bool)
    chosen[np.arange(train.shape[1]) if columns is None else np.asarray(columns, np.int64)] = True
    mean, deviation = statistics(train.astype(np.float64), dataset.train.offsets)
    # a constant column's deviation is a rounding error of its value away from 0, not exactly 0
    constant = deviation <= 1e-12 * np.abs(mean)
    mean, deviation = np.where(chosen, mean, 0.0), np.where(chosen & ~constant, deviation, 1.0)

    def scale(records: Records, site: np.ndarray) -> Records:
        return records._replace(x=((records.x - mean[site]) / deviation[site]).astype(np.float32))

    return replace(
        dataset,
        train=scale(dataset.train, dataset.train.sites),
        validation=scale(dataset.validation, dataset.validation.sites),
        test=scale(dataset.test, dataset.test.sites),
        unseen=scale(dataset.unseen, np.full(len(dataset.unseen.x), dataset.num_sites)),
    )
