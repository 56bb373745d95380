"""PneumoniaMNIST at four simulated hospitals that differ in size, case mix and calibration, and a fifth that takes no part in training."""

import dataclasses
from collections.abc import Callable

import numpy as np

from fl_jax import data
from fl_jax.data import FederatedDataset, Records, Source, no_records
from fl_jax.data.partition import apportion, spread_log_odds

SITES = ("Hospital A", "Hospital B", "Hospital C", "Hospital D")
UNSEEN = "Hospital E"
Load = Callable[[str], Source]
"""("train", "validation" or "test") -> the images."""


@dataclasses.dataclass(frozen=True)
class Hospitals:
    """How the hospitals differ."""

    size_ratio: float = 2.0
    """the largest hospital's images over the smallest's; sizes fall geometrically"""
    case_mix: float = 1.0
    """log-odds of pneumonia are spread over plus and minus this"""
    gain: float = 0.3
    """standard deviation of the log gain of a hospital's X-rays (all but the first)"""
    offset: float = 0.5
    """the same of the offset, in standard deviations of a pixel"""
    noise: float = 0.2
    """standard deviation of each pixel's noise, everywhere, in the same unit"""


def site_sizes(size_ratio: float, num_records: int) -> np.ndarray:
    """int64[4]: how many of so many images each hospital has."""
    count = len(SITES)
    return apportion(size_ratio ** -(np.arange(count) / (count - 1)), num_records)


def to_measure(hospitals: Hospitals, seed: int, images: Load, held_out: float = 0.0) -> FederatedDataset:
    """The official training and test images at the four hospitals, and all test images as a fifth would have measured them.

    The seed draws who is where, and the calibrations. held_out: a share of the training images, drawn by it too, that are for
    validation instead: images of the population that is trained on, which the official test images are not quite.
    """
    return _federation(hospitals, seed, images, "test", held_out)


def to_choose(hospitals: Hospitals, seed: int, images: Load) -> FederatedDataset:
    """The official training and validation images at the four hospitals; without the test images, which then can play no part."""
    return _federation(hospitals, seed, images, "validation")


def _federation(hospitals: Hospitals, seed: int, images: Load, split: str, held_out: float = 0.0) -> FederatedDataset:
    rng = np.random.default_rng(seed)
    train, other = images("train"), images(split)
    apart, count = None, round(held_out * len(train.y))
    if count:
        order = np.random.default_rng([seed, 1]).permutation(len(train.y))  # by a generator of its own: who is where stays as it is
        apart, train = (train._replace(x=train.x[rows], y=train.y[rows]) for rows in np.split(order, [count]))
    log_odds = spread_log_odds(hospitals.case_mix, len(SITES))

    def dealt(source: Source) -> Records:
        sizes = site_sizes(hospitals.size_ratio, len(source.y))
        order = np.argsort(data.case_mix(rng, source.y, sizes, log_odds), kind="stable")
        return Records(source.x[order], source.y[order], np.concatenate([[0], np.cumsum(sizes)]))

    own, rest = dealt(train), dealt(other)
    empty = no_records(own, len(SITES))
    measured = split == "test"
    held = empty if apart is None else dealt(apart)
    dataset = FederatedDataset(
        name=train.name, train=own, validation=held if measured else rest, test=rest if measured else empty,
        unseen=Records(other.x, other.y, np.array([0, len(other.y)])) if measured else no_records(own),
        site_names=SITES, unseen_names=(UNSEEN,) if measured else (), num_classes=2, class_names=train.class_names,
        notes=(
            *train.notes, *other.notes,
            "Simulated: the hospitals, that is whose image is where, their sizes and their shares of pneumonia.",
            f"{UNSEEN} takes no part in training: the official test images once more, with its calibration."))
    own_scale = np.array([0.0, *[1.0] * len(SITES)])  # the first hospital measures as published; the last one is unseen
    calibration = data.draw_calibration(
        rng, len(own_scale), gain=hospitals.gain * own_scale, offset=hospitals.offset * own_scale, noise=hospitals.noise,
        scale=np.full((1, 1, 1), train.x.std()))
    used = len(SITES) + len(dataset.unseen_names)
    return data.shift_features(rng, dataset, data.Calibration(*(part[:used] for part in calibration)))
