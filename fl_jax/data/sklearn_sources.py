"""Two real data sets that come with scikit-learn, without a download: raw records with names, not yet distributed to sites."""

import numpy as np

from fl_jax.data.source import Source


def breast_cancer() -> Source:
    """Breast Cancer Wisconsin (diagnostic): 569 patients, 30 features of cell nuclei, float32[569, 30] in their original units.

    y: 0 benign (357), 1 malignant (212), so that class 1 is the finding; scikit-learn counts the other way round. One record a
    patient. Source: Street, Wolberg and Mangasarian 1993 (UCI Machine Learning Repository, doi 10.24432/C5DW2B).
    """
    # imported here, because it costs a second that other sources need not pay
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    return Source(
        name="breast cancer Wisconsin",
        x=data.data.astype(np.float32),
        y=(1 - data.target).astype(np.int32),
        class_names=("benign", "malignant"),
        feature_names=tuple(str(name) for name in data.feature_names),
        notes=("Real: 569 patients of Breast Cancer Wisconsin (diagnostic), one record each, from scikit-learn.",),
    )


def digits() -> Source:
    """Handwritten digits: 1,797 images of 8 x 8 pixels, float32[1797, 8, 8, 1], scaled from 0..16 to [0, 1]; y is the digit.

    Source: test set of Alpaydin and Kaynak 1998 (UCI Machine Learning Repository, doi 10.24432/C50P49). The 13 writers of these
    images are not recorded, so a split by writer is not possible.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    return Source(
        name="digits",
        x=(data.images / 16.0).astype(np.float32)[..., None],
        y=data.target.astype(np.int32),
        class_names=tuple(str(name) for name in data.target_names),
        feature_names=(),
        notes=("Real: 1,797 handwritten digits of 8 x 8 pixels, from scikit-learn.",),
    )
