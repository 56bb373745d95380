"""Flat tables of records, site after site, in NumPy, and the checks that find what is wrong with one."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from fl_jax.errors import FlJaxError
from fl_jax.types import PyTree


class Records(NamedTuple):
    """The records of N sites: x, y pytrees of [R, ...]; offsets int64[N + 1], site i owns rows offsets[i] : offsets[i + 1]."""

    x: PyTree
    y: PyTree
    offsets: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """How many records each site holds: int64[N]."""
        return np.diff(self.offsets)

    @property
    def sites(self) -> np.ndarray:
        """The site of every record: int64[R]."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.sizes)


def take_records(records: Records, rows: np.ndarray, offsets: Sequence[int] | np.ndarray) -> Records:
    """The given rows as a new table with the given offsets."""
    x, y = jax.tree.map(lambda leaf: leaf[rows], (records.x, records.y))
    return Records(x, y, np.asarray(offsets, np.int64))


def no_records(like: Records, num_sites: int = 0) -> Records:
    """A table whose (missing) records look like those of `like`, at so many sites: of none, what `unseen` is where no site is held out."""
    return take_records(like, np.zeros(0, np.int64), np.zeros(num_sites + 1, np.int64))


def sites_of(records: Records, sites: Sequence[int]) -> Records:
    """The table of some of the sites, in the given order."""
    rows = [np.arange(records.offsets[i], records.offsets[i + 1]) for i in sites]
    return take_records(records, np.concatenate([*rows, np.zeros(0, np.int64)]), np.cumsum([0, *(len(r) for r in rows)]))


def signature(records: Records) -> tuple[PyTree, list[str]]:
    """What tables must share to be stacked or joined: the pytrees' structure, and dtype and trailing shape of every leaf."""
    leaves, structure = jax.tree.flatten((records.x, records.y))
    return structure, [f"{leaf.dtype}{list(leaf.shape[1:])}" for leaf in leaves]


def shorten(names: Sequence[str], limit: int = 8) -> str:
    """Names as text for a message: the first few, and how many more there are."""
    head = ", ".join(f"'{name}'" for name in names[:limit])
    return head if len(names) <= limit else f"{head} and {len(names) - limit} more"


def check_offsets(what: str, records: Records, names: Sequence[str], *, may_be_empty: bool) -> None:
    """Raise FlJaxError unless x, y and offsets fit together and, unless they may be empty, all the named sites have records."""
    leaves = jax.tree.leaves((records.x, records.y))
    lengths = {len(leaf) if isinstance(leaf, np.ndarray) and leaf.ndim else -1 for leaf in leaves}
    if len(lengths) != 1 or -1 in lengths:
        found = ", ".join(str(np.shape(leaf)) for leaf in leaves)
        raise FlJaxError(f"The {what} need NumPy arrays of one length in x and y, but have the shapes {found}.")
    offsets, total = records.offsets, lengths.pop()
    if len(offsets) != len(names) + 1:
        raise FlJaxError(f"The {what} have {len(offsets)} offsets for {len(names)} sites: give one more than there are sites.")
    if offsets[0] != 0 or offsets[-1] != total or (np.diff(offsets) < 0).any():
        raise FlJaxError(f"The offsets of the {what} must start at 0, never decrease and end at the number of records, {total}.")
    if not may_be_empty and (empty := np.flatnonzero(records.sizes == 0)).size:
        raise FlJaxError(f"Site '{names[empty[0]]}' has none of the {what}: give it some, or leave the site out.")


def check_features(what: str, records: Records, names: Sequence[str], feature_names: Sequence[str]) -> None:
    """Raise FlJaxError unless x is finite numbers (the first site that is wrong is named, its worst feature and the count)."""
    for path, leaf in jax.tree.leaves_with_path(records.x):
        where = f"x{jax.tree_util.keystr(path)}"
        if not (np.issubdtype(leaf.dtype, np.number) or leaf.dtype == bool):
            raise FlJaxError(f"The features of the {what} must be numbers, but {where} is {leaf.dtype}: convert them.")
        if feature_names and (leaf.ndim != 2 or leaf.shape[1] != len(feature_names)):
            raise FlJaxError(
                f"There are {len(feature_names)} feature names, but {where} of the {what} has the shape {list(leaf.shape)}: name "
                "every column of one table, or none."
            )
        bad = ~np.isfinite(leaf)
        if bad.any():
            site = int(records.sites[np.flatnonzero(bad.reshape(len(bad), -1).any(1))[0]])
            counts = bad[records.offsets[site] : records.offsets[site + 1]].reshape(int(records.sizes[site]), -1).sum(0)
            column = int(counts.argmax())
            feature = feature_names[column] if feature_names else f"{where}, element {column}"
            raise FlJaxError(
                f"Site '{names[site]}' has {counts[column]} values of feature '{feature}' that are NaN or infinite in the {what}"
                ": impute them or drop the records."
            )


def check_labels(what: str, records: Records, names: Sequence[str], num_classes: int) -> None:
    """Raise FlJaxError unless y is finite numbers and, with num_classes > 0, one integer array of 0 ... num_classes - 1."""
    y = records.y
    for leaf in jax.tree.leaves(y):
        if not (np.issubdtype(leaf.dtype, np.number) or leaf.dtype == bool):
            raise FlJaxError(f"The labels of the {what} must be numbers, but are {leaf.dtype}: number the classes from 0.")
    if any(np.issubdtype(leaf.dtype, np.floating) and not np.isfinite(leaf).all() for leaf in jax.tree.leaves(y)):
        raise FlJaxError(f"The labels of the {what} are not all finite: drop the records whose y is NaN or infinite.")
    if not num_classes:
        return
    if not isinstance(y, np.ndarray) or not np.issubdtype(y.dtype, np.integer):
        raise FlJaxError(f"The labels of the {what} must be one integer array, or num_classes 0 if they are no classes.")
    bad = (y < 0) | (y >= num_classes)
    if bad.any():
        site = names[records.sites[np.argwhere(bad)[0, 0]]]
        raise FlJaxError(
            f"Site '{site}' has the label {y[bad][0]} in the {what}, but labels go from 0 to {num_classes - 1}: renumber them or "
            "set num_classes."
        )
