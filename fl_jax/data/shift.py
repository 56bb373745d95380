"""Feature shift between sites: a simulated measurement calibration, x' = gain x + offset + noise.

What a scanner, an assay or a microphone does to the same patient at another site. Labels do not change: p(x) differs between
sites, p(y) does not (Kairouz et al. 2021, arXiv 1912.04977, section 3.1, call it covariate shift). In the noise-based feature
skew of Li et al. 2022 (NIID-Bench, arXiv 2102.02079) the noise grows with the site: site i = 0 ... N - 1 of its published code has
`Calibration(gain=1, offset=0, noise=sigma i / (N - 1))`, whereas the paper writes a variance of sigma i / N.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np

from fl_jax.data.federated import FederatedDataset
from fl_jax.data.records import Records
from fl_jax.errors import FlJaxError
from fl_jax.types import PyTree


class Calibration(NamedTuple):
    """How each of N sites measures: gain (no unit), offset and noise (standard deviation; both in the features' units).

    Each float64[N, *shape], where shape broadcasts against the last axes of one record: (F,) for a table of F features, () for
    one parameter a site, (1, 1, C) for the channels of an image.
    """

    gain: np.ndarray
    offset: np.ndarray
    noise: np.ndarray


def draw_calibration(
    rng: np.random.Generator,
    num_sites: int,
    *,
    gain: float | np.ndarray = 0.0,
    offset: float | np.ndarray = 0.0,
    noise: float | np.ndarray = 0.0,
    scale: float | np.ndarray = 1.0,
    groups: Sequence[int] | np.ndarray | None = None,
) -> Calibration:
    """Draw every site's calibration: gain = exp(N(0, gain^2)), offset = scale N(0, offset^2), noise = scale x noise.

    gain, offset, noise: strengths, scalars or one per site [num_sites]; 0 leaves that part out. scale: float[*shape], the unit
    of each feature, usually its standard deviation. groups: int[*shape]; features of one group share a site's draw, as
    measurements taken with one device do; None draws each feature alone. Raises FlJaxError for negative strengths and for
    shapes that do not fit.
    """
    scale = np.asarray(scale, float)
    group = np.arange(scale.size).reshape(scale.shape) if groups is None else np.asarray(groups)
    if group.shape != scale.shape:
        raise FlJaxError(f"A calibration's groups have the shape {group.shape} and its scale {scale.shape}: give them one shape.")

    def strength(name: str, value: float | np.ndarray) -> np.ndarray:
        value = np.asarray(value, float)
        if value.shape not in ((), (num_sites,)) or not (value >= 0).all():
            raise FlJaxError(f"A calibration's {name} must be a number of at least 0, or one for each of the {num_sites} sites.")
        return np.broadcast_to(value, num_sites).reshape(num_sites, *[1] * scale.ndim)

    strengths = [strength(n, v) for n, v in (("gain", gain), ("offset", offset), ("noise", noise))]
    z_gain, z_offset = rng.standard_normal((2, num_sites, int(group.max(initial=0)) + 1))[:, :, group]
    noise_sd = scale * strengths[2] * np.ones_like(z_gain)
    return Calibration(np.exp(strengths[0] * z_gain), scale * strengths[1] * z_offset, noise_sd)


def calibrate(rng: np.random.Generator, x: np.ndarray, site: np.ndarray | int, calibration: Calibration) -> np.ndarray:
    """x [R, ...] as its sites would have measured it: gain x + offset + noise * standard normal, in x's dtype.

    site: int[R], or one int for all records (a held-out site's). Integer dtypes are rounded and clipped to their range.
    Raises FlJaxError where the calibration's shape is not that of x, or a site has none.
    """
    x = np.asarray(x)
    shape = calibration.gain.shape[1:]
    if len(shape) >= x.ndim or any(a not in (1, b) for a, b in zip(shape, x.shape[x.ndim - len(shape) :], strict=True)):
        raise FlJaxError(f"A calibration of shape {shape} does not fit records of shape {x.shape[1:]}: draw it for that shape.")
    index = np.broadcast_to(np.asarray(site), len(x))
    if len(x) and not (index.min() >= 0 and index.max() < len(calibration.gain)):
        raise FlJaxError(f"A calibration of {len(calibration.gain)} sites has none for site {index.max()}: draw one for all.")

    def rows(parameter: np.ndarray) -> np.ndarray:
        return parameter[index].reshape(len(x), *[1] * (x.ndim - 1 - len(shape)), *shape)

    measured = rows(calibration.gain) * x + rows(calibration.offset) + rows(calibration.noise) * rng.standard_normal(x.shape)
    if np.issubdtype(x.dtype, np.integer):
        limits = np.iinfo(x.dtype)
        measured = np.clip(np.rint(measured), limits.min, limits.max)
    return measured.astype(x.dtype)


def shift_features(rng: np.random.Generator, dataset: FederatedDataset, calibration: PyTree) -> FederatedDataset:
    """The data set as measured under a calibration of its N sites followed by its unseen sites; a site keeps it in every split.

    calibration: a Calibration, or a pytree of them like x, each of N + number of unseen sites. Adds a note that says so. Raises
    FlJaxError for calibrations that do not fit the data set.
    """
    leaves, like = jax.tree.flatten(calibration, is_leaf=lambda c: isinstance(c, Calibration))
    structure = jax.tree.structure(dataset.train.x)
    if structure != like or not all(isinstance(leaf, Calibration) for leaf in leaves):  # type: ignore[operator]
        raise FlJaxError(f"Features of the structure {structure} need one Calibration for each array of them, not {like}.")
    expected = dataset.num_sites + len(dataset.unseen_names)
    for leaf in leaves:
        if len(leaf.gain) != expected:
            raise FlJaxError(
                f"Data set '{dataset.name}' has {dataset.num_sites} sites and {len(dataset.unseen_names)} unseen ones, but the "
                f"calibration is for {len(leaf.gain)}: draw one for all of them, the unseen ones last."
            )

    def measure(records: Records, first: int) -> Records:
        features, structure = jax.tree.flatten(records.x)
        measured = [calibrate(rng, x, records.sites + first, c) for x, c in zip(features, leaves, strict=True)]
        return records._replace(x=jax.tree.unflatten(structure, measured))

    return remeasured(dataset, measure, "Simulated: every site's features are measured with its own gain, offset and noise.")


def remeasured(dataset: FederatedDataset, measure: Callable[[Records, int], Records], note: str) -> FederatedDataset:
    """The data set with each split's records as `measure` makes them; it is told the number of their first site, unseen ones coming last."""
    return replace(
        dataset,
        train=measure(dataset.train, 0),
        validation=measure(dataset.validation, 0),
        test=measure(dataset.test, 0),
        unseen=measure(dataset.unseen, dataset.num_sites),
        notes=(*dataset.notes, note),
    )
