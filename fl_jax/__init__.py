"""Federated learning experiments in JAX: rounds as pure functions, studies as one compiled program."""

__version__ = "0.1.0"
