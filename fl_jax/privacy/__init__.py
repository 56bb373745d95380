"""Differential privacy: what a run has spent, in events that its mechanisms and samplers state, and what that amounts to."""

from dp_accounting import NeighboringRelation

from fl_jax.privacy.accounting import CONVERSION, Accountant, natural_relation, sensitivity
from fl_jax.privacy.events import describe
from fl_jax.privacy.ledger import Cost, Entry, PrivacyLedger, Unit, client_cost, open_ledger

__all__ = [
    "CONVERSION",
    "Accountant",
    "Cost",
    "Entry",
    "NeighboringRelation",
    "PrivacyLedger",
    "Unit",
    "client_cost",
    "describe",
    "natural_relation",
    "open_ledger",
    "sensitivity",
]
