"""The arms that most studies have: every site in each round, and all sites' records at one place with as many steps."""

from collections.abc import Callable

from fl_jax import algorithms, sampling, training
from fl_jax.data import pooled_train
from fl_jax.types import Batches, FederatedAlgorithm, PyTree


def everyone(name: str, build: Callable[[PyTree], FederatedAlgorithm]) -> training.Arm:
    """An arm of which all sites take part in each round, weighted by their records."""
    return training.Arm(name, build, lambda sites: sampling.everyone())


def at_one_place(name: str, build: Callable[[PyTree], FederatedAlgorithm], work: Batches) -> training.Arm:
    """Centralized training of as many steps as all sites make together, each by `work`."""
    return training.Arm(name, build, lambda sites: algorithms.matched_budget(sampling.everyone(), work, sites), pooled_train)
