"""Dealing the records of one data set to sites: seeded partitioners, each of a named form of heterogeneity.

Every partitioner returns the site of every record, int64[R] in [0, num_sites): so each record is at exactly one site by
construction. No site is empty; where that is impossible, or does not come about in `max_draws` attempts, FlJaxError says so.
`rng` is consumed: the same generator state gives the same partition.

Sources: McMahan et al. 2017 (arXiv 1602.05629); Hsu et al. 2019 (arXiv 1909.06335); Yurochkin et al. 2019 (arXiv 1905.12022);
NIID-Bench, Li et al. 2022 (arXiv 2102.02079).
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from fl_jax.errors import FlJaxError


def by_column(values: Sequence[Any] | np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """The natural partition: the site that each record names. Returns (site int64[R], the sites' names).

    values: [R] of integers or strings. Sites are numbered in the order of their names, numbers inside names by value
    ("site 2" before "site 10"). Raises FlJaxError without records, and for records whose site is missing (NaN, None).
    """
    column = np.asarray(values)
    if column.ndim != 1 or not len(column):
        raise FlJaxError(f"A site column must be one value for each record, but has the shape {column.shape}.")
    if (missing := pd.isna(column)).any():
        raise FlJaxError(f"The site of {missing.sum()} records is missing: name it, or leave these records out.")
    names, code = np.unique(column.astype(str), return_inverse=True)
    order = sorted(range(len(names)), key=lambda i: natural_key(str(names[i])))
    rank = np.empty(len(names), np.int64)
    rank[order] = np.arange(len(names))
    return rank[code.reshape(-1)], tuple(str(names[i]) for i in order)


def natural_key(text: str) -> tuple[tuple[bool, float, str], ...]:
    """A sort key under which numbers inside texts are compared by value: -1 < 2 < 10, "site 2" < "site 10"."""
    if re.fullmatch(r"[-+]?\d+(\.\d*)?", text):
        return ((False, float(text), ""),)
    pieces = re.split(r"(\d+)", text)
    return tuple((not p.isdecimal(), float(p) if p.isdecimal() else 0.0, p) for p in pieces)


def iid(rng: np.random.Generator, num_records: int, num_sites: int) -> np.ndarray:
    """Every record to a site by chance, sites of equal size (within one); the IID partition of McMahan et al. 2017, section 3."""
    _check(num_records, num_sites)
    return rng.permutation(np.arange(num_records) % num_sites)


def shards(rng: np.random.Generator, labels: np.ndarray, num_sites: int, shards_per_site: int = 2) -> np.ndarray:
    """Label skew by shards: sort by label, cut into num_sites x shards_per_site equal shards, deal them out.

    McMahan et al. 2017, section 3 ("pathological non-IID": 200 shards of 300, two for each of 100 clients). Records of a label
    are shuffled before the cut. labels: int[R].
    """
    num_shards = num_sites * shards_per_site
    if shards_per_site < 1:
        raise FlJaxError(f"Every site needs at least one shard, but shards_per_site is {shards_per_site}.")
    _check(len(labels), num_sites, shards_per_site)
    order = np.lexsort((rng.permutation(len(labels)), labels))
    owner = rng.permutation(num_shards) // shards_per_site
    site = np.empty(len(labels), np.int64)
    for shard, rows in enumerate(np.array_split(order, num_shards)):
        site[rows] = owner[shard]
    return site


def dirichlet_per_client(rng: np.random.Generator, labels: np.ndarray, num_sites: int, alpha: float) -> np.ndarray:
    """Label skew at equal sizes: every site draws its own mix of classes q ~ Dirichlet(alpha p), p the share of each class.

    Hsu et al. 2019, section 3. alpha -> infinity: every site has the population's mix; alpha -> 0: one class each, as far as it
    lasts. Sites draw without replacement; once a class is used up, q is renormalised over those left, so late sites depart from
    their q, as in the published code. (The *per-class* form, with sites of uneven size, is `dirichlet_per_class`.)
    labels: int[R].
    """
    _check(len(labels), num_sites)
    _check_positive("alpha", alpha)
    classes, code = np.unique(labels, return_inverse=True)
    code = code.reshape(-1)
    pools = [rng.permutation(np.flatnonzero(code == k)) for k in range(len(classes))]
    left = np.array([len(pool) for pool in pools])
    prior = left / left.sum()
    site = np.empty(len(labels), np.int64)
    sizes = np.full(num_sites, len(labels) // num_sites) + (np.arange(num_sites) < len(labels) % num_sites)
    for i, size in enumerate(sizes):
        mix = rng.dirichlet(alpha * prior)
        while size:
            open_mix = np.where(left > 0, mix, 0.0)
            if not open_mix.sum() > 0:  # what is left of q underflowed; renormalised, it is Dirichlet itself (neutrality)
                open_mix[left > 0] = rng.dirichlet(alpha * prior[left > 0])
            taken = np.minimum(rng.multinomial(size, open_mix / open_mix.sum()), left)
            for k in np.flatnonzero(taken):
                site[pools[k][left[k] - taken[k] : left[k]]] = i
            left = left - taken
            size = size - taken.sum()
    return site


def dirichlet_per_class(
    rng: np.random.Generator,
    labels: np.ndarray,
    num_sites: int,
    alpha: float,
    *,
    min_size: int = 10,
    capped: bool = True,
    max_draws: int = 1000,
) -> np.ndarray:
    """Label skew with uneven sizes: every class is dealt to the sites in shares p_k ~ Dirichlet(alpha, ..., alpha).

    Yurochkin et al. 2019 and NIID-Bench's p_k ~ Dir(beta). Drawn anew until every site has
    min_size records (10 in both published codes). capped: a site that has reached R / num_sites records gets no more of the
    classes that follow, as in both published codes, though in neither paper. labels: int[R].
    """
    _check(len(labels), num_sites, min_size)
    _check_positive("alpha", alpha)
    classes, code = np.unique(labels, return_inverse=True)
    pools = [np.flatnonzero(code.reshape(-1) == k) for k in range(len(classes))]

    def draw() -> np.ndarray:
        site = np.empty(len(labels), np.int64)
        size = np.zeros(num_sites, np.int64)
        for pool in pools:
            share = rng.dirichlet(np.full(num_sites, alpha))
            if capped:
                room = size * num_sites < len(labels)
                share = np.where(room, share, 0.0)
                if not share.sum() > 0:  # what is left of it underflowed; renormalised, it is Dirichlet itself (neutrality)
                    share[room] = rng.dirichlet(np.full(room.sum(), alpha))
                share = share / share.sum()
            cuts = (np.cumsum(share)[:-1] * len(pool)).astype(np.int64)
            for i, rows in enumerate(np.split(rng.permutation(pool), cuts)):
                site[rows] = i
                size[i] += len(rows)
        return site

    return _until(draw, num_sites, min_size, max_draws, "a larger alpha, a smaller min_size or fewer sites")


def classes_per_client(
    rng: np.random.Generator, labels: np.ndarray, num_sites: int, num_classes: int, *, max_draws: int = 1000
) -> np.ndarray:
    """Label skew by number: every site holds `num_classes` classes, and a class is divided equally among the sites that hold it.

    NIID-Bench's #C = k. As in its code, the first class of the sites goes round, so that every class has an owner;
    the others are drawn by chance. Drawn anew until no site is empty; a class of fewer records than owners reaches only some of
    them. labels: int[R]. Raises FlJaxError where there are too few places for all classes, or fewer classes than a site should
    hold.
    """
    _check(len(labels), num_sites)
    classes, code = np.unique(labels, return_inverse=True)
    total = len(classes)
    if not 1 <= num_classes <= total:
        raise FlJaxError(f"A site cannot hold {num_classes} classes of {total}: choose from 1 to {total}.")
    if num_sites * num_classes < total:
        raise FlJaxError(
            f"{num_sites} sites of {num_classes} classes leave some of the {total} classes without a site: take more sites or "
            "more classes a site."
        )
    pools = [np.flatnonzero(code.reshape(-1) == k) for k in range(total)]

    def draw() -> np.ndarray:
        deck = rng.permutation(total)
        held: list[set[int]] = [set() for _ in range(num_sites)]
        for t in range(max(num_sites, total)):
            held[t % num_sites].add(int(deck[t % total]))
        for own in held:
            others = [k for k in range(total) if k not in own]
            own.update(rng.choice(others, num_classes - len(own), replace=False).tolist() if len(own) < num_classes else [])
        site = np.empty(len(labels), np.int64)
        for k, pool in enumerate(pools):
            owners = rng.permutation([i for i in range(num_sites) if k in held[i]])
            for i, rows in zip(owners, np.array_split(rng.permutation(pool), len(owners)), strict=True):
                site[rows] = i
        return site

    return _until(draw, num_sites, 1, max_draws, "fewer sites or more classes a site")


def quantity_lognormal(rng: np.random.Generator, num_records: int, num_sites: int, sigma: float) -> np.ndarray:
    """Quantity skew: sizes in proportion to exp(sigma z), z standard normal, records by chance; sigma = 0 is `iid`.

    Every site gets at least one record. The log-normal sizes are those of LEAF-like simulations (Caldas et al. 2018, arXiv
    1812.01097, and the generator of Li et al. 2020, arXiv 1812.06127).
    """
    _check(num_records, num_sites)
    if not (sigma >= 0 and np.isfinite(sigma)):
        raise FlJaxError(f"sigma must be a finite number of at least 0, but is {sigma:g}.")
    z = rng.standard_normal(num_sites)
    return _deal(rng, apportion(np.exp(sigma * (z - z.max())), num_records, minimum=1))


def quantity_dirichlet(
    rng: np.random.Generator, num_records: int, num_sites: int, alpha: float, *, min_size: int = 10, max_draws: int = 1000
) -> np.ndarray:
    """Quantity skew: sizes in shares q ~ Dirichlet(alpha, ..., alpha), records by chance.

    NIID-Bench's q ~ Dir(beta), drawn anew until every site has min_size records (10 in its code).
    """
    _check(num_records, num_sites, min_size)
    _check_positive("alpha", alpha)

    def draw() -> np.ndarray:
        return _deal(rng, apportion(rng.dirichlet(np.full(num_sites, alpha)), num_records))

    return _until(draw, num_sites, min_size, max_draws, "a larger alpha, a smaller min_size or fewer sites")


def case_mix(rng: np.random.Generator, labels: np.ndarray, sizes: np.ndarray, log_odds: np.ndarray) -> np.ndarray:
    """Binary label skew by design: sites of the given sizes whose odds of class 1 differ by exp(log_odds), records of a class by
    chance.

    labels: int[R] of 0 and 1. sizes: int[N] that sum to R. log_odds: float[N], up to a common constant, which is found so that
    every record has a site. Raises FlJaxError for other labels, sizes that do not sum to R, and lengths that differ.
    """
    labels, sizes, log_odds = np.asarray(labels), np.asarray(sizes), np.asarray(log_odds, float)
    if not np.isin(labels, (0, 1)).all() or sizes.shape != log_odds.shape or sizes.sum() != len(labels):
        raise FlJaxError(
            "A case mix needs labels of 0 and 1, and a size and log-odds for each site, the sizes summing up to the records.")
    cases = _cases(sizes, log_odds, int(labels.sum()))
    site = np.empty(len(labels), np.int64)
    for label, counts in ((1, cases), (0, sizes - cases)):
        site[rng.permutation(np.flatnonzero(labels == label))] = np.repeat(np.arange(len(sizes)), counts)
    return site


def spread_log_odds(strength: float, num_sites: int) -> np.ndarray:
    """Log-odds float64[N] spread evenly over +- strength, the first sites the least and the last ones the most extreme."""
    spread = np.linspace(-strength, strength, num_sites) if num_sites > 1 else np.zeros(num_sites)
    return spread[np.argsort(np.abs(spread), kind="stable")]


def apportion(shares: np.ndarray, total: int, *, minimum: int = 0) -> np.ndarray:
    """Whole numbers int64[N] that sum to `total`, in proportion to `shares` (largest remainders), each at least `minimum`."""
    shares = np.asarray(shares, float) / np.sum(shares)
    exact, bound = total * shares, np.zeros(len(shares), bool)
    # proportional where the minimum does not bind, so that it distorts only those that need it
    while (low := (exact < minimum)).any():
        bound |= low
        free = total - minimum * bound.sum()
        exact = np.where(bound, minimum, free * shares / max(shares[~bound].sum(), np.finfo(float).tiny))
    whole = np.floor(exact).astype(np.int64)
    largest = np.argsort(-(exact - whole), kind="stable")[: total - whole.sum()]
    whole[largest] += 1
    return whole


def _cases(sizes: np.ndarray, log_odds: np.ndarray, total: int) -> np.ndarray:
    """How many of each site's records are of class 1, int64, so that they sum to `total` and odds differ by `log_odds`.

    The common intercept is found by bisection: the expected number of cases grows with it.
    """
    low, high = -50.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        expected = sizes / (1 + np.exp(-(middle + log_odds)))
        low, high = (middle, high) if expected.sum() < total else (low, middle)
    return apportion(expected, total)


def _deal(rng: np.random.Generator, sizes: np.ndarray) -> np.ndarray:
    return rng.permutation(np.repeat(np.arange(len(sizes)), sizes))


def _until(draw: Callable[[], np.ndarray], num_sites: int, min_size: int, max_draws: int, remedy: str) -> np.ndarray:
    """Draw partitions until every site has min_size records."""
    for _ in range(max_draws):
        site = draw()
        if np.bincount(site, minlength=num_sites).min() >= max(min_size, 1):
            return site
    raise FlJaxError(
        f"In {max_draws} draws there was always one of the {num_sites} sites with fewer than {max(min_size, 1)} records: "
        f"take {remedy}."
    )


def _check(num_records: int, num_sites: int, min_size: int = 1) -> None:
    if num_sites < 1:
        raise FlJaxError(f"A partition needs at least one site, but num_sites is {num_sites}.")
    if num_sites * max(min_size, 1) > num_records:
        each = f" of at least {min_size}" if min_size > 1 else ""
        raise FlJaxError(f"{num_records} records cannot fill {num_sites} sites{each}: take fewer sites or more records.")


def _check_positive(name: str, value: float) -> None:
    if not (value > 0 and np.isfinite(value)):
        raise FlJaxError(f"{name} must be a positive finite number, but is {value:g}.")
