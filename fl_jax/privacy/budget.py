"""A budget, and what it leaves: how many rounds are affordable is known before any is run, since costs do not depend on data."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from dp_accounting import NeighboringRelation

from fl_jax.errors import FlJaxError
from fl_jax.privacy.accounting import Accountant
from fl_jax.privacy.ledger import Cost, PrivacyLedger, Unit, open_ledger


@dataclasses.dataclass(frozen=True)
class Budget:
    """As much as may be spent: epsilon at delta, as one accountant computes it. Raises FlJaxError for an epsilon or a delta that is none."""

    epsilon: float
    delta: float
    accountant: Accountant = Accountant.RDP

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < math.inf:
            raise FlJaxError(f"A budget's epsilon must be above 0 and finite, and is {self.epsilon}.")
        if not 0 < self.delta < 1:
            raise FlJaxError(f"A budget's delta must lie between 0 and 1, and is {self.delta}: choose it well below 1 / (number of units).")
        object.__setattr__(self, "accountant", Accountant(self.accountant))

    def allows(self, ledger: PrivacyLedger) -> bool:
        """Whether what was spent is within the budget."""
        return ledger.epsilon(self.delta, self.accountant) <= self.epsilon

    def __str__(self) -> str:
        return f"epsilon {self.epsilon:g} at delta {self.delta:g} by {self.accountant.upper()}"


@dataclasses.dataclass(frozen=True)
class Account:
    """What one run spends on one unit: the ledger before its first round, and the costs of each round. Its ledger is a function of the
    number of rounds alone: rounds that are run once more after a kill have the same randomness and the same output, and are spent once."""

    opening: PrivacyLedger
    costs: tuple[Cost, ...]
    delta: float
    budget: Budget | None = None
    accountant: Accountant = Accountant.RDP

    @property
    def by_pld(self) -> bool:
        """Whether epsilon is to be stated by PLD too."""
        return Accountant.PLD in (self.accountant, self.budget.accountant if self.budget is not None else None)

    def after(self, rounds: int) -> PrivacyLedger:
        """The ledger after so many rounds."""
        return self.opening.spend_each(self.costs, rounds)

    def affordable(self, most: int) -> int:
        """How many rounds, of at most `most`, end within the budget; 0 where the first would overspend it, and `most` without a budget."""
        if self.budget is None or self.budget.allows(self.after(most)):
            return most
        if not self.budget.allows(self.after(1)):
            return 0
        low, high = 1, most  # the budget allows low and not high; costs add up, so that there is one number between them
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.budget.allows(self.after(middle)) else (low, middle)
        return low

    def left(self, done: int, most: int) -> int:
        """How many more rounds than `done` the budget would allow, if asked for; at most `most`."""
        return max(0, self.affordable(done + most) - done)


@dataclasses.dataclass(frozen=True)
class Guarantee:
    """What an arm of a study promises: the unit, at which delta epsilon is stated, and a budget that it must stay within.

    unit: Unit.CLIENT, paid by the aggregator's mechanism, or Unit.RECORD, paid by the gradients of each site's steps; the costs are what
    the algorithm and the samplers state of themselves. delta: default: the budget's. name: what a unit is in the data, e.g. "image".
    relation: default: the one under which the sampling is commonly accounted. spent: what was spent on the same units before this run.
    accountant: PLD is the tighter and the slower one: .1 to 1 s for each evaluation. RDP is always computed, after each round.
    Raises FlJaxError for a delta outside (0, 1), for two deltas, and for an earlier ledger of another unit.
    """

    unit: Unit
    delta: float | None = None
    budget: Budget | None = None
    name: str = ""
    relation: NeighboringRelation | None = None
    spent: PrivacyLedger | None = None
    accountant: Accountant = Accountant.RDP

    def __post_init__(self) -> None:
        delta = self.delta if self.delta is not None or self.budget is None else self.budget.delta
        if delta is None or not 0 < delta < 1:
            raise FlJaxError(f"A guarantee's delta must lie between 0 and 1, and is {delta}: choose it well below 1 / (number of units).")
        if self.budget is not None and self.budget.delta != delta:
            raise FlJaxError(f"The budget is at delta {self.budget.delta:g} and the guarantee at {delta:g}: state one delta.")
        for name, value in (("unit", Unit(self.unit)), ("delta", delta), ("accountant", Accountant(self.accountant))):
            object.__setattr__(self, name, value)
        if self.spent is not None:
            name = self.name or self.unit.value
            if (self.spent.unit, self.spent.name) != (self.unit, name):
                raise FlJaxError(f"The ledger of what was spent before is of a {self.spent.name}, and the guarantee of a {name}: they cannot be added.")

    def account(self, costs: Sequence[Cost]) -> Account:
        """The account of a run with these costs a round. Raises FlJaxError for costs that need two relations or another than was spent."""
        relation = self.relation or (self.spent.relation if self.spent is not None else None)
        opened = [open_ledger(cost, relation, self.name) for cost in costs]
        opening = opened[0] if opened else PrivacyLedger(self.unit, relation or NeighboringRelation.ADD_OR_REMOVE_ONE, name=self.name)
        if any(ledger != opening for ledger in opened):
            raise FlJaxError("The costs of a round are commonly accounted under two relations: choose one by `relation`.")
        if self.spent is not None:
            if self.spent.relation is not opening.relation:
                raise FlJaxError(f"What was spent before is accounted under {self.spent.relation.name}, and this run under "
                                 f"{opening.relation.name}: give both one relation.")
            opening = self.spent
        assert self.delta is not None
        return Account(opening, tuple(costs), self.delta, self.budget, self.accountant)


def affordable(accounts: Iterable[Account], rounds: int) -> tuple[int, Account | None]:
    """How many of `rounds` all accounts allow, and the one that allows no more, if any does not allow all."""
    tightest = None
    for account in accounts:
        allowed = account.affordable(rounds)
        if allowed < rounds:
            rounds, tightest = allowed, account
    return rounds, tightest
