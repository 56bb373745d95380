"""What the study of differential privacy on Fed-Heart-Disease measured: accuracies by start, what labels' noise costs, and the
claims' values."""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.common.report import Results
from experiments.dp_fed_heart_disease_protocol import (
    AS_RUN,
    BATCH,
    FEDERATED,
    INTERCEPTS,
    LOCAL,
    LOCAL_PAYS,
    METRIC,
    PASSES_FACTOR,
    POISSON_FACTOR,
    ROUNDS,
    UPDATES,
    WITHOUT_DP,
    Config,
    as_many_steps,
    at_published_rate,
    chosen,
    claims,
    cost,
    costs_at,
    costs_at_label,
    gains,
    labelled,
    minus_local,
    noises,
    spends,
)
from experiments.flamby import opacus
from fl_jax.data import FederatedDataset
from fl_jax.privacy import Accountant, PrivacyLedger

if TYPE_CHECKING:
    from experiments.dp_fed_heart_disease import Chosen


class Measured:
    """The last round's metrics, the ledgers, what the labels' noise costs, and what is claimed of them."""

    def __init__(
        self, config: Config, dataset: FederatedDataset, metrics: pd.DataFrame, choices: "Mapping[str, Chosen]",
        ledgers: Mapping[str, PrivacyLedger],
    ) -> None:
        self.config, self.dataset, self.choices, self.ledgers = config, dataset, choices, ledgers
        self.results = Results(metrics)
        sizes = dataset.train.sizes
        self.largest, self.smallest = int(np.argmax(sizes)), int(np.argmin(sizes))

    def mean(self, arm: str) -> npt.NDArray[np.float64]:
        """float64[S]: the mean accuracy over hospitals, by start."""
        return self.results.values(arm, "test", "mean", METRIC)

    def patients(self, arm: str) -> npt.NDArray[np.float64]:
        """float64[S]: the accuracy over all patients, by start."""
        return self.results.values(arm, "test", "all", METRIC)

    def lost(self, label: tuple[float, float], arm: str = AS_RUN) -> npt.NDArray[np.float64]:
        """float64[S]: an arm at a label minus FedAvg without differential privacy, from the same start."""
        return self.mean(f"{arm}{labelled(*label)}") - self.mean(at_published_rate(FEDERATED))

    @cached_property
    def noises(self) -> dict[tuple[float, float], list[float]]:
        """The noise, in clips, of each hospital by label."""
        return {label: noises(label, self.dataset.train.sizes) for label in self.config.pairs}

    @cached_property
    def spent(self) -> dict[tuple[float, float], list[opacus.Spent]]:
        """What a label's noise costs at each hospital."""
        sizes = [int(size) for size in self.dataset.train.sizes]
        steps = ROUNDS * UPDATES
        return {
            label: [opacus.spent(noise, size, BATCH, steps, label[1]) for noise, size in zip(own, sizes, strict=True)]
            for label, own in self.noises.items()}

    def worst(self, label: tuple[float, float]) -> opacus.Spent:
        """What a label's noise costs at most, each by its own worst hospital."""
        return opacus.Spent(*(max(values) for values in zip(*self.spent[label], strict=True)))

    def ledger_epsilon(self, arm: str) -> float:
        """What an arm has spent, by PLD."""
        return self.ledgers[arm].epsilon(self.config.delta, Accountant.PLD)

    def cost(self, arm: str, epsilon: float) -> npt.NDArray[np.float64]:
        """float64[S]: the accuracy over all patients of an arm with what the grid chose without differential privacy, minus that
        within a budget."""
        return self.patients(chosen(arm)) - self.patients(chosen(arm, epsilon))

    def measured(self) -> dict[str, Any]:
        """By the text of each claim what was measured."""
        config = self.config
        found: dict[str, Any] = {WITHOUT_DP: self.mean(at_published_rate(FEDERATED))}
        for epsilon in config.labels:
            found[costs_at_label(epsilon)] = np.mean([self.lost((epsilon, delta)) for delta in config.deltas], axis=0)
        found |= {costs_at(*label): self.lost(label) for label in config.pairs}
        found[POISSON_FACTOR] = [min(self.worst(label).pld / label[0] for label in config.pairs)]
        found[PASSES_FACTOR] = [min(self.worst(label).passes / label[0] for label in config.pairs)]
        for epsilon in config.epsilons:
            for arm in (chosen(FEDERATED, epsilon), as_many_steps(epsilon)):
                found[spends(arm)] = [self.ledger_epsilon(arm) / epsilon]
        for less, more in zip(config.epsilons[:-1], config.epsilons[1:], strict=True):
            found[gains(more, less)] = self.patients(chosen(FEDERATED, more)) - self.patients(chosen(FEDERATED, less))
        found[cost(config.epsilons[-1])] = self.cost(FEDERATED, config.epsilons[-1])
        if not config.quick:
            first = config.epsilons[0]
            found[LOCAL_PAYS.format(first)] = self.cost(LOCAL, first) - self.cost(FEDERATED, first)
            for arm in (FEDERATED, INTERCEPTS):
                found[minus_local(arm, first)] = self.patients(chosen(arm, first)) - self.patients(chosen(LOCAL, first))
        wanted = {claim.claim for claim in claims(config)}
        return {text: values for text, values in found.items() if text in wanted}
