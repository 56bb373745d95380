"""Gradient oracles: what a client calls for the gradient of a mini-batch."""

from fl_jax.gradients.plain import plain

__all__ = ["plain"]
