"""Feature shift between sites of images: inverted, of low contrast, blurred, with a colour cast, noisy; a shift a site, labels unchanged.

Stand-ins for the domains of FedBN (Li et al. 2021, arXiv 2102.07623, section 5) where one set of images is at hand. They are applied in the
order in which they are chained: `chain(blur(1.0), pixel_noise(20.0))`.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import ndimage

from fl_jax.data.federated import FederatedDataset
from fl_jax.data.records import Records
from fl_jax.data.shift import remeasured
from fl_jax.errors import FlJaxError

ImageShift = Callable[[np.random.Generator, np.ndarray], np.ndarray]
"""(rng, pixels float64[R, H, W, C] of 0 to 255) -> the same as a site measures them; what leaves 0 to 255 is clipped afterwards."""


def unchanged() -> ImageShift:
    """The images as they are."""
    return lambda rng, x: x


def invert() -> ImageShift:
    """Black for white: 255 - x."""
    return lambda rng, x: 255 - x


def contrast(factor: float, grey: float = 127.5) -> ImageShift:
    """Distances from a grey level times a factor: below 1 the contrast is low. Raises FlJaxError for a negative factor."""
    _not_negative("factor of contrast", factor)
    return lambda rng, x: grey + factor * (x - grey)


def blur(sigma: float) -> ImageShift:
    """A Gaussian filter of so many pixels, each channel for itself; the border is reflected. Raises FlJaxError for a negative sigma."""
    _not_negative("sigma of blur", sigma)
    return lambda rng, x: ndimage.gaussian_filter(x, (0, sigma, sigma, 0))


def cast(low: float, high: float) -> ImageShift:
    """A colour cast: every image has its own offset in each channel, uniform between two grey levels. Raises FlJaxError where low > high."""
    if low > high:
        raise FlJaxError(f"A cast lies between its low and its high level, but {low:g} is above {high:g}.")
    return lambda rng, x: x + rng.uniform(low, high, (len(x), 1, 1, x.shape[3]))


def pixel_noise(sd: float) -> ImageShift:
    """Normal noise of this standard deviation, in grey levels, on each pixel. Raises FlJaxError for a negative one."""
    _not_negative("sd of pixel_noise", sd)
    return lambda rng, x: x + sd * rng.standard_normal(x.shape)


def chain(*shifts: ImageShift) -> ImageShift:
    """One shift after the other."""

    def every(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
        for shift in shifts:
            x = shift(rng, x)
        return x

    return every


def shift_images(rng: np.random.Generator, dataset: FederatedDataset, shifts: Sequence[ImageShift]) -> FederatedDataset:
    """The data set as its N sites, then its unseen ones, measure images: a shift for each, the same in every split.

    Images are uint8[R, H, W, C], and are rounded and clipped to that again. Adds a note that says so. Raises FlJaxError for another
    number of shifts than of sites, and for records that are no such images.
    """
    expected = dataset.num_sites + len(dataset.unseen_names)
    if len(shifts) != expected:
        raise FlJaxError(
            f"Data set '{dataset.name}' has {dataset.num_sites} sites and {len(dataset.unseen_names)} unseen ones, and there are {len(shifts)} "
            "shifts: give one for each, the unseen ones last.")
    x = dataset.train.x
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 4:
        raise FlJaxError(f"Data set '{dataset.name}' has no images uint8[R, H, W, C]: shift_features is for other records.")

    def measure(records: Records, first: int) -> Records:
        shifted = np.array(records.x)
        for i, (start, stop) in enumerate(zip(records.offsets[:-1], records.offsets[1:], strict=True)):
            measured = shifts[first + i](rng, records.x[start:stop].astype(np.float64))
            shifted[start:stop] = np.clip(np.rint(measured), 0, 255).astype(np.uint8)
        return records._replace(x=shifted)

    return remeasured(dataset, measure, "Simulated: every site shifts its images in its own way.")


def _not_negative(name: str, value: float) -> None:
    if value < 0:
        raise FlJaxError(f"The {name} must be at least 0, and is {value:g}.")
