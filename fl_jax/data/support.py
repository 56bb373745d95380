"""Records of an unseen site by which it may adapt what it is given, apart from those that it is tested by."""

from dataclasses import replace

import numpy as np

from fl_jax.data.federated import FederatedDataset
from fl_jax.data.records import take_records
from fl_jax.errors import FlJaxError


def with_support(
    dataset: FederatedDataset, num_records: int, seed: int | np.random.Generator, *, group: np.ndarray | None = None
) -> FederatedDataset:
    """Sets `num_records` records of each unseen site apart, drawn by `seed`: its support, which is not tested (types.Splits.support).

    num_records: 0 leaves all for testing, and a newcomer deploys what it is given without a look at its own records. group: [R] of the
    unseen records, in their order, such as the patient of each: support is of whole groups then, as many as fit into num_records.
    Raises FlJaxError for a negative number, and where an unseen site would have no record left to test.
    """
    unseen, rng = dataset.unseen, np.random.default_rng(seed)
    if num_records < 0:
        raise FlJaxError(f"num_records is {num_records}: give 0 or more records of each unseen site.")
    if group is not None and len(group) != len(unseen.sites):
        raise FlJaxError(f"There are {len(unseen.sites)} unseen records and {len(group)} groups: give every record one.")
    rows, support = [np.zeros(0, np.int64)], []
    for i, name in enumerate(dataset.unseen_names):
        own = np.arange(unseen.offsets[i], unseen.offsets[i + 1])
        unit = own if group is None else np.unique(np.asarray(group)[own], return_inverse=True)[1]
        sizes = np.bincount(unit - unit.min())
        order = rng.permutation(len(sizes))
        fits = np.cumsum(sizes[order]) <= num_records
        rank = np.empty(len(sizes), np.int64)
        rank[order] = np.arange(len(sizes))
        rows.append(own[np.argsort(rank[unit - unit.min()], kind="stable")])
        support.append(int(sizes[order][fits].sum()))
        if support[-1] == len(own):
            raise FlJaxError(f"The unseen site '{name}' has {len(own)} records, of which {num_records} of support leave none to test: take fewer.")
    note = f"Of each unseen site {num_records} records at most are support, by which it adapts, and are not tested."
    return replace(
        dataset, unseen=take_records(unseen, np.concatenate(rows), unseen.offsets), support=tuple(support), notes=(*dataset.notes, note))
