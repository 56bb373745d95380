"""What a run has spent: an immutable list of privacy costs for one unit and one neighbouring relation, and its epsilon."""

import dataclasses
import enum
import hashlib
import json
import operator
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import dp_accounting
from dp_accounting import NeighboringRelation

from fl_jax.errors import FlJaxError
from fl_jax.privacy.accounting import Accountant, epsilon, natural_relation
from fl_jax.privacy.events import checked, describe, event_from_dict, event_to_dict

if TYPE_CHECKING:  # jax, which the command line does without
    from fl_jax.types import FederatedAlgorithm, Sampling

NOT_AMPLIFIED = "no amplification by sampling"
_FORMAT = 1


class Unit(enum.StrEnum):
    """Whose presence is hidden: a whole client, or one record at a site (what one coin of the sampler draws). They are never added up."""

    CLIENT = "client"
    RECORD = "record"


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one round costs.

    event: after the sampler's amplification; noise in clips (see fl_jax.privacy.events). unit: what is protected. label: the mechanism
    and the sampling in words; default: from the event. site: the one site whose units pay, None where all pay. every: for how many rounds
    the event pays, e.g. those between two restarts of DP-FTRL; it is spent in the first of them.
    Raises FlJaxError for an event that is not one of dp_accounting's or has a field out of range.
    """

    event: dp_accounting.DpEvent
    unit: Unit
    label: str = ""
    site: str | None = None
    every: int = 1

    def __post_init__(self) -> None:
        event, every = checked(self.event), _whole(self.every)
        if every < 1:
            raise FlJaxError("A privacy cost is spent every 1 or more rounds, and not every 0.")
        label = self.label or describe(event) + (f", once every {every} rounds" if every > 1 else "")
        for name, value in (("event", event), ("unit", Unit(self.unit)), ("label", label), ("every", every)):
            object.__setattr__(self, name, value)

    def times(self, rounds: int) -> int:
        """How often so many rounds from the start spend the event."""
        return -(-rounds // self.every)


class Entry(NamedTuple):
    """A cost, and in how many rounds it was spent."""

    cost: Cost
    rounds: int


@dataclasses.dataclass(frozen=True)
class PrivacyLedger:
    """All that was spent on one unit under one neighbouring relation, by one run. Immutable; an entry for each cost, in order of first
    spending. Runs of several seeds are alternatives: each has spent its own ledger, and who publishes them all has spent their sum.

    name: what a unit is in the data, e.g. "image" for a record: what one coin of the sampler draws is not always a patient. Default: the
    unit's own. Outside of the ledger is whatever has no event: `coverage` says what.
    """

    unit: Unit
    relation: NeighboringRelation
    entries: tuple[Entry, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit", Unit(self.unit))
        object.__setattr__(self, "name", self.name or self.unit.value)

    def spend(self, cost: Cost, rounds: int = 1) -> Self:
        """The ledger after so many more rounds of a cost. Raises FlJaxError for a cost to another unit and for a negative number."""
        return self.spend_each((cost,), rounds)

    def spend_each(self, costs: Iterable[Cost], rounds: int = 1) -> Self:
        """The ledger after so many more rounds, each of which has all these costs; see `spend`."""
        totals = dict(self.entries)
        for cost in costs:
            if cost.unit is not self.unit:
                raise FlJaxError(f"A cost to a {cost.unit} cannot be added to the ledger of a {self.unit}: keep one ledger a unit.")
            totals[cost] = totals.get(cost, 0) + _whole(rounds)
        return dataclasses.replace(self, entries=tuple(Entry(cost, total) for cost, total in totals.items() if total > 0))

    def epsilon(self, delta: float, accountant: Accountant = Accountant.RDP) -> float:
        """Epsilon at delta of everything spent so far (accounting.CONVERSION says how); infinity where it cannot be accounted for.

        Units of different sites are disjoint, so that what one site's units pay does not add to another's: the worst site counts.
        Raises FlJaxError for a delta outside (0, 1).
        """
        return max(self.epsilons(delta, accountant).values())

    def epsilons(self, delta: float, accountant: Accountant = Accountant.RDP) -> dict[str | None, float]:
        """`epsilon` of the units of each site that something was spent at; of all units, by the name None, where no cost names a site."""
        paid: dict[str | None, list[tuple[dp_accounting.DpEvent, int]]] = {None: []}
        for cost, rounds in self.entries:
            paid.setdefault(cost.site, []).append((cost.event, cost.times(rounds)))
        everywhere = paid.pop(None)
        known: dict[tuple[tuple[dp_accounting.DpEvent, int], ...], float] = {}
        found = {}
        for site, own in (paid or {None: []}).items():
            spent = (*everywhere, *own)
            if spent not in known:
                known[spent] = epsilon(spent, self.relation, delta, accountant)
            found[site] = known[spent]
        return found

    def to_json(self) -> str:
        """The ledger as JSON text with a digest of its content, which `from_json` checks; numbers are kept to the last bit."""
        content: dict[str, Any] = {
            "format": _FORMAT,
            "unit": self.unit.value,
            "name": self.name,
            "relation": self.relation.name,
            "entries": [
                {"event": event_to_dict(cost.event), "rounds": rounds, "label": cost.label, "site": cost.site, "every": cost.every}
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
            ledger = cls(Unit(content["unit"]), NeighboringRelation[content["relation"]], name=content["name"])
            for entry in content["entries"]:
                cost = Cost(event_from_dict(entry["event"]), ledger.unit, entry["label"], entry["site"], entry["every"])
                ledger = ledger.spend(cost, entry["rounds"])
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
    period = f", once every {algorithm.client_period} rounds" if private and algorithm.client_period > 1 else ""
    label = describe(sampled) + period + (f", {NOT_AMPLIFIED}" if private and sampled == event else "")
    return Cost(sampled, Unit.CLIENT, label, every=algorithm.client_period)


def record_costs(algorithm: "FederatedAlgorithm", sizes: Mapping[str, int]) -> tuple[Cost, ...]:
    """What one round costs the records of each site: the steps of its private gradient, with what the sampling of records earns there.

    sizes: the number of training records of each site by its name; a site without any takes no part and pays nothing. A site pays in
    every round, whether or not it is in the cohort: what a sampling of sites would earn its records is not claimed.
    """
    return tuple(Cost(algorithm.record_event(size), Unit.RECORD, site=site) for site, size in sizes.items() if size > 0)


def open_ledger(cost: Cost, relation: NeighboringRelation | None = None, name: str = "") -> PrivacyLedger:
    """An empty ledger for a cost. relation: default: the one under which its sampling is commonly accounted (natural_relation). name: what a
    unit is in the data."""
    return PrivacyLedger(cost.unit, natural_relation(cost.event) if relation is None else relation, name=name)


def coverage(ledger: PrivacyLedger) -> list[str]:
    """What a ledger's epsilon is about and what it is not, as sentences for a report."""
    relation = {
        NeighboringRelation.ADD_OR_REMOVE_ONE: f"whether one {ledger.name} is there or not",
        NeighboringRelation.REPLACE_ONE: f"what one {ledger.name} is, given that it is there",
    }.get(ledger.relation, f"one {ledger.name} being replaced by nothing")
    sentences = [
        f"Epsilon hides {relation}" + (", at its site" if ledger.unit is Unit.RECORD else ", with all its records") + ".",
        ("It covers the models that are sent, not these metrics, nor statistics that are shared in the clear, nor hyper-parameters that "
         "were chosen by looking at data; numbers of records and of sites count as public."),
        "Seeds are alternatives: epsilon is of one run, and publishing several adds up.",
    ]
    if ledger.unit is Unit.RECORD:
        sentences.append("Every site pays in every round: the sampling of sites earns its records no amplification.")
    elif any(NOT_AMPLIFIED in entry.cost.label for entry in ledger.entries):
        sentences.append("Every site takes part in every round, or might: there is no amplification by sampling.")
    return sentences


def difference(stored: PrivacyLedger, planned: PrivacyLedger) -> str | None:
    """How a stored ledger differs from the one that a run would have by its own account, as a clause; None where they agree."""
    for what, there, here in (
        ("unit", stored.unit, planned.unit), ("unit", stored.name, planned.name), ("relation", stored.relation.name, planned.relation.name),
        ("number of costs", len(stored.entries), len(planned.entries)),
    ):
        if there != here:
            return f"the {what} was {there} and is {here}"
    for (old, rounds), (new, now) in zip(stored.entries, planned.entries, strict=True):
        if old != new:
            site = f" at {old.site}" if old.site is not None else ""
            parted = [(old.label, new.label), (str(old.event), str(new.event)), (f"at {old.site}", f"at {new.site}"), (str(old.every), str(new.every))]
            there, here = next(pair for pair in parted if pair[0] != pair[1])
            return f"a round's cost{site} was {there} and is {here}"
        if rounds != now:
            return f"{rounds} rounds were spent on {old.label}, and not {now}"
    return None


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
