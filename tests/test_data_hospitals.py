"""The simulated hospitals: the design holds for every seed, patients are real, sites differ as stated."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from fl_jax.data.describe import site_class_counts
from fl_jax.data.federated import stack
from fl_jax.data.hospitals import simulated_hospitals
from fl_jax.data.sklearn_sources import breast_cancer
from fl_jax.data.standardize import as_measured, pooled_statistics, site_statistics
from fl_jax.errors import FlJaxError


def test_design_is_the_same_for_every_seed_and_all_patients_are_used():
    draws = [simulated_hospitals(seed) for seed in range(20)]
    seen, unseen = site_class_counts(draws[0])
    assert seen.sum() + unseen.sum() == 569 and seen[:, 1].sum() + unseen[:, 1].sum() == 212
    sizes, shares = seen.sum(1), seen[:, 1] / seen.sum(1)
    assert (np.diff(sizes) < 0).all() and sizes[0] / sizes[-1] == pytest.approx(3.3, rel=0.05) and unseen.sum() == 60
    log_odds = np.log(shares / (1 - shares))
    assert np.ptp(log_odds) == pytest.approx(2.0, abs=0.15)
    for data in draws:
        np.testing.assert_array_equal(site_class_counts(data)[0], seen)
        # both classes in every test set, so that AUROC is defined, and enough of them
        test = np.stack([np.bincount(data.test.y[data.test.sites == i], minlength=2) for i in range(5)])
        assert test.min() >= 4 and test.sum(1).min() >= 20
    assert stack(draws[:2]).train.x.shape == (2, 204, 30)


def test_seed_draws_who_is_treated_where():
    a, again, b = simulated_hospitals(1), simulated_hospitals(1), simulated_hospitals(2)
    np.testing.assert_array_equal(a.train.x, again.train.x)
    assert (a.train.x != b.train.x).any()

    def patients_of_the_largest(seed):
        data = simulated_hospitals(seed, gain=0, offset=0, noise=0, statistics=as_measured)
        return {tuple(row) for t in (data.train, data.validation, data.test) for row in t.x[t.sites == 0]}

    shared = len(patients_of_the_largest(1) & patients_of_the_largest(2))
    assert shared < 170 / 2  # by chance about 170 * 170 / 569 = 51, but all 170 if only the split were drawn


def test_without_shift_and_noise_the_records_are_the_real_patients():
    data = simulated_hospitals(0, gain=0, offset=0, noise=0, statistics=as_measured)
    mine = np.concatenate([t.x for t in (data.train, data.validation, data.test, data.unseen)])
    real = breast_cancer().x
    np.testing.assert_allclose(mine[np.lexsort(mine.T)], real[np.lexsort(real.T)], rtol=1e-6)


def test_reference_hospital_has_no_shift_and_others_do():
    plain = simulated_hospitals(3, gain=0, offset=0, noise=0, statistics=as_measured)
    moved = simulated_hospitals(3, noise=0, statistics=as_measured)
    change = np.abs(moved.train.x - plain.train.x).max(1)
    np.testing.assert_array_equal(change[plain.train.sites == 0], 0)
    assert (change[plain.train.sites > 0] > 0).all() and (np.abs(moved.unseen.x - plain.unseen.x).max(1) > 0).all()


def test_measurement_shift_is_what_hurts_one_global_model():
    """A pooled linear model loses to the same model on site-standardised features: the gap that FedBN is about."""

    def mean_auroc(statistics):
        scores = []
        for seed in range(8):
            data = simulated_hospitals(seed, statistics=statistics)
            model = LogisticRegression(C=0.1, max_iter=500).fit(data.train.x, data.train.y)
            for i in range(1, 5):
                own = data.test.sites == i
                scores.append(roc_auc_score(data.test.y[own], model.decision_function(data.test.x[own])))
        return np.mean(scores)

    assert mean_auroc(site_statistics) > mean_auroc(pooled_statistics)


def test_any_number_of_hospitals_and_no_unseen_one():
    data = simulated_hospitals(0, num_hospitals=8, num_unseen=0, size_ratio=2)
    assert data.num_sites == 8 and data.unseen_names == () and data.site_names[-1] == "Hospital H"
    assert site_class_counts(simulated_hospitals(0, num_hospitals=1))[0].sum() == 509


@pytest.mark.parametrize("change", [{"num_hospitals": 30}, {"num_unseen": 5}, {"num_unseen": 569}, {"num_unseen": 1000}])
def test_too_small_hospitals_are_refused(change):
    with pytest.raises(FlJaxError, match="take fewer hospitals"):
        simulated_hospitals(0, **change)


def test_negative_numbers_are_refused():
    for change in ({"num_hospitals": 0}, {"size_ratio": 0.5}, {"case_mix": -1}, {"gain": -1}):
        with pytest.raises(FlJaxError):
            simulated_hospitals(0, **change)


def test_notes_say_what_is_real_and_what_is_simulated():
    notes = simulated_hospitals(0).notes
    assert notes[0].startswith("Real: the patients") and sum(note.startswith("Simulated") for note in notes) == 2
