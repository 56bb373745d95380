"""Convolution and max pooling, which are slow on a CPU in their usual form, with the names and values of flax's own."""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from fl_jax.errors import FlJaxError
from fl_jax.models.convolution import Convolution, default_convolution
from fl_jax.types import Array


class Conv(nn.Module):
    """A two-dimensional convolution: x [B, H, W, C] -> [B, H', W', features].

    Parameters, their initial values and the result are those of flax.linen.Conv: kernel [h, w, C, features], bias [features].

    padding: "SAME", "VALID", or ((low, high), (low, high)).
    implementation: the function that convolves (see fl_jax.models.convolution); None takes the one for the default backend.
    Raises FlJaxError for x without four axes, and smaller than the kernel.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: str | Sequence[tuple[int, int]] = "SAME"
    use_bias: bool = True
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()
    implementation: Convolution | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if x.ndim != 4:
            raise FlJaxError(f"Conv takes images [B, H, W, C], not {list(x.shape)}: a grey image needs a channel axis too.")
        kernel = self.param("kernel", self.kernel_init, (*self.kernel_size, x.shape[-1], self.features))
        dtype = jnp.promote_types(x.dtype, kernel.dtype)
        strides = (self.strides[0], self.strides[1])
        padding = self.padding
        if isinstance(padding, str):
            padding = lax.padtype_to_pads(x.shape[1:3], self.kernel_size, strides, padding)
        (top, bottom), (left, right) = padding
        if x.shape[1] + top + bottom < self.kernel_size[0] or x.shape[2] + left + right < self.kernel_size[1]:
            raise FlJaxError(f"A kernel of {self.kernel_size} does not fit an image of {x.shape[1:3]}: give larger images.")
        convolve = self.implementation or default_convolution()
        y = convolve(x.astype(dtype), kernel.astype(dtype), strides, ((top, bottom), (left, right)))
        if self.use_bias:
            y = y + self.param("bias", self.bias_init, (self.features,)).astype(dtype)
        return y


def max_pool(
    x: Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: str | Sequence[tuple[int, int]] = "VALID",
) -> Array:
    """The maximum of each window: x [B, spatial..., C]; arguments and values are those of flax.linen.max_pool.

    Where strides = window_shape and padding = "VALID" it is a maximum over reshaped slices, many times faster on a CPU than
    XLA's reduce_window and its gradient. Where values of a window tie, that gradient is shared among them; flax gives it to
    the first.
    """
    window = tuple(window_shape)
    if strides is None or tuple(strides) != window or padding != "VALID" or x.ndim != len(window) + 2:
        return nn.max_pool(x, window, strides, padding)
    for axis, width in enumerate(window, start=1):
        count = x.shape[axis] // width
        x = lax.slice_in_dim(x, 0, count * width, axis=axis)
        x = x.reshape(*x.shape[:axis], count, width, *x.shape[axis + 1 :])
        x = reduce(jnp.maximum, [lax.index_in_dim(x, i, axis + 1, keepdims=False) for i in range(width)])
    return x
