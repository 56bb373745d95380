"""The data set of a federation on the host: sites, splits, names and an account of what is real and what is simulated.

Records lie in flat tables, site after site, as `fl_jax.types.Sites` holds them on the device, not padded to the largest site.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from fl_jax.data.records import (
    Records,
    check_features,
    check_labels,
    check_offsets,
    shorten,
    signature,
    sites_of,
)
from fl_jax.errors import FlJaxError
from fl_jax.types import Sites, Splits

OVER_SITES = ("all", "mean", "worst", "std")
"""What stands in place of a site's name where a number is of several: records pooled, and mean, worst and spread over sites."""


@dataclass(frozen=True, eq=False)
class FederatedDataset:
    """N sites with training, validation and test records, and held-out sites (`unseen`) whose records are all for testing.

    train, validation, test: Records of the same N sites. A site must have training records; validation and test may be empty.
    unseen: Records of the held-out sites; a table of 0 sites if there are none.
    num_classes: classes of y, an integer array [R, ...]; 0 where y is no class (times and events, real numbers, a pytree).
    class_names: num_classes names, "0", "1", ... if not given. feature_names: one for each column of x, or ().
    missing: site name -> values that were missing before imputation; a site that is not named has none.
    notes: lines that say what is real and what is simulated, and what was done to the records.
    support: of each unseen site, how many of its records, the first ones, are not for testing but for adapting (`with_support`); () for
    sites that have none and are given models of other sites, see fl_jax.evaluation.

    Raises FlJaxError on construction for the first of: names and tables that do not fit together, offsets that do not increase
    to R, a site without records, features that are NaN or infinite, labels out of range.
    """

    name: str
    train: Records
    validation: Records
    test: Records
    unseen: Records
    site_names: tuple[str, ...]
    unseen_names: tuple[str, ...] = ()
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    feature_names: tuple[str, ...] = ()
    missing: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    support: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.class_names:
            object.__setattr__(self, "class_names", tuple(str(k) for k in range(self.num_classes)))
        _check_names(self)
        _check_support(self)
        for split, records, names in self._tables():
            what = f"{split} records of data set '{self.name}'"
            check_offsets(what, records, names, may_be_empty=split in ("validation", "test"))
            if signature(records) != signature(self.train):
                raise FlJaxError(
                    f"The {what} look different from the training records, {signature(records)[1]} against "
                    f"{signature(self.train)[1]}: give all splits the same structure, shapes and dtypes."
                )
            check_features(what, records, names, self.feature_names)
            check_labels(what, records, names, self.num_classes)

    def _tables(self) -> tuple[tuple[str, Records, tuple[str, ...]], ...]:
        return (
            ("training", self.train, self.site_names),
            ("validation", self.validation, self.site_names),
            ("test", self.test, self.site_names),
            ("unseen", self.unseen, self.unseen_names),
        )

    @property
    def num_sites(self) -> int:
        """The number of sites that take part in training."""
        return len(self.site_names)

    def device(self) -> Splits:
        """The same records as device arrays, leaves [R, ...], offset and size int32[N].

        A table without records keeps one row of zeros that no site owns, so that a gather from it is legal.
        """
        return _with_support(jax.tree.map(jnp.array, _padded(self, _lengths([self]))), jnp.array(self.support, jnp.int32))

    def pooled(self) -> "FederatedDataset":
        """The data set as if it had never been distributed: one site, "pooled", in every split; unseen sites stay as they are."""

        def join(records: Records) -> Records:
            return records._replace(offsets=records.offsets[[0, -1]])

        seen = sum(self.missing.get(name, 0) for name in self.site_names)
        return replace(
            self,
            train=join(self.train),
            validation=join(self.validation),
            test=join(self.test),
            site_names=("pooled",),
            missing={name: self.missing.get(name, 0) for name in self.unseen_names} | {"pooled": seen},
        )


def stack(datasets: Sequence[FederatedDataset]) -> Splits:
    """Several draws of one federation (seeds, left-out sites) as one Splits with a leading axis: for `vmap` over a study.

    Tables are padded with zeros, at the end, to the longest draw. Raises FlJaxError where the numbers of sites, features or
    dtypes differ.
    """
    if not datasets:
        raise FlJaxError("There is nothing to stack: give at least one data set.")
    first = datasets[0]
    for other in datasets[1:]:
        if (first.num_sites, len(first.unseen_names)) != (other.num_sites, len(other.unseen_names)):
            raise FlJaxError(
                f"Data sets to stack need equal numbers of sites, but '{first.name}' has {first.num_sites} and "
                f"{len(first.unseen_names)} unseen ones and '{other.name}' has {other.num_sites} and {len(other.unseen_names)}."
            )
        if signature(first.train) != signature(other.train):
            raise FlJaxError(
                f"Data sets to stack need records of one shape and dtype, but '{first.name}' has {signature(first.train)[1]} "
                f"and '{other.name}' has {signature(other.train)[1]}."
            )
        if bool(first.support) != bool(other.support):
            raise FlJaxError("Data sets to stack must all have support at their unseen sites, or none: call with_support on each.")
    lengths = _lengths(datasets)
    splits = jax.tree.map(lambda *leaves: jnp.array(np.stack(leaves)), *(_padded(dataset, lengths) for dataset in datasets))
    return _with_support(splits, jnp.array([dataset.support for dataset in datasets], jnp.int32))


