"""Bring your own arrays: from NumPy records with a site each to a FederatedDataset with seeded splits."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from fl_jax.data.federated import FederatedDataset
from fl_jax.data.partition import by_column
from fl_jax.data.records import Records, shorten, take_records
from fl_jax.data.split import TEST, TRAIN, VALIDATION, split_records
from fl_jax.errors import FlJaxError
from fl_jax.types import PyTree

_UNSEEN = 3  # beside TRAIN, VALIDATION and TEST


def from_arrays(
    x: PyTree,
    y: PyTree,
    site: Sequence | np.ndarray,
    *,
    name: str = "arrays",
    seed: int | np.random.Generator = 0,
    validation: float = 0.2,
    test: float | np.ndarray = 0.2,
    group: Sequence | np.ndarray | None = None,
    label: np.ndarray | None = None,
    unseen: Sequence[str | int] = (),
    site_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] = (),
    feature_names: Sequence[str] = (),
    missing: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
) -> FederatedDataset:
    """A federated data set from records in NumPy arrays; the splits are drawn by `seed`.

    x, y: arrays (or lists of numbers) or pytrees of them, [R, ...]. site: integer or string [R], the site of each record (a
    natural partition, or the result of one of fl_jax.data.partition); sites are ordered by name. site_names: names for integer
    sites 0, 1, ...
    validation, test: fractions of every site's records for validation and test; where the source says which records are for
    testing, test is bool[R], and validation a fraction of the others. group: [R], e.g. the patient of each record: no group is in
    two splits, nor in training and at an unseen site. unseen: sites to hold out whole.
    num_classes: None finds it for integer y [R] (largest label + 1; bool is 0 and 1); 0 says that y is no class. label: int[R]
    from 0 to stratify the splits by, None for y itself where it is one class per record. Raises FlJaxError for lengths that
    differ, unknown names, missing sites or groups, a group of which only a part is given for testing, and what FederatedDataset
    refuses.
    """
    x, y = (jax.tree.map(np.asarray, tree, is_leaf=lambda node: isinstance(node, list)) for tree in (x, y))
    if isinstance(y, np.ndarray) and y.dtype == bool:
        y = y.astype(np.int32)
    unseen = [unseen] if isinstance(unseen, str) else [str(u) for u in unseen]
    code, names = by_column(site)
    given = None if np.ndim(test) == 0 else np.asarray(test, bool)
    columns = {"x": x, "y": y, "group": code if group is None else np.asarray(group), "test": code if given is None else given}
    columns["label"] = code if label is None else np.asarray(label)
    for path, leaf in jax.tree.leaves_with_path(columns):
        if not leaf.ndim or len(leaf) != len(code):
            raise FlJaxError(
                f"There are {len(code)} sites of records, but {jax.tree_util.keystr(path, simple=True)} has the shape "
                f"{list(leaf.shape)}: give every record one of each."
            )
    if site_names is not None:
        numbers = np.asarray(site)
        if not np.issubdtype(numbers.dtype, np.integer) or numbers.min() < 0 or numbers.max() >= len(site_names):
            raise FlJaxError(f"With {len(site_names)} site_names the sites must be integers from 0 to {len(site_names) - 1}.")
        code, names = numbers.astype(np.int64), tuple(site_names)
    unknown = [u for u in unseen if u not in names]
    if unknown:
        raise FlJaxError(f"'{unknown[0]}' is no site of data set '{name}': hold out some of {shorten(names)}.")
    if set(names) <= set(unseen):
        raise FlJaxError(f"Holding out every site of data set '{name}' leaves nothing to train on: keep one.")

    is_class = isinstance(y, np.ndarray) and np.issubdtype(y.dtype, np.integer)
    if num_classes is None:
        num_classes = len(class_names) or (int(y.max()) + 1 if is_class and y.ndim == 1 else 0)
    if label is None and is_class and y.ndim == 1 and num_classes and y.min() >= 0:
        label = y
    rng = np.random.default_rng(seed)
    held_out = np.isin(code, [names.index(u) for u in unseen])
    free = np.ones(len(code), bool) if given is None else ~given
    if given is not None and group is not None and (both := np.isin(columns["group"], columns["group"][given]) & free).any():
        raise FlJaxError(
            f"Group '{columns['group'][both][0]}' of data set '{name}' has records for testing and others: give all of its "
            "records for testing, or none."
        )
    split = np.full(len(code), TEST, np.int8)
    split[free] = split_records(
        rng,
        code[free],
        validation=validation,
        test=float(test) if given is None else 0.0,
        label=None if label is None else np.asarray(label)[free],
        group=None if group is None else columns["group"][free],
        test_only=held_out[free],
    )
    split[held_out] = _UNSEEN
    seen_names = tuple(n for n in names if n not in unseen)
    unseen_names = tuple(n for n in names if n in unseen)

    def table(which: int, of: tuple[str, ...]) -> Records:
        index = np.full(len(names), len(of))
        index[[names.index(n) for n in of]] = np.arange(len(of))
        rows = np.flatnonzero(split == which)
        rows = rows[np.argsort(index[code[rows]], kind="stable")]
        offsets = np.cumsum(np.bincount(index[code[rows]], minlength=len(of)))
        return take_records(Records(x, y, offsets), rows, np.concatenate([[0], offsets]))

    return FederatedDataset(
        name=name,
        train=table(TRAIN, seen_names),
        validation=table(VALIDATION, seen_names),
        test=table(TEST, seen_names),
        unseen=table(_UNSEEN, unseen_names),
        site_names=seen_names,
        unseen_names=unseen_names,
        num_classes=num_classes,
        class_names=tuple(class_names),
        feature_names=tuple(feature_names),
        missing=dict(missing or {}),
        notes=tuple(notes),
    )
