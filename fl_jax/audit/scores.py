"""What attack scores prove: lower bounds on epsilon, and how often an attack finds members while hardly ever accusing others.

The statistics for one run and of counts are jax_privacy's (jax_privacy.auditing); its bound for Gaussian mechanisms is not used, since in
version 2.0.0 it takes upper bounds on both error rates for lower ones at thresholds where an attack is worse than chance, and accuses a
faultless mechanism in a quarter of small audits. A lower bound above the claimed epsilon refutes the claim; one below it proves nothing but that this attack did not.
"""

import math
from typing import NamedTuple

import dp_accounting
import numpy as np
import numpy.typing as npt
import scipy.stats
from jax_privacy import auditing

from fl_jax.errors import FlJaxError
from fl_jax.statistics import Interval

CONFIDENCE = 0.95


class Scores(NamedTuple):
    """An attack's scores, float64[n] and float64[m]: of what was trained on (inside) and of what was not. Higher means inside."""

    inside: npt.NDArray[np.float64]
    outside: npt.NDArray[np.float64]


def gaussian_bound(scores: Scores, delta: float, confidence: float = CONFIDENCE) -> float:
    """Epsilon at delta that a Gaussian mechanism must have for scores of independent runs to be this far apart (Nasr et al. 2023, "Tight
    auditing of differentially private machine learning", section 4.2; Dong, Roth & Su 2022 for the conversion).

    scores: one a run, from runs with and without the canary. Assumes that the mechanism is a composition of Gaussians without sampling,
    for which the trade-off of one threshold tells the whole; Clopper-Pearson bounds on both error rates at every threshold, all of them
    valid together (Bonferroni). For a sampled mechanism it may exceed the truth: use `counting_bound`.
    """
    inside, outside = _checked(scores)
    _probable(delta)
    _confident(confidence)
    thresholds = np.unique(np.concatenate([inside, outside]))
    misses = np.searchsorted(np.sort(inside), thresholds, side="right")  # members at or below the threshold
    alarms = len(outside) - np.searchsorted(np.sort(outside), thresholds, side="right")
    each = (1 - confidence) / (2 * len(thresholds))
    at_most = [scipy.stats.beta.ppf(1 - each, k + 1, n - k) for k, n in ((alarms, len(outside)), (misses, len(inside)))]
    rates = [np.where(np.isnan(rate), 1.0, rate) for rate in at_most]  # of n of n nothing below 1 can be said
    mu = float(np.max(scipy.stats.norm.isf(rates[0]) - scipy.stats.norm.ppf(rates[1])))
    return float(dp_accounting.get_epsilon_gaussian(1 / mu, delta)) if mu > 0 else 0.0


def counting_bound(scores: Scores, delta: float, confidence: float = CONFIDENCE) -> float:
    """Epsilon at delta that any mechanism must have for scores of independent runs to be this far apart: the largest of
    ln((TPR - delta) / FPR) over thresholds by Clopper-Pearson bounds, Bonferroni over thresholds (Jagielski et al. 2020, "Auditing
    differentially private machine learning"; Nasr et al. 2021).

    Of n runs a side it can show no more than about ln(n / 12) at 95 % confidence, however bad the mechanism is.
    """
    auditor = _auditor(scores, delta, confidence)
    return max(0.0, float(auditor.epsilon_clopper_pearson(1 - confidence, delta, one_sided=False)))


def one_run_bound(scores: Scores, delta: float, confidence: float = CONFIDENCE) -> float:
    """Epsilon at delta shown by the canaries of one run, each of which was in it by a fair coin of its own (Steinke, Nasr & Jagielski 2023,
    "Privacy auditing with one (1) training run", Theorem 5.2; one-sided, Bonferroni over thresholds).

    scores: one a canary. The canaries must be exchangeable before their coins are thrown, and each one unit of the claimed guarantee.
    """
    return float(_auditor(scores, delta, confidence).epsilon_one_run(1 - confidence, delta))


def true_positive_rate(scores: Scores, false_positive_rate: float, confidence: float = CONFIDENCE) -> Interval:
    """The share of members above the threshold that at most this share of the others exceeds, with its Clopper-Pearson interval.

    What Carlini et al. 2022 ask of membership inference: success at a low false positive rate. The interval is of the members' share
    at this threshold; it leaves out that the threshold is itself an estimate. Raises FlJaxError for a rate outside (0, 1).
    """
    inside, outside = _checked(scores)
    if not 0 < false_positive_rate < 1:
        raise FlJaxError(f"A false positive rate must be between 0 and 1, and is {false_positive_rate}.")
    _confident(confidence)
    # the highest scores outside that may be exceeded: never more than the rate allows
    allowed = math.floor(false_positive_rate * len(outside))
    threshold = np.sort(outside)[::-1][allowed]
    hits, n = int((inside > threshold).sum()), len(inside)
    found = scipy.stats.binomtest(hits, n).proportion_ci(confidence, method="exact")
    return Interval(hits / n, float(found.low), float(found.high), n, 0, confidence)


def area_under_curve(scores: Scores) -> float:
    """The probability that a member scores higher than another record, ties half."""
    inside, outside = _checked(scores)
    return float(auditing.CanaryScoreAuditor(inside, outside).attack_auroc())


def _auditor(scores: Scores, delta: float, confidence: float) -> auditing.CanaryScoreAuditor:
    _probable(delta)
    _confident(confidence)
    return auditing.CanaryScoreAuditor(*_checked(scores))


def _probable(delta: float) -> None:
    if not 0 < delta < 1:
        raise FlJaxError(f"delta must lie between 0 and 1, and is {delta}.")


def _confident(confidence: float) -> None:
    if not 0.5 < confidence < 1:
        raise FlJaxError(f"confidence is a probability between 0.5 and 1, such as 0.95, and is {confidence}.")


def _checked(scores: Scores) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    inside, outside = (np.asarray(values, np.float64) for values in scores)
    for name, values in (("inside", inside), ("outside", outside)):
        if values.ndim != 1 or not len(values):
            raise FlJaxError(f"An audit needs a vector of scores {name}, and has an array of shape {values.shape}.")
        if np.isnan(values).any():
            raise FlJaxError(f"{int(np.isnan(values).sum())} of {len(values)} scores {name} are NaN: look at what the attack computes.")
    return inside, outside
