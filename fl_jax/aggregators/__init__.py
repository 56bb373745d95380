"""How messages become one pseudo-gradient: means, medians, and client-level differential privacy with a trusted server or without."""

from fl_jax.aggregators.corrected import normalized_mean, with_control
from fl_jax.aggregators.distributed import distributed_private_mean
from fl_jax.aggregators.ftrl import private_ftrl
from fl_jax.aggregators.means import mean, median
from fl_jax.aggregators.private import private_mean
from fl_jax.aggregators.strategies import Strategy, banded, tree
from fl_jax.aggregators.tilted import tilted_mean

__all__ = ["Strategy", "banded", "distributed_private_mean", "mean", "median", "normalized_mean", "private_ftrl", "private_mean",
           "tilted_mean", "tree", "with_control"]
