"""Shifts of images: what each does to a pixel, one a site in every split, labels untouched."""

import numpy as np
import pytest

from fl_jax.data import from_arrays
from fl_jax.data.image_shift import blur, cast, chain, contrast, invert, pixel_noise, shift_images, unchanged
from fl_jax.errors import FlJaxError

X = np.random.default_rng(0).integers(60, 190, (40, 8, 8, 2)).astype(np.float64)


def of(shift, x=X):
    return shift(np.random.default_rng(1), x)


def test_each_shift_is_what_its_name_says():
    np.testing.assert_array_equal(of(invert()) + X, 255)
    np.testing.assert_array_equal(of(chain(invert(), invert())), X)
    np.testing.assert_allclose(of(contrast(0.25)) - 127.5, 0.25 * (X - 127.5))
    np.testing.assert_array_equal(of(unchanged()), X)
    offset = of(cast(-20, 60)) - X
    assert np.ptp(offset, axis=(1, 2)).max() < 1e-9  # one an image and channel
    assert offset.min() >= -20 and offset.max() <= 60 and 15 < offset[:, 0, 0].std() < 30 and len(np.unique(offset[:, 0, 0].round(9))) == 80
    noise = of(pixel_noise(30.0)) - X
    assert noise.std() == pytest.approx(30, rel=0.03) and abs(noise.mean()) < 2


def test_a_blur_keeps_an_images_mean_and_mixes_neither_images_nor_channels():
    x = np.zeros((2, 15, 15, 2))
    x[0, 7, 7, 1] = 200.0
    blurred = of(blur(1.5), x)
    assert blurred[0, :, :, 1].sum() == pytest.approx(200) and not blurred[1].any() and not blurred[0, :, :, 0].any()
    assert blurred[0, 7, 7, 1] == pytest.approx(200 / (2 * np.pi * 1.5**2), rel=0.03)  # the density of the normal there
    np.testing.assert_allclose(of(blur(0.0), x), x)


def images():
    x = np.random.default_rng(0).integers(0, 256, (60, 4, 4, 1)).astype(np.uint8)
    return from_arrays(x, np.arange(60) % 2, np.arange(60) % 3, unseen=["1"])


def test_a_site_shifts_all_its_splits_and_unseen_sites_come_last():
    before = images()
    after = shift_images(np.random.default_rng(0), before, [invert(), unchanged(), contrast(10.0)])
    for split in ("train", "validation", "test"):
        old, new = getattr(before, split), getattr(after, split)
        np.testing.assert_array_equal(new.x[old.sites == 0], 255 - old.x[old.sites == 0])
        np.testing.assert_array_equal(new.x[old.sites == 1], old.x[old.sites == 1])
        np.testing.assert_array_equal(new.y, old.y)
    assert after.train.x.dtype == np.uint8 and {0, 255} <= {*np.unique(after.unseen.x)}  # clipped, not wrapped
    assert (after.unseen.x[before.unseen.x > 200] == 255).all() and "Simulated" in after.notes[-1]


@pytest.mark.parametrize("call, sentence", [
    (lambda: contrast(-1.0), "factor of contrast must be at least 0"), (lambda: blur(-1.0), "sigma of blur"),
    (lambda: pixel_noise(-1.0), "sd of pixel_noise"), (lambda: cast(2.0, 1.0), "low and its high level"),
    (lambda: shift_images(np.random.default_rng(0), images(), [invert()] * 2), "2 sites and 1 unseen ones, and there are 2 shifts"),
    (lambda: shift_images(np.random.default_rng(0), from_arrays(np.zeros((6, 2)), np.arange(6) % 2, np.zeros(6, int)), [invert()]),
     "has no images uint8")])
def test_mistakes_are_named(call, sentence):
    with pytest.raises(FlJaxError, match=sentence):
        call()
