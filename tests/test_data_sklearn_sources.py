"""The sources are scikit-learn's records, with malignant as class 1."""

import numpy as np
from sklearn.datasets import load_breast_cancer, load_digits

from fl_jax.data.sklearn_sources import breast_cancer, digits


def test_breast_cancer_counts_malignant_as_the_finding():
    source, original = breast_cancer(), load_breast_cancer()
    np.testing.assert_allclose(source.x, original.data, rtol=1e-6)
    assert source.x.shape == (569, 30) and len(source.feature_names) == 30
    for k, name in enumerate(source.class_names):
        np.testing.assert_array_equal(source.y == k, original.target_names[original.target] == name)
    assert source.y.sum() == 212


def test_digits_are_images_in_the_unit_interval():
    source, original = digits(), load_digits()
    assert source.x.shape == (1797, 8, 8, 1) and source.x.min() == 0 and source.x.max() == 1
    np.testing.assert_array_equal(source.x[..., 0] * 16, original.images)
    np.testing.assert_array_equal(source.y, original.target)
