"""Synthetic(alpha, beta): sites whose labelling and whose features differ by two separate amounts (Li et al. 2020)."""

from typing import NamedTuple

import numpy as np

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
