"""Splitting records into train, validation and test: inside every site, stratified by label, and never through a group.

A split keeps two promises: no group (a patient, a family, a device) has records in two splits, also when it visits several sites,
and a site's own units never all go to validation and test. Everything else is as proportional as whole units allow.
"""

import numpy as np
import pandas as pd

from fl_jax.errors import FlJaxError

TRAIN, VALIDATION, TEST = 0, 1, 2


def even_pattern(n: int, validation: float, test: float) -> np.ndarray:
    """A cycle int8[n] of TRAIN, VALIDATION and TEST in which each is spread evenly, so that any stretch is in proportion.

    Counts are the fractions of n, rounded to the nearest; at least one is TRAIN. Each split's k-th member stands at its ideal
    place (k + 1/2) / count (systematic sampling), which keeps every stretch within about one of its proportional count.
    """
    num_test = min(int(test * n + 0.5), n - 1)
    num_validation = min(int(validation * n + 0.5), n - 1 - num_test)
    counts = (n - num_test - num_validation, num_validation, num_test)
    place = np.concatenate([(np.arange(c) + 0.5) / max(c, 1) for c in counts])
    return np.repeat(np.array([TRAIN, VALIDATION, TEST], np.int8), counts)[np.argsort(place, kind="stable")]


def split_records(
    rng: np.random.Generator,
    site: np.ndarray,
    *,
    validation: float,
    test: float,
    label: np.ndarray | None = None,
    group: np.ndarray | None = None,
    test_only: np.ndarray | None = None,
) -> np.ndarray:
    """Draw a split of every site's records: int8[R] of TRAIN, VALIDATION, TEST.

    site: int[R]. validation, test: fractions of a site's units, where a unit is a record, or a group if `group` (any dtype [R])
    is given; the rest trains. label: int[R] to stratify by (a group counts by its most frequent label); None does not stratify.
    All units of a site have the same chance of each split, whatever their label. A group that visits several sites is drawn where
    most of its records are and keeps that split everywhere. test_only: bool[R], records that may not be learned from (their
    groups are seen at a held-out site): all records of their groups become TEST.
    Raises FlJaxError for fractions that are negative or leave nothing to train on, other labels and missing groups (NaN, None).
    """
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise FlJaxError(
            f"The split fractions validation={validation:g} and test={test:g} leave nothing to train on: give numbers that are "
            "not negative and whose sum is below 1."
        )
    if label is not None and not (np.issubdtype(np.asarray(label).dtype, np.integer) and np.min(label, initial=0) >= 0):
        raise FlJaxError("The labels to stratify a split by must be integers from 0: number the strata.")
    if group is not None and (missing := pd.isna(group)).any():
        raise FlJaxError(f"The group of {missing.sum()} records is missing: fill it in, or give each of them a group of its own.")
    num_records = len(site)
    unit = np.arange(num_records) if group is None else np.unique(group, return_inverse=True)[1].reshape(-1)
    num_units = int(unit.max(initial=-1)) + 1
    home = _most_frequent(unit, np.asarray(site), num_units)
    stratum = np.zeros(num_units, np.int64) if label is None else _most_frequent(unit, np.asarray(label, np.int64), num_units)
    barred = np.zeros(num_units, bool)
    if test_only is not None:
        barred[unit[test_only]] = True

    split = np.full(num_units, TEST, np.int8)
    order = np.lexsort((rng.permutation(num_units), stratum, home))  # by site, then label, then chance
    order = order[~barred[order]]
    starts = np.flatnonzero(np.diff(home[order], prepend=-1))
    for units in np.split(order, starts[1:]) if len(order) else []:
        # systematic sampling's random start: without it a rare label would be tested at every small site, or at none
        split[units] = np.roll(even_pattern(len(units), validation, test), rng.integers(len(units)))
    return split[unit]


def _most_frequent(unit: np.ndarray, value: np.ndarray, num_units: int) -> np.ndarray:
    """Each unit's most frequent value (the smallest of several), for integer values that are not negative."""
    base = int(value.max(initial=0)) + 1
    pair, count = np.unique(unit.astype(np.int64) * base + value, return_counts=True)
    best = np.lexsort((-count, pair // base))
    first = np.unique((pair // base)[best], return_index=True)[1]
    result = np.zeros(num_units, np.int64)
    result[(pair // base)[best][first]] = (pair % base)[best][first]
    return result
