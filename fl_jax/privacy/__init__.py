"""Differential privacy: what a run has spent, in events that its mechanisms and samplers state, and what that amounts to."""

from dp_accounting import NeighboringRelation

from fl_jax.privacy.accounting import CONVERSION, Accountant, natural_relation, sensitivity
from fl_jax.privacy.budget import Account, Budget, Guarantee
from fl_jax.privacy.calibration import calibrate
from fl_jax.privacy.events import describe
from fl_jax.privacy.ledger import Cost, Entry, PrivacyLedger, Unit, client_cost, coverage, difference, open_ledger, record_costs

__all__ = [
    "CONVERSION",
    "Account",
    "Accountant",
    "Budget",
    "Cost",
    "Entry",
    "Guarantee",
    "NeighboringRelation",
    "PrivacyLedger",
    "Unit",
    "calibrate",
    "client_cost",
    "coverage",
    "describe",
    "difference",
    "natural_relation",
    "open_ledger",
    "record_costs",
    "sensitivity",
]
