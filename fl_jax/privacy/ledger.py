"""What a run has spent: an immutable list of privacy costs for one unit and one neighbouring relation, and its epsilon."""

import dataclasses
import enum
import hashlib
import json
import operator
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import dp_accounting
from dp_accounting import NeighboringRelation

from fl_jax.errors import FlJaxError
from fl_jax.privacy.accounting import Accountant, epsilon, natural_relation
from fl_jax.privacy.events import checked, describe, event_from_dict, event_to_dict

if TYPE_CHECKING:  # jax, which the command line does without
    from fl_jax.types import FederatedAlgorithm, Sampling

_FORMAT = 1


class Unit(enum.StrEnum):
    """Whose presence is hidden: a whole client, or one record at a site (what one coin of the sampler draws). They are never added up."""

    CLIENT = "client"
    RECORD = "record"


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one round costs.

    event: after the sampler's amplification; noise in clips (see fl_jax.privacy.events). unit: what is protected. label: the mechanism
    and the sampling in words; default: from the event. site: the one site whose units pay, None where all pay.
    Raises FlJaxError for an event that is not one of dp_accounting's or has a field out of range.
    """

    event: dp_accounting.DpEvent
    unit: Unit
    label: str = ""
    site: str | None = None

    def __post_init__(self) -> None:
        event = checked(self.event)
        for name, value in (("event", event), ("unit", Unit(self.unit)), ("label", self.label or describe(event))):
            object.__setattr__(self, name, value)


class Entry(NamedTuple):
    """A cost, and in how many rounds it was spent."""

    cost: Cost
    rounds: int


@dataclasses.dataclass(frozen=True)
class PrivacyLedger:
    """All that was spent on one unit under one neighbouring relation. Immutable; an entry for each cost, in order of first spending.

    Outside of it is whatever has no event: metrics, hyper-parameters chosen by looking at data, statistics that are shared in the clear.
    """

    unit: Unit
    relation: NeighboringRelation
    entries: tuple[Entry, ...] = ()

    def spend(self, cost: Cost, rounds: int = 1) -> Self:
        """The ledger after so many more rounds of a cost. Raises FlJaxError for a cost to another unit and for a negative number."""
        if cost.unit is not self.unit:
            raise FlJaxError(f"A cost to a {cost.unit} cannot be added to the ledger of a {self.unit}: keep one ledger a unit.")
        totals = dict(self.entries)
        totals[cost] = totals.get(cost, 0) + _whole(rounds)
        return dataclasses.replace(self, entries=tuple(Entry(cost, total) for cost, total in totals.items() if total > 0))

    def epsilon(self, delta: float, accountant: Accountant = Accountant.RDP) -> float:
        """Epsilon at delta of everything spent so far (accounting.CONVERSION says how); infinity where it cannot be accounted for.

        Units of different sites are disjoint, so that what one site's units pay does not add to another's: the worst site counts.
        Raises FlJaxError for a delta outside (0, 1).
        """
        sites = {entry.cost.site for entry in self.entries} - {None} or {None}
        paid = [[(cost.event, rounds) for cost, rounds in self.entries if cost.site in (None, site)] for site in sites]
        return max(epsilon(spent, self.relation, delta, accountant) for spent in paid)

    def to_json(self) -> str:
        """The ledger as JSON text with a digest of its content, which `from_json` checks; numbers are kept to the last bit."""
        content: dict[str, Any] = {
            "format": _FORMAT,
            "unit": self.unit.value,
            "relation": self.relation.name,
            "entries": [
                {"event": event_to_dict(cost.event), "rounds": rounds, "label": cost.label, "site": cost.site}
                for cost, rounds in self.entries
            ],
        }
        return json.dumps({**content, "digest": _digest(content)}, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The ledger of `to_json`. Raises FlJaxError for a text that is cut short, damaged or edited.

        The digest finds accidents, and edits by whoever does not compute it anew; it is no signature.
        """
        refusal = "The privacy ledger is damaged or was edited, so that what was spent is not known: restore it from an intact checkpoint."
        try:
            content = json.loads(text)
            if content.pop("digest") != _digest(content) or content["format"] != _FORMAT:
                raise FlJaxError(refusal)
            ledger = cls(Unit(content["unit"]), NeighboringRelation[content["relation"]])
            for entry in content["entries"]:
                ledger = ledger.spend(Cost(event_from_dict(entry["event"]), ledger.unit, entry["label"], entry["site"]), entry["rounds"])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise FlJaxError(refusal) from error
        return ledger


def client_cost(algorithm: "FederatedAlgorithm", sampling: "Sampling") -> Cost:
    """What one round of an algorithm under a sampling of clients costs each client: its mechanism with the sampling's amplification.

    With every client in every round there is no amplification, and the label says so.
    """
    event = checked(algorithm.client_event)
    sampled = checked(sampling.amplify(event))
    private = event != dp_accounting.NonPrivateDpEvent()
    return Cost(sampled, Unit.CLIENT, describe(sampled) + (", no amplification by sampling" if private and sampled == event else ""))


def open_ledger(cost: Cost, relation: NeighboringRelation | None = None) -> PrivacyLedger:
    """An empty ledger for a cost. relation: default: the one under which its sampling is commonly accounted (natural_relation)."""
    return PrivacyLedger(cost.unit, natural_relation(cost.event) if relation is None else relation)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _whole(rounds: int) -> int:
    try:
        whole = operator.index(rounds)
    except TypeError as error:
        raise FlJaxError(f"A number of rounds must be whole, and is {rounds!r}.") from error
    if whole < 0:
        raise FlJaxError(f"A number of rounds must not be negative, and is {whole}: what was spent cannot be taken back.")
    return whole
