"""What federation is measured against, as the same client with the same budget: local-only and centralized training."""

import jax.numpy as jnp
import optax

from fl_jax.algorithms.averaging import fedavg
from fl_jax.clients import everything_local
from fl_jax.core import ONE_LANE, Engine
from fl_jax.norms import NormPolicy
from fl_jax.sampling import ALL_STEPS
from fl_jax.types import Array, Batches, Cohort, FederatedAlgorithm, Gradient, Key, Model, Sampling, Sites, no_amplification

ALONE = NormPolicy("nothing shared", everything_local)


def local_only(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, *, gradient: Gradient | None = None, engine: Engine = ONE_LANE
) -> FederatedAlgorithm:
    """Every site trains its own model and sends nothing: FedAvg in which every leaf stays at its site.

    With the same sampling as the federation it makes the same steps, and like there the optimizer starts anew in each round.
    """
    return fedavg(model, optimizer, batches, norms=ALONE, gradient=gradient, engine=engine)


def centralized(
    model: Model, optimizer: optax.GradientTransformation, batches: Batches, *, gradient: Gradient | None = None, engine: Engine = ONE_LANE
) -> FederatedAlgorithm:
    """One site that holds everybody's records (data.pooled_train): an upper bound that privacy rules out.

    Use it with `matched_budget`, so that a round makes as many gradient steps as all sites of a federated round together.
    """
    return fedavg(model, optimizer, batches, gradient=gradient, engine=engine)


def matched_budget(sampling: Sampling, batches: Batches, sites: Sites) -> Sampling:
    """Gives the one pooled site of the centralized arm the steps that a cohort of `sampling` would make in the same round.

    sites: those of the federation. The pooled client needs `pooled_batches(batches)`, so that only this cap bounds its steps.
    """

    def draw(key: Key, t: Array, pooled: Sites) -> Cohort:
        del pooled
        cohort = sampling.draw(key, t, sites)
        size = jnp.take(sites.size, cohort.ids, mode="clip")
        steps = jnp.where(cohort.weight > 0, jnp.minimum(batches.steps(size), cohort.steps), 0).sum().astype(jnp.int32)
        return Cohort(jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.float32), steps[None])

    return Sampling(draw, no_amplification)


def pooled_batches(batches: Batches) -> Batches:
    """`batches` without an end of their own: as many steps as the cohort asks for, through the records in passes."""
    return batches._replace(steps=lambda num_records: jnp.full_like(num_records, ALL_STEPS))
