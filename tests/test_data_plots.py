"""The label figure: drawn without global state, bars as long as the counts, a heat map of many sites."""

import matplotlib
import numpy as np
import pytest

from fl_jax.data.arrays import from_arrays
from fl_jax.data.describe import site_class_counts
from fl_jax.data.plots import label_distribution
from fl_jax.errors import FlJaxError


def draw(num_sites, num_classes, n, **changes):
    rng = np.random.default_rng(0)
    site = np.concatenate([np.arange(num_sites), rng.integers(num_sites, size=n - num_sites)])
    return from_arrays(np.zeros((n, 1), np.float32), rng.integers(num_classes, size=n), site, num_classes=num_classes, **changes)


@pytest.mark.parametrize("num_classes", [2, 10, 25])
def test_bars_are_the_counts(tmp_path, num_classes):
    data = draw(6, num_classes, 500, unseen=["2"])
    figure = label_distribution(data)
    figure.savefig(tmp_path / "f.png", dpi=40)
    assert (tmp_path / "f.png").stat().st_size > 1000
    axes = figure.axes[0]
    counts = np.concatenate(site_class_counts(data))
    for bars, column in zip(axes.containers, counts.T, strict=True):
        np.testing.assert_array_equal([bar.get_width() for bar in bars], column)
    assert [t.get_text() for t in axes.get_yticklabels()][-1] == "site 2 (unseen)"
    assert len(figure.legends[0].get_texts()) == num_classes


def test_many_sites_become_a_heat_map_of_shares(tmp_path):
    data = draw(100, 10, 3000, unseen=[str(i) for i in range(5)])
    figure = label_distribution(data)
    figure.savefig(tmp_path / "f.png", dpi=40)
    shares = np.asarray(figure.axes[0].images[0].get_array())
    assert shares.shape == (100, 10)
    np.testing.assert_allclose(shares.sum(1), 1)
    assert (np.diff(shares[:95].argmax(1)) >= 0).all()  # sites in the order of their most frequent class, unseen ones apart


def test_no_global_state_and_no_classes():
    before = matplotlib.get_backend()
    label_distribution(draw(3, 2, 30))
    assert matplotlib.get_backend() == before
    with pytest.raises(FlJaxError, match="are no classes"):
        label_distribution(from_arrays(np.zeros((6, 1)), np.linspace(0, 1, 6), [0, 0, 0, 1, 1, 1]))
