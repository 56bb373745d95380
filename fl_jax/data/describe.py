"""What is in a federated data set, as a table for the terminal."""

import math
import textwrap

import numpy as np

from fl_jax.data.federated import FederatedDataset
from fl_jax.data.records import Records

_QUANTILES = (("minimum", 0.0), ("10 %", 0.1), ("25 %", 0.25), ("median", 0.5), ("75 %", 0.75), ("90 %", 0.9), ("maximum", 1.0))


def class_counts(records: Records, num_classes: int) -> np.ndarray:
    """How many labels of each class each site holds: int64[N, num_classes]; y may have further axes (pixels of a mask)."""
    num_sites = len(records.offsets) - 1
    if not num_classes:
        return np.zeros((num_sites, 0), np.int64)
    site = np.repeat(records.sites, math.prod(records.y.shape[1:]))
    cell = site * num_classes + records.y.reshape(-1).astype(np.int64)
    return np.bincount(cell, minlength=num_sites * num_classes).reshape(num_sites, num_classes)


def site_class_counts(dataset: FederatedDataset) -> tuple[np.ndarray, np.ndarray]:
    """Labels of each class over all splits: int64[N, K] of the sites, int64[number of unseen sites, K] of the unseen ones."""
    seen = sum(class_counts(r, dataset.num_classes) for r in (dataset.train, dataset.validation, dataset.test))
    return np.asarray(seen), class_counts(dataset.unseen, dataset.num_classes)


def describe(dataset: FederatedDataset, *, max_sites: int = 30, max_classes: int = 6) -> str:
    """A table of the sites: records in each split, classes over all splits, missing values; unseen sites, totals and notes below.

    Up to max_classes classes have a column each with count and share; more are summed up as the number of classes a site
    has and its most frequent one. Beyond max_sites sites the table shows quantiles over sites, and the largest and smallest.
    """
    header = ["site", "train", "validation", "test"]
    sizes = np.stack([dataset.train.sizes, dataset.validation.sizes, dataset.test.sizes], 1)
    unseen_sizes = np.stack([np.zeros_like(dataset.unseen.sizes)] * 2 + [dataset.unseen.sizes], 1)
    counts, unseen_counts = site_class_counts(dataset)
    wide = 0 < dataset.num_classes <= max_classes
    if wide:
        header += [_clip(f"class {name}" if name.isdecimal() else name, 20) for name in dataset.class_names]
    elif dataset.num_classes:
        header += ["classes", "most frequent"]
    has_missing = any(dataset.missing.values())
    header += ["missing"] * has_missing

    def row(name: str, size: np.ndarray, count: np.ndarray, missing: int) -> list[str]:
        cells = [_clip(name, 28), *(_number(n) for n in size)]
        if wide:
            cells += [_with_share(n, count.sum()) for n in count]
        elif dataset.num_classes:
            top = int(count.argmax())
            cells += [f"{np.count_nonzero(count)}", f"{_clip(dataset.class_names[top], 20)} {_share(count[top], count.sum())}"]
        return cells + [_number(missing)] * has_missing

    def site(i: int) -> list[str]:
        return row(dataset.site_names[i], sizes[i], counts[i], dataset.missing.get(dataset.site_names[i], 0))

    total = row("total", sizes.sum(0), counts.sum(0), sum(dataset.missing.get(name, 0) for name in dataset.site_names))
    if dataset.num_sites <= max_sites:
        blocks = [[site(i) for i in range(dataset.num_sites)], [total]]
    else:
        order = np.argsort(-sizes.sum(1), kind="stable")
        blocks = [_quantile_rows(dataset, sizes, counts, wide, has_missing), [site(i) for i in order[:3]]]
        blocks += [[site(i) for i in order[-3:]], [total]]
        header[0] = f"over {dataset.num_sites:,} sites"
    if dataset.unseen_names:
        shown = range(min(len(dataset.unseen_names), max_sites))
        names = dataset.unseen_names
        unseen = [row(f"{names[i]} (unseen)", unseen_sizes[i], unseen_counts[i], dataset.missing.get(names[i], 0)) for i in shown]
        if len(names) > max_sites:
            missing = sum(dataset.missing.get(name, 0) for name in names)
            unseen = unseen[:3] + [row(f"all {len(names):,} unseen", unseen_sizes.sum(0), unseen_counts.sum(0), missing)]
        blocks.append(unseen)
    features = f", {len(dataset.feature_names)} features" if dataset.feature_names else ""
    notes = [line for note in dataset.notes for line in textwrap.wrap(note, 100, subsequent_indent="  ")]
    title = f"{dataset.name}: {_plural(dataset.num_sites, 'site')}, {_plural(len(dataset.unseen_names), 'unseen site')}{features}"
    return "\n".join([title, "", *_table(header, blocks), *([""] if dataset.notes else []), *notes])


def _quantile_rows(
    dataset: FederatedDataset, sizes: np.ndarray, counts: np.ndarray, wide: bool, has_missing: bool
) -> list[list[str]]:
    """A row for each quantile over sites; of classes the quantile of their share (or of how many there are)."""
    labels = np.maximum(counts.sum(1, keepdims=True), 1)
    missing = np.array([dataset.missing.get(name, 0) for name in dataset.site_names])
    rows = []
    for name, q in _QUANTILES:
        cells = [name, *(_number(round(n)) for n in np.quantile(sizes, q, axis=0))]
        if wide:
            cells += [f"{100 * s:.0f} %" for s in np.quantile(counts / labels, q, axis=0)]
        elif dataset.num_classes:
            top = np.quantile((counts / labels).max(1), q)
            cells += [f"{round(np.quantile((counts > 0).sum(1), q))}", f"{100 * top:.0f} %"]
        rows.append(cells + [_number(round(np.quantile(missing, q)))] * has_missing)
    return rows


def _table(header: list[str], blocks: list[list[list[str]]]) -> list[str]:
    """Aligned lines, names to the left and numbers to the right, a rule before each block."""
    cells = [header, *(row for block in blocks for row in block)]
    width = [max(len(row[k]) for row in cells) for k in range(len(header))]

    def line(row: list[str]) -> str:
        return "  ".join([row[0].ljust(width[0]), *(c.rjust(w) for c, w in zip(row[1:], width[1:], strict=True))]).rstrip()

    rule = "─" * (sum(width) + 2 * (len(width) - 1))
    return [line(header), *(text for block in blocks for text in [rule, *map(line, block)])]


def _number(n: int) -> str:
    return f"{n:,}" if n else "-"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:3.0f} %" if whole else "    -"


def _with_share(part: int, whole: int) -> str:
    return f"{_number(part)} {_share(part, whole)}"


def _plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}" if n else f"no {noun}s"


def _clip(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"