def pooled_train(splits: Splits) -> Splits:
    """The centralized baseline: all training records at one site, while validation, test and unseen stay with their sites.

    Works on a single and on a stacked Splits, inside `jit` and `vmap`: records lie one site after another and padding at the end.
    """
    return splits._replace(train=as_one_site(splits.train))


def as_one_site(sites: Sites) -> Sites:
    """All records of a split, single or stacked, as those of one site."""
    size = jnp.sum(sites.size, axis=-1, keepdims=True, dtype=jnp.int32)
    return sites._replace(offset=sites.offset[..., :1], size=size)


def hold_out(dataset: FederatedDataset, names: Sequence[str]) -> FederatedDataset:
    """Move whole sites to `unseen`, with all their training, validation and test records.

    What was computed from these sites' training records before (standardisation, imputation), and groups that also visit
    other sites, keep their traces: sources with an `unseen` argument leave none. Raises FlJaxError for names that are not sites,
    where no site would be left, and where unseen sites have support already.
    """
    if dataset.support:
        raise FlJaxError("Hold sites out first, and then draw the support of all unseen sites (with_support).")
    names = [names] if isinstance(names, str) else names
    unknown = [name for name in names if name not in dataset.site_names]
    if unknown:
        raise FlJaxError(
            f"'{unknown[0]}' is no site of data set '{dataset.name}': hold out some of {shorten(dataset.site_names)}."
        )
    moved = [i for i, name in enumerate(dataset.site_names) if name in names]
    kept = [i for i in range(dataset.num_sites) if i not in set(moved)]
    if not kept:
        raise FlJaxError(f"Holding out every site of data set '{dataset.name}' leaves nothing to train on: keep one.")
    splits = (dataset.train, dataset.validation, dataset.test)
    parts = [sites_of(records, [i]) for i in moved for records in splits]
    tables = [dataset.unseen, *parts] if parts else [dataset.unseen]
    x, y = jax.tree.map(lambda *leaves: np.concatenate(leaves), *((t.x, t.y) for t in tables))
    sizes = [*dataset.unseen.sizes, *(sum(int(records.sizes[i]) for records in splits) for i in moved)]
    train, validation, test = (sites_of(records, kept) for records in splits)
    return replace(
        dataset,
        train=train,
        validation=validation,
        test=test,
        unseen=Records(x, y, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)),
        site_names=tuple(dataset.site_names[i] for i in kept),
        unseen_names=(*dataset.unseen_names, *(dataset.site_names[i] for i in moved)),
    )


def _with_support(splits: Splits, size: jax.Array) -> Splits:
    """The splits with the first records of each unseen site as its support, in the same table. size: int32[..., U], or no elements."""
    if not size.size:
        return splits
    whole = splits.unseen
    return splits._replace(unseen=whole._replace(offset=whole.offset + size, size=whole.size - size), support=whole._replace(size=size))


def _lengths(datasets: Sequence[FederatedDataset]) -> tuple[int, ...]:
    """Rows of each padded table: the longest draw's, at least one."""
    tables = ([d.train, d.validation, d.test, d.unseen] for d in datasets)
    return tuple(max(1, *(int(r.offsets[-1]) for r in draws)) for draws in zip(*tables, strict=True))


def _padded(dataset: FederatedDataset, lengths: tuple[int, ...]) -> Splits:
    tables = (dataset.train, dataset.validation, dataset.test, dataset.unseen)
    return Splits(*(_padded_sites(dataset.name, records, length) for records, length in zip(tables, lengths, strict=True)))


def _padded_sites(name: str, records: Records, length: int) -> Sites:
    if length > np.iinfo(np.int32).max:
        raise FlJaxError(f"Data set '{name}' has a table of {length} records, more than int32 offsets can address: split it.")

    def pad(leaf: np.ndarray) -> np.ndarray:
        return np.pad(leaf, [(0, length - len(leaf))] + [(0, 0)] * (leaf.ndim - 1))

    x, y = jax.tree.map(pad, (records.x, records.y))
    offset, size = records.offsets[:-1].astype(np.int32), records.sizes.astype(np.int32)
    return Sites(x, y, offset, size)  # type: ignore[arg-type]  # NumPy until device() or stack() moves it


def _check_support(data: FederatedDataset) -> None:
    sizes = data.unseen.sizes
    if data.support and (len(data.support) != len(sizes) or not all(0 <= k < n for k, n in zip(data.support, sizes, strict=True))):
        raise FlJaxError(f"The support of data set '{data.name}' must be a number for each unseen site, below that of its records: draw it "
                         "with with_support.")


def _check_names(data: FederatedDataset) -> None:
    names = [*data.site_names, *data.unseen_names]
    if not data.site_names:
        raise FlJaxError(f"Data set '{data.name}' has no site: give at least one.")
    wrong = [name for name in names if not name.strip() or len(name.splitlines()) > 1 or name in OVER_SITES]
    if wrong:
        raise FlJaxError(
            f"Data set '{data.name}' has a site named {wrong[0]!r}: a name is one line that is not empty and none of "
            f"{shorten(OVER_SITES)}, which results call numbers of several sites."
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise FlJaxError(f"Data set '{data.name}' has two sites named '{twice}': give every site, unseen ones too, its own name.")
    if len(data.class_names) != data.num_classes:
        raise FlJaxError(f"Data set '{data.name}' has {data.num_classes} classes but {len(data.class_names)} class names.")
    stray = [name for name in data.missing if name not in names]
    if stray:
        raise FlJaxError(f"Data set '{data.name}' counts missing values of '{stray[0]}', which is none of its sites.")
