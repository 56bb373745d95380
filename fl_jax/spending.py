"""What the arms of a study spend on privacy: their accounts, how many rounds a budget allows, and the ledger in rows and checkpoints.

Costs are what the algorithm and the samplers state of themselves, never given a second time. They do not depend on data, so that the
rounds which a budget allows are known before the first, and the ledger after a round is a function of the number of rounds: a run that is
killed and repeats rounds, with the same randomness, has the same output and has spent the same. That is so for the same records: who
changes them in between and publishes both models has used one noise twice, which no ledger sees.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fl_jax.arms import Arm, Runs, Study, row_of
from fl_jax.errors import FlJaxError
from fl_jax.privacy import Account, Accountant, Guarantee, PrivacyLedger, Unit, client_cost, difference, record_costs
from fl_jax.privacy.budget import affordable
from fl_jax.results.rows import Label
from fl_jax.results.run_folder import MetricRow
from fl_jax.types import FederatedAlgorithm, Sampling


class Spending(NamedTuple):
    """What an arm spends. accounts: those that differ, each with one entry for each guarantee. of_run: int, for each run, which is its own.

    The runs of an arm are alternatives: each has spent what its own ledger says. They differ where their data sets or noise do.
    """

    accounts: tuple[tuple[Account, ...], ...] = ()
    of_run: tuple[int, ...] = ()

    def ledgers(self, rounds: int) -> tuple[tuple[PrivacyLedger, ...], ...]:
        """Of each run after so many rounds, one for each guarantee."""
        after = [tuple(account.after(rounds) for account in own) for own in self.accounts]
        return tuple(after[index] for index in self.of_run)


NOTHING = Spending()
_PROJECTED = 10  # times the planned rounds: how far ahead what a budget would allow is looked for


def spending_of(study: Study, arm: Arm, runs: Runs, guarantees: Sequence[Guarantee]) -> Spending:
    """The accounts of an arm's runs, from what its algorithm and its samplers state. Raises FlJaxError where they state no number."""
    if not guarantees:
        return NOTHING
    sampling = _sampling(study, arm)
    sizes = _sizes(study, arm, runs) if any(guarantee.unit is Unit.RECORD for guarantee in guarantees) else {}
    accounts: dict[tuple[Account, ...], int] = {}
    of_run = []
    for run, data in enumerate(np.asarray(runs.data).tolist()):
        algorithm = arm.build(jax.tree.map(lambda leaf, run=run: leaf[run], runs.hyper))
        own = tuple(_account(guarantee, algorithm, sampling, sizes.get(data, {})) for guarantee in guarantees)
        of_run.append(accounts.setdefault(own, len(accounts)))
    return Spending(tuple(accounts), tuple(of_run))


def within_budget(arm: Arm, spending: Spending, rounds: int) -> tuple[Arm, str]:
    """The arm with as many of its rounds as its budgets allow, and a sentence about how many these are; "" without a budget.

    Raises FlJaxError where the first round would overspend.
    """
    accounts = [account for own in spending.accounts for account in own if account.budget is not None]
    allowed, tightest = affordable(accounts, rounds)
    if tightest is None:
        left = min((account.left(rounds, _PROJECTED * rounds) for account in accounts), default=0)
        more = f"{left} more" if left < _PROJECTED * rounds else f"{left} more and beyond"
        return arm, f"{arm.name}: the privacy budget allows all {rounds} rounds, and would allow {more}." if accounts else ""
    assert tightest.budget is not None
    name, budget = tightest.opening.name, tightest.budget
    would, after = (tightest.after(n).epsilon(budget.delta, budget.accountant) for n in (allowed + 1, allowed))
    if allowed == 0:
        raise FlJaxError(
            f"{arm.name}: the budget of each {name}, {budget}, does not allow one round, which would raise epsilon from {after:.4g} to "
            f"{would:.4g}: raise the noise or the budget, or make rounds cheaper.")
    return arm._replace(rounds=allowed), (
        f"{arm.name}: the budget of each {name}, {budget}, allows {allowed} of {rounds} rounds; there epsilon is {after:.4g}, and the next round "
        f"would make it {would:.4g}.")


def epsilon_rows(labels: Sequence[Label], first: int, last: int, spending: Spending) -> Iterator[MetricRow]:
    """Rows of split "round" for rounds first to last: epsilon_UNIT_rdp after each ("all" clients, or the records of the "worst" site), and
    after the last one also that of each site's records, and epsilon_UNIT_pld where a guarantee or its budget is by PLD."""
    tables = [[entry for account in own for entry in _measured(account, first, last)] for own in spending.accounts]
    for label, index in zip(labels, spending.of_run, strict=False):  # an arm that promises nothing has no accounts
        for after, site, metric, value in tables[index]:
            yield MetricRow(*label, after, "round", site, metric, value)


