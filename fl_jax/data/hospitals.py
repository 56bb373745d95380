"""Real patients at simulated hospitals: a small federation in which hospitals differ as hospitals do.

The 569 patients of Breast Cancer Wisconsin are dealt to hospitals that differ in three ways which the literature blames for the
failures of one global model (Kairouz et al. 2021, arXiv 1912.04977, section 3.1): size (the smallest has too few patients to
train alone), case mix (the share of malignant cases), and measurement (each hospital's own calibration, which is what FedBN was
made for: Li et al. 2021, arXiv 2102.07623). An unseen hospital with a calibration of its own tells how a model travels.
"""

from dataclasses import replace

import numpy as np

from fl_jax.data import partition
from fl_jax.data.arrays import from_arrays
from fl_jax.data.federated import FederatedDataset
from fl_jax.data.partition import apportion, spread_log_odds
from fl_jax.data.shift import calibrate, draw_calibration
from fl_jax.data.sklearn_sources import breast_cancer
from fl_jax.data.standardize import Statistics, pooled_statistics, standardize_features
from fl_jax.errors import FlJaxError

# What one setting of a microscope and its software shifts together, in the order of the ten measurements of a nucleus: size
# (radius, perimeter, area), texture, smoothness, shape (compactness, concavity, concave points), symmetry, fractal dimension.
# The data hold three statistics of each measurement: mean, standard error, worst.
_FEATURE_GROUPS = np.tile([0, 1, 0, 0, 2, 3, 3, 3, 4, 5], 3)

_SMALLEST = 20  # patients: below this a stratified test split no longer holds both classes


def simulated_hospitals(
    seed: int | np.random.Generator,
    *,
    num_hospitals: int = 5,
    num_unseen: int = 60,
    size_ratio: float = 3.3,
    case_mix: float = 1.0,
    gain: float = 0.3,
    offset: float = 1.5,
    noise: float = 1.0,
    validation: float = 0.2,
    test: float = 0.4,
    statistics: Statistics = pooled_statistics,
) -> FederatedDataset:
    """Real breast-cancer patients at simulated hospitals: x float32[R, 30], y int32[R] (0 benign, 1 malignant).

    The design is the same for every seed: sizes fall geometrically, the largest hospital `size_ratio` times the smallest; the
    log-odds of malignancy are spread evenly over +- case_mix, the smallest hospitals the most extreme; hospital A has neither
    gain nor offset. The seed draws who is treated where, the other hospitals' calibrations, and the splits:
    gain: standard deviation of the log gain of each group of features (.3: by about a third). offset: standard deviation of a
    group's offset, in standard deviations of each feature. noise: standard deviation of measurement noise at every hospital,
    in the same unit; the data as they are can almost be separated, and without noise every AUROC is at its ceiling.
    Groups: size, texture, smoothness, shape, symmetry, fractal dimension.
    num_unseen: patients of the one unseen hospital, which has the overall case mix; 0 for none. validation, test: fractions.
    statistics: how features are standardised; the default, one mean and standard deviation over the training records of all
    hospitals, is what a consortium can compute by a secure sum.
    What to expect of the defaults: mean test AUROC over hospitals and 40 seeds (standard error .004) with scikit-learn's
    MLPClassifier((16,), learning_rate_init=.01, alpha=.1, max_iter=300): each hospital's own model .937, one model of all
    training records .943, the same on site-standardised features .959; at hospital A .951, .951, .959, at D .915, .919, .948.
    Raises FlJaxError where a hospital would have fewer than 20 patients, or strengths are negative.
    """
    source = breast_cancer()
    if num_hospitals < 1 or size_ratio < 1 or case_mix < 0 or num_unseen < 0:
        raise FlJaxError("simulated_hospitals needs at least 1 hospital, size_ratio of at least 1, and no negative numbers.")
    rng = np.random.default_rng(seed)
    step = np.arange(num_hospitals) / max(num_hospitals - 1, 1)
    num_seen = max(len(source.y) - num_unseen, 0)
    sizes = np.append(apportion(size_ratio**-step, num_seen), np.full(min(num_unseen, 1), num_unseen))
    if sizes.min() < _SMALLEST:
        raise FlJaxError(
            f"{len(source.y)} patients at {num_hospitals} hospitals and {num_unseen} at an unseen one leave a hospital with "
            f"{max(int(sizes.min()), 0)}: every one needs {_SMALLEST}, so take fewer hospitals or a smaller size_ratio."
        )
    log_odds = np.append(spread_log_odds(case_mix, num_hospitals), np.zeros(min(num_unseen, 1)))
    hospital = partition.case_mix(rng, source.y, sizes, log_odds)

    shifted = np.ones(len(sizes))
    shifted[0] = 0.0
    calibration = draw_calibration(
        rng,
        len(sizes),
        gain=gain * shifted,
        offset=offset * shifted,
        noise=noise,
        scale=source.x.std(0),
        groups=_FEATURE_GROUPS,
    )
    names = tuple(f"Hospital {_letters(i)}" for i in range(len(sizes)))
    dataset = from_arrays(
        calibrate(rng, source.x.astype(np.float64), hospital, calibration),
        source.y,
        hospital,
        name="simulated hospitals",
        seed=rng,
        validation=validation,
        test=test,
        unseen=names[num_hospitals:],
        site_names=names,
        class_names=source.class_names,
        feature_names=source.feature_names,
    )
    measurement = (
        f"All but {names[0]} have gains (log sd {gain:g}) and offsets (sd {offset:g}) of their own for each of 6 groups of "
        f"features; noise of sd {noise:g} everywhere; in units of a feature's standard deviation."
    )
    notes = (
        "Real: the patients, their diagnoses and measurements (569 of Breast Cancer Wisconsin, one record each).",
        "Simulated: the hospitals, that is who is treated where, their sizes and their shares of malignant cases.",
        f"Simulated: measurement. {measurement}",
        f"Features are standardised by {statistics.__name__.replace('_', ' ')} of the training records.",
    )
    return replace(standardize_features(dataset, statistics), notes=notes)


def _letters(i: int) -> str:
    """A, B, ..., Z, AA, AB, ... as spreadsheets name columns."""
    return (_letters(i // 26 - 1) if i >= 26 else "") + chr(ord("A") + i % 26)
