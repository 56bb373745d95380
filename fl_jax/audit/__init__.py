"""Audits: what an attacker really finds out, beside what was claimed. Canaries, membership inference, label recovery."""

from fl_jax.audit.canaries import alignment, blank, directions, only, with_clients, with_records
from fl_jax.audit.inversion import infer_label
from fl_jax.audit.membership import Shadows, by_likelihood_ratio, by_loss, confidences, shadow_models
from fl_jax.audit.runs import absent, moved, one_run, repeated, watched
from fl_jax.audit.scores import Scores, area_under_curve, counting_bound, gaussian_bound, one_run_bound, true_positive_rate

__all__ = [
    "Scores",
    "Shadows",
    "absent",
    "alignment",
    "area_under_curve",
    "blank",
    "by_likelihood_ratio",
    "by_loss",
    "confidences",
    "counting_bound",
    "directions",
    "gaussian_bound",
    "infer_label",
    "moved",
    "one_run",
    "one_run_bound",
    "only",
    "repeated",
    "shadow_models",
    "true_positive_rate",
    "watched",
    "with_clients",
    "with_records",
]
