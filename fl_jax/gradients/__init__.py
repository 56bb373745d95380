"""Gradient oracles: what a client calls for the gradient of a mini-batch, plain, after an
inner step (Per-FedAvg), or private for each record (DP-SGD)."""

from fl_jax.gradients.meta import meta
from fl_jax.gradients.noise import gaussian
from fl_jax.gradients.plain import plain
from fl_jax.gradients.private import private, private_reference
from fl_jax.gradients.scaling import FLAT, PER_LAYER, Scaling, normalised

__all__ = ["FLAT", "PER_LAYER", "Scaling", "gaussian", "meta", "normalised", "plain", "private", "private_reference"]
