"""The gradient of what a model is worth after a site has adapted it by one step: Per-FedAvg's oracle."""

import dp_accounting
import jax

from fl_jax.errors import FlJaxError
from fl_jax.types import Array, Batch, Gradient, Key, Metrics, PyTree


def meta(gradient: Gradient, inner_rate: float | Array, *, hessian_step: float | Array | None = None) -> Gradient:
    """The gradient of w -> f(w - inner_rate grad f(w)), estimated on parts of a batch (Fallah et al. 2020, "Personalized federated learning with
    theoretical guarantees: a model-agnostic meta-learning approach", Algorithm 1 and section 5).

    hessian_step: None drops the second derivative (FO); a number delta puts a central difference of gradients in its place (HF: delta along
    the outer gradient; .001 suits float32). Every second or third row of a batch is a part, so that the three samples of the paper are
    disjoint and padding is spread over them: a batch of B rows costs as much as one of B (FO), or 4/3 B (HF). gradient: the oracle of f,
    without state. Metrics: those of the outer gradient, after the inner step; statistics too. Raises FlJaxError for a private oracle, whose
    accounting knows nothing of the inner step.
    """
    if gradient.event != dp_accounting.NonPrivateDpEvent():
        raise FlJaxError("Per-FedAvg looks at records several times a step, which a private gradient does not account for: leave `gradient` out.")
    parts = 2 if hessian_step is None else 3

    def compute(key: Key, state: PyTree, params: PyTree, stats: PyTree, batch: Batch) -> tuple[PyTree, PyTree, PyTree, Metrics]:
        if batch.mask.shape[0] < parts:
            raise FlJaxError(f"A batch of {batch.mask.shape[0]} has not the {parts} parts that Per-FedAvg needs: take a larger batch size.")
        samples = [jax.tree.map(lambda leaf, first=first: leaf[first::parts], (batch.x, batch.y, batch.mask)) for first in range(parts)]
        keys = jax.random.split(key, 4)

        def slope(key: Key, at: PyTree, sample: int) -> tuple[PyTree, PyTree, Metrics]:
            gradients, _, after, metrics = gradient.compute(key, state, at, stats, Batch(*samples[sample]))
            return gradients, after, metrics

        inner, _, _ = slope(keys[0], params, 0)
        adapted = jax.tree.map(lambda w, g: w - inner_rate * g, params, inner)
        outer, after, metrics = slope(keys[1], adapted, 1)
        if hessian_step is None:
            return outer, state, after, metrics
        forth, _, _ = slope(keys[2], jax.tree.map(lambda w, g: w + hessian_step * g, params, outer), 2)
        back, _, _ = slope(keys[2], jax.tree.map(lambda w, g: w - hessian_step * g, params, outer), 2)
        curved = jax.tree.map(lambda g, a, b: g - inner_rate * (a - b) / (2 * hessian_step), outer, forth, back)
        return curved, state, after, metrics

    return Gradient(lambda params: (), compute, gradient.metrics)
