"""Synthetic(alpha, beta): sites whose labelling and whose features differ by two separate amounts (Li et al. 2020)."""

from typing import NamedTuple

import numpy as np

from fl_jax.data.arrays import from_arrays
from fl_jax.data.federated import FederatedDataset
from fl_jax.errors import FlJaxError

FEATURES = 60
CLASSES = 10
SHRINK = -1.2  # the variance of feature j (from 1) is j ** SHRINK


class Synthetic(NamedTuple):
    """Records in the order of their sites. x: float32[R, 60]. y: int32[R] in [0, 10). site: int64[R]."""

    x: np.ndarray
    y: np.ndarray
    site: np.ndarray


def synthetic_sizes(rng: np.random.Generator, num_sites: int = 30, *, largest: int | None = None) -> np.ndarray:
    """Records per site as in the published generator: int(lognormal(4, 2)) + 50, heavy tailed; int64[N].

    largest: a cap on them, since one site in a hundred would hold more than 5,000 otherwise.
    """
    sizes = rng.lognormal(4.0, 2.0, num_sites).astype(np.int64) + 50
    return sizes if largest is None else np.minimum(sizes, largest)


def synthetic(rng: np.random.Generator, alpha: float, beta: float, sizes: np.ndarray, *, iid: bool = False) -> Synthetic:
    """Synthetic(alpha, beta) of Li et al. 2020, "Federated optimization in heterogeneous networks" (arXiv 1812.06127), section 5.1.

    Site k: y = argmax softmax(W_k x + b_k), entries of W_k and b_k ~ N(u_k, 1), u_k ~ N(0, alpha^2); x ~ N(v_k, diag(j ** -1.2)),
    entries of v_k ~ N(B_k, 1), B_k ~ N(0, beta^2). alpha: how much the sites' labelling differs; beta: how much their features do.
    As in the published code both are standard deviations, while the paper writes N(0, alpha) and N(0, beta); for 0 and 1 that is the
    same. sizes: int[N], records per site (`synthetic_sizes`). iid: one W and b ~ N(0, 1) for all sites, and v_k = B_k, as that code has
    it. Raises FlJaxError for a negative alpha or beta and a site without records.
    """
    if not (alpha >= 0 and beta >= 0):
        raise FlJaxError(f"alpha and beta are standard deviations and must not be negative, but are {alpha:g} and {beta:g}.")
    if len(sizes) == 0 or np.min(sizes) < 1:
        raise FlJaxError("Every site of a synthetic federation needs at least one record.")
    num_sites = len(sizes)
    label_mean = rng.normal(0.0, alpha, num_sites)
    feature_mean = rng.normal(0.0, beta, num_sites)
    deviation = np.arange(1, FEATURES + 1) ** (SHRINK / 2)
    common = rng.normal(size=(FEATURES, CLASSES)), rng.normal(size=CLASSES)
    x, y = [], []
    for size, u, v in zip(sizes, label_mean, feature_mean, strict=True):
        kernel, bias = common if iid else (rng.normal(u, 1.0, (FEATURES, CLASSES)), rng.normal(u, 1.0, CLASSES))
        center = np.full(FEATURES, v) if iid else rng.normal(v, 1.0, FEATURES)
        features = center + deviation * rng.normal(size=(int(size), FEATURES))
        x.append(features.astype(np.float32))
        y.append(np.argmax(features @ kernel + bias, axis=1).astype(np.int32))
    return Synthetic(np.concatenate(x), np.concatenate(y), np.repeat(np.arange(num_sites), sizes))


def fedprox_synthetic(
    seed: int, alpha: float, beta: float, *, num_sites: int = 30, validation: float = 0.0, largest: int | None = None
) -> FederatedDataset:
    """FedProx's Synthetic(alpha, beta) as its published code makes it: x float32[R, 60], y int32[R], 10 classes, 30 devices.

    Sizes are `synthetic_sizes`, records `synthetic`; of each device's n records, in an order drawn by chance, int(.9 n) train and the
    others test. seed draws everything (the published generator takes none: its own draw is not among these). validation: a fraction of each
    device's training records. largest: a cap on the records of a device, which the published code has not.
    """
    return _published(seed, alpha, beta, False, num_sites, validation, largest)


def fedprox_iid(seed: int, *, num_sites: int = 30, validation: float = 0.0, largest: int | None = None) -> FederatedDataset:
    """FedProx's Synthetic-IID: one labelling W, b ~ N(0, 1) and x ~ N(0, diag(j ** -1.2)) for all devices; else `fedprox_synthetic`."""
    return _published(seed, 0.0, 0.0, True, num_sites, validation, largest)


def _published(
    seed: int, alpha: float, beta: float, iid: bool, num_sites: int, validation: float, largest: int | None
) -> FederatedDataset:
    rng = np.random.default_rng(seed)
    sizes = synthetic_sizes(rng, num_sites, largest=largest)
    x, y, site = synthetic(rng, alpha, beta, sizes, iid=iid)
    # the generator draws the records of a device alike, so a shuffle is one of which of them test
    rank = np.concatenate([rng.permutation(size) for size in sizes])
    name = "Synthetic-IID" if iid else f"Synthetic({alpha:g}, {beta:g})"
    return from_arrays(
        x,
        y,
        site,
        name=name,
        seed=rng,
        validation=validation,
        test=rank >= (0.9 * sizes).astype(np.int64)[site],
        site_names=[f"device {k:0{len(str(num_sites - 1))}d}" for k in range(num_sites)],
        num_classes=CLASSES,
        notes=(f"Simulated: everything, as by the published code of FedProx (arXiv 1812.06127); {name}, seed {seed}.",),
    )
