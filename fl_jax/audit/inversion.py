"""What a gradient gives away: the label of the record that it is of."""

import jax.numpy as jnp

from fl_jax.errors import FlJaxError
from fl_jax.types import Array


def infer_label(last_layer: Array) -> Array:
    """int32: the label of the one record whose cross-entropy gradient this is, with respect to the last layer's bias [classes] or its
    kernel [features, classes].

    iDLG (Zhao et al. 2020, "iDLG: Improved deep leakage from gradients", section 3.1): the gradient of the logits is p - 1 for the label and p,
    which is positive, for every other class. The bias has it as it is; the kernel times the layer's inputs, so that there the sign
    is known where these are not negative, as after a ReLU. Exact for one record and one step without noise; for a batch it is a
    guess. Raises FlJaxError for fewer than two classes.
    """
    if last_layer.ndim not in (1, 2) or last_layer.shape[-1] < 2:
        raise FlJaxError(f"A label can be inferred from the gradient of a bias [classes] or a kernel [features, classes], not of {last_layer.shape}.")
    return jnp.argmin(last_layer.reshape(-1, last_layer.shape[-1]).sum(axis=0)).astype(jnp.int32)
