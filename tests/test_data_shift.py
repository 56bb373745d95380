"""Calibration: its moments, shapes and dtypes, and one calibration a site in every split."""

import numpy as np
import pytest

from fl_jax.data.arrays import from_arrays
from fl_jax.data.shift import Calibration, calibrate, draw_calibration, shift_features
from fl_jax.errors import FlJaxError


def test_draws_have_their_strengths_in_the_features_units():
    scale = np.array([1.0, 100.0])
    c = draw_calibration(np.random.default_rng(0), 20000, gain=0.3, offset=0.5, noise=0.2, scale=scale)
    assert np.log(c.gain).std(0) == pytest.approx(0.3, rel=0.05) and np.log(c.gain).mean(0) == pytest.approx(0, abs=0.02)
    assert c.offset.std(0) == pytest.approx(0.5 * scale, rel=0.05)
    np.testing.assert_allclose(c.noise, 0.2 * np.tile(scale, (20000, 1)))
    assert abs(np.corrcoef(c.gain[:, 0], c.gain[:, 1])[0, 1]) < 0.05


def test_groups_share_a_draw_and_strengths_may_differ_by_site():
    strength = np.array([0.0, 1, 1])
    c = draw_calibration(
        np.random.default_rng(0), 3, gain=strength, offset=strength, scale=np.array([1.0, 1, 2]), groups=[0, 0, 1]
    )
    np.testing.assert_array_equal(c.gain[0], 1)
    np.testing.assert_array_equal(c.offset[0], 0)
    np.testing.assert_array_equal(c.gain[:, 0], c.gain[:, 1])
    assert (c.gain[1:, 1] != c.gain[1:, 2]).all()


def test_calibrate_is_gain_offset_and_noise():
    c = Calibration(np.array([[2.0, 1], [1, 3]]), np.array([[0.0, 1], [5, 0]]), np.array([[0.0, 0], [0, 0]]))
    x = np.array([[1.0, 2], [3, 4], [5, 6]], np.float32)
    out = calibrate(np.random.default_rng(0), x, np.array([0, 1, 0]), c)
    np.testing.assert_allclose(out, [[2, 3], [8, 12], [10, 7]])
    assert out.dtype == np.float32
    np.testing.assert_allclose(calibrate(np.random.default_rng(0), x, 1, c), x * [1, 3] + [5, 0])
    noisy = calibrate(np.random.default_rng(0), np.zeros((50000, 2)), 0, c._replace(noise=np.array([[1.0, 2], [0, 0]])))
    assert noisy.std(0) == pytest.approx([1, 2], rel=0.03)


@pytest.mark.parametrize("shape", [(), (3,), (1, 1, 3), (4, 4, 3)])
def test_images_keep_shape_and_dtype(shape):
    images = np.random.default_rng(0).integers(0, 256, size=(6, 4, 4, 3)).astype(np.uint8)
    c = draw_calibration(np.random.default_rng(1), 2, gain=1.0, offset=100.0, scale=np.ones(shape))
    out = calibrate(np.random.default_rng(2), images, np.arange(6) % 2, c)
    assert out.dtype == np.uint8 and out.shape == images.shape
    gain, offset = (p[[0, 1] * 3].reshape(6, *[1] * (3 - len(shape)), *shape) for p in (c.gain, c.offset))
    np.testing.assert_array_equal(out, np.clip(np.rint(gain * images + offset), 0, 255).astype(np.uint8))


def test_a_site_keeps_its_calibration_in_every_split_unseen_ones_last():
    rng = np.random.default_rng(0)
    data = from_arrays(rng.normal(size=(60, 2)), rng.integers(2, size=60), np.arange(60) % 3, unseen=["1"])
    c = draw_calibration(rng, 3, gain=0.5, offset=2.0, scale=np.ones(2))
    shifted = shift_features(rng, data, c)
    for split, first in (("train", 0), ("validation", 0), ("test", 0), ("unseen", 2)):
        before, after = getattr(data, split), getattr(shifted, split)
        site = before.sites + first
        np.testing.assert_allclose(after.x, c.gain[site] * before.x + c.offset[site])
        np.testing.assert_array_equal(after.y, before.y)
    assert any("Simulated" in note for note in shifted.notes)
    with pytest.raises(FlJaxError, match="2 sites and 1 unseen ones, but the calibration is for 2"):
        shift_features(rng, data, draw_calibration(rng, 2, scale=np.ones(2)))
    two = from_arrays({"a": np.zeros((6, 2)), "b": np.zeros((6, 2))}, np.arange(6) % 2, np.zeros(6, int))
    with pytest.raises(FlJaxError, match="one Calibration for each array"):
        shift_features(rng, two, draw_calibration(rng, 1, scale=np.ones(2)))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda r: draw_calibration(r, 3, gain=-1.0), "gain must be a number of at least 0"),
        (lambda r: draw_calibration(r, 3, noise=[1.0, 2.0]), "noise must be a number"),
        (lambda r: draw_calibration(r, 3, scale=np.ones(2), groups=[0, 1, 2]), "one shape"),
        (lambda r: calibrate(r, np.zeros((4, 3)), 0, draw_calibration(r, 1, scale=np.ones(2))), "does not fit records of shape"),
        (lambda r: calibrate(r, np.zeros((4, 2)), 1, draw_calibration(r, 1, scale=np.ones(2))), "has none for site 1"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(FlJaxError, match=message):
        call(np.random.default_rng(0))
