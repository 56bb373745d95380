"""What becomes of BatchNorm between sites: an explicit value with a name, since codes that leave it open measure different things.

A policy is decided by the class of the module, never by its name: searching names for "bn" misses a ResNet's down-sampling norms.
"""

from typing import NamedTuple

import jax
from flax import linen, nnx

from fl_jax import trees
from fl_jax.clients import nothing_local
from fl_jax.errors import FlJaxError
from fl_jax.types import IsLocal, Model, PyTree

BATCH_NORMS = (linen.BatchNorm, nnx.BatchNorm)


class NormPolicy(NamedTuple):
    """name: stands in every result. is_local: which leaves stay at a site. recalibrate: whether each site measures the statistics anew, on its
    records without their labels, before it uses the model (fl_jax.deployment.recalibrated)."""

    name: str
    is_local: IsLocal
    recalibrate: bool = False


def statistics_of_batch_norm(path: tuple[str, ...], module: type) -> bool:
    """The running mean and variance of every BatchNorm layer."""
    return path[0] == "stats" and issubclass(module, BATCH_NORMS)


def _layers(path: tuple[str, ...], module: type) -> bool:
    del path
    return issubclass(module, BATCH_NORMS)


AVERAGED = NormPolicy("BatchNorm averaged", nothing_local)
"""Scale, bias and running statistics are all averaged."""
LOCAL_STATISTICS = NormPolicy("BatchNorm statistics local", statistics_of_batch_norm)
"""Running statistics stay at the site, scale and bias are shared: SiloBN (Andreux et al. 2020), and what a code does unknowingly that
exchanges only trained parameters."""
LOCAL = NormPolicy("BatchNorm local", _layers)
"""The whole layer stays at the site: FedBN (Li et al. 2021)."""
RECALIBRATED = NormPolicy("BatchNorm recalibrated", nothing_local, recalibrate=True)
"""All is averaged, and each site that uses the model measures the running statistics on its own records first."""


NO_BATCH_NORM = "no BatchNorm"


def named(model: Model, policy: str) -> str:
    """The policy's name as results have it: that there is nothing to decide where a model has no BatchNorm."""
    return policy if any(issubclass(module, BATCH_NORMS) for module in model.modules.values()) else NO_BATCH_NORM


def refuse_statistics(shared: PyTree) -> None:
    """Raises FlJaxError where statistics of BatchNorm are among what is shared, for messages that get noise."""
    measured = trees.by_role(shared, lambda _: False, lambda _: True, lambda _: False)
    if any(jax.tree.leaves(measured)):
        raise FlJaxError("BatchNorm statistics cannot be sent with noise, which would turn a variance negative: "
                         "keep them at the sites (norms.LOCAL or norms.LOCAL_STATISTICS), or use GroupNorm.")