def _measured(account: Account, first: int, last: int) -> Iterator[tuple[int, str, str, float]]:
    """(round, site, metric, epsilon) for `epsilon_rows`."""
    everybody = "all" if account.opening.unit is Unit.CLIENT else "worst"
    for after in range(first, last + 1):
        for accountant in Accountant if after == last and account.by_pld else (Accountant.RDP,):
            metric = f"epsilon_{account.opening.unit}_{accountant}"
            found = _epsilons(account, after, accountant)
            yield after, everybody, metric, max(found.values())
            for site, value in found.items() if after == last else ():
                if site is not None:
                    yield after, site, metric, value


def worst_epsilon(spending: Spending, rounds: int) -> float | None:
    """The largest epsilon by RDP after so many rounds, for a progress bar; None where nothing is promised."""
    return max((max(_epsilons(account, rounds, Accountant.RDP).values()) for own in spending.accounts for account in own), default=None)


def to_meta(spending: Spending, rounds: int) -> Any:
    """What a checkpoint after so many rounds holds of the ledgers."""
    return {
        "of_run": list(spending.of_run),
        "accounts": [[{"ledger": account.after(rounds).to_json(), "delta": account.delta} for account in own] for own in spending.accounts],
    }


def check_meta(arm: str, meta: Mapping[str, Any], spending: Spending, rounds: int) -> None:
    """Raises FlJaxError, with the difference, where the ledgers of a checkpoint are not those of this run after as many rounds."""
    stored = meta.get("privacy") or to_meta(NOTHING, 0)
    try:
        accounts = [[(PrivacyLedger.from_json(entry["ledger"]), entry["delta"]) for entry in own] for own in stored["accounts"]]
        of_run = tuple(stored["of_run"])
    except (KeyError, TypeError) as error:
        raise FlJaxError(f"The privacy ledger in the checkpoint of {arm} is damaged or was edited: restore it from an intact one.") from error
    there, here = (sum(len(own) for own in each) for each in (accounts, spending.accounts))
    if not there or not here:
        if there != here:
            raise FlJaxError(f"The checkpoint of {arm} has {'a' if there else 'no'} privacy ledger and this run promises {'something' if here else 'nothing'}: "
                             "resume with the guarantees that it was started with, or start another run.")
        return
    for own, planned in zip(accounts, spending.accounts, strict=False):
        for (ledger, delta), account in zip(own, planned, strict=False):
            what = difference(ledger, account.after(rounds))
            if what is None and delta != account.delta:
                what = f"delta was {delta:g} and is {account.delta:g}"
            if what is not None:
                raise FlJaxError(f"{arm} cannot be resumed with another privacy cost: {what}; use the one that it was started with, or start another run.")
    if of_run != spending.of_run or [len(own) for own in accounts] != [len(own) for own in spending.accounts]:
        raise FlJaxError(f"{arm} cannot be resumed with other guarantees or runs than it was started with: use these, or start another run.")


def _account(guarantee: Guarantee, algorithm: FederatedAlgorithm, sampling: Sampling, sizes: Mapping[str, int]) -> Account:
    costs = (client_cost(algorithm, sampling),) if guarantee.unit is Unit.CLIENT else record_costs(algorithm, sizes)
    return guarantee.account(costs)


def _sampling(study: Study, arm: Arm) -> Sampling:
    """The sampler of an arm, which is made of shapes alone, as in its compiled program."""
    made: list[Sampling] = []
    jax.eval_shape(lambda splits: made.append(arm.sampling(row_of(splits, jnp.int32(0)).train)), study.splits)
    return made[0]


def _sizes(study: Study, arm: Arm, runs: Runs) -> dict[int, dict[str, int]]:
    """For each data set of the runs, how many training records each client of the arm has."""
    seen = jax.jit(lambda splits, data: arm.view(row_of(splits, data)).train.size)
    found = {}
    for data in sorted(set(np.asarray(runs.data).tolist())):
        sizes = np.asarray(seen(study.splits, jnp.int32(data))).tolist()
        own = len(sizes) == len(study.site_names)
        names = study.site_names if own else [f"client {k}" for k in range(len(sizes))]
        found[data] = dict(zip(names, sizes, strict=True))
    return found


def _epsilons(account: Account, rounds: int, accountant: Accountant) -> dict[str | None, float]:
    return account.after(rounds).epsilons(account.delta, accountant)
