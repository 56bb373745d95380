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

    With padding = "VALID" it is a maximum over shifted slices, many times faster on a CPU than XLA's reduce_window and its
    gradient. Where values of a window tie, that gradient is shared among them; flax gives it to the first.
    """
    window, steps = tuple(window_shape), tuple(strides or (1,) * len(window_shape))
    fits = x.ndim == len(window) + 2 and all(size >= width for size, width in zip(x.shape[1:], window, strict=False))
    if padding != "VALID" or not fits:
        return nn.max_pool(x, window, strides, padding)
    for axis, (width, step) in enumerate(zip(window, steps, strict=True), start=1):
        last = (x.shape[axis] - width) // step * step
        x = reduce(jnp.maximum, [lax.slice_in_dim(x, i, i + last + 1, step, axis) for i in range(width)])
    return x
