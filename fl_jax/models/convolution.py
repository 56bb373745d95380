"""Two-dimensional convolutions as matrix products, which a CPU runs many times faster than XLA's own convolution inside a loop.

All of them are one function of (x [B, H, W, C], kernel [h, w, C, O], strides, padding as (low, high) pairs), made of
differentiable primitives only, so they may be mapped over clients, put in loops and differentiated twice or forward.
"""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fl_jax.errors import FlJaxError
from fl_jax.types import Array

Pairs = tuple[tuple[int, int], tuple[int, int]]
Convolution = Callable[[Array, Array, tuple[int, int], Pairs], Array]

# Interpolation points, the last being infinity. Six of them keep the rounding error near that of a direct sum.
_POINTS = (0.0, 1.0, -1.0, 2.0, -2.0)

_TILE = 8
# Measured with 64 images a step: twice as fast as the others with 1 or 6 channels, slower with 16 of them.
_FEW_CHANNELS, _FEW_FEATURES = 8, 16


def xla_convolution(x: Array, kernel: Array, strides: tuple[int, int], padding: Pairs) -> Array:
    """XLA's own convolution: the choice on a GPU or TPU."""
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def im2col(x: Array, kernel: Array, strides: tuple[int, int], padding: Pairs) -> Array:
    """Shifted slices side by side, [B, H', W', h w C], times the kernel as a matrix.

    Any stride and padding, rounding of a direct sum.
    """
    height, width, channels, features = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows = (x.shape[1] - height) // strides[0] + 1
    columns = (x.shape[2] - width) // strides[1] + 1
    patches = [
        x[:, i : i + (rows - 1) * strides[0] + 1 : strides[0], j : j + (columns - 1) * strides[1] + 1 : strides[1]]
        for i in range(height)
        for j in range(width)
    ]
    return jnp.concatenate(patches, -1) @ kernel.reshape(height * width * channels, features)


def minimal_filtering(x: Array, kernel: Array, strides: tuple[int, int], padding: Pairs) -> Array:
    """Winograd's minimal filtering F(m, w) along the rows, im2col along the columns: (m + w - 1) / (m w) of the multiplications.

    m = 7 - w outputs are computed together from six products: 3/5 of the products of `im2col` for w = 5 and 1/2 for w = 3. The
    result differs from a direct sum by a few units of float32 rounding. Raises FlJaxError unless strides are (1, 1) and w is 2 to
    5.
    Lavin and Gray 2016, "Fast algorithms for convolutional neural networks" (arXiv 1509.09308), equation 5, in one dimension.
    """
    if strides != (1, 1) or not 2 <= kernel.shape[1] <= len(_POINTS):
        raise FlJaxError("minimal_filtering takes strides (1, 1) and kernels 2 to 5 wide; use im2col for others.")
    height, width, channels, features = kernel.shape
    batch = x.shape[0]
    rows = x.shape[1] + sum(padding[0]) - height + 1
    columns = x.shape[2] + sum(padding[1]) - width + 1
    tile = len(_POINTS) + 2 - width
    tiles = -(-columns // tile)
    outputs, filters, inputs = _transforms(tile, width)
    low, high = padding[1]
    x = jnp.pad(x, ((0, 0), padding[0], (low, high + tiles * tile - columns), (0, 0)))
    samples = [x[:, :, j : j + (tiles - 1) * tile + 1 : tile] for j in range(inputs.shape[1])]
    # The barrier stops XLA from computing each transform once more for every row of the kernel that reads it.
    transformed = lax.optimization_barrier([_combine(row, samples) for row in inputs])
    weights = jnp.einsum("aj,ijco->aico", jnp.asarray(filters, kernel.dtype), kernel).reshape(-1, height * channels, features)
    products = [
        jnp.concatenate([sample[:, i : i + rows] for i in range(height)], -1).reshape(-1, height * channels) @ weight
        for sample, weight in zip(transformed, weights, strict=True)
    ]
    y = jnp.stack([_combine(row, products) for row in outputs], 1)
    return y.reshape(batch, rows, tiles * tile, features)[:, :, :columns]


def column_tiles(x: Array, kernel: Array, strides: tuple[int, int], padding: Pairs) -> Array:
    """Eight neighbouring outputs of a row as one product with a banded matrix: (8 + w - 1) / 8 ... (8 + w - 1) / w times the multiplications
    of a direct sum, in matrices that are wide enough for a CPU where channels and features are few.

    Rounding of a direct sum. Raises FlJaxError unless strides are (1, 1).
    """
    if strides != (1, 1):
        raise FlJaxError("column_tiles takes strides (1, 1); use im2col for others.")
    height, width, channels, features = kernel.shape
    batch = x.shape[0]
    rows = x.shape[1] + sum(padding[0]) - height + 1
    columns = x.shape[2] + sum(padding[1]) - width + 1
    tile = min(_TILE, columns)
    tiles = -(-columns // tile)
    span = tile + width - 1
    low, high = padding[1]
    x = jnp.pad(x, ((0, 0), padding[0], (low, high + tiles * tile - columns), (0, 0)))
    spans = jnp.stack([x[:, :, j : j + span].reshape(batch, -1, span * channels) for j in range(0, tiles * tile, tile)], 2)
    band = np.arange(span)[:, None, None] == np.arange(tile)[:, None] + np.arange(width)  # where output p reads kernel column b
    matrix = jnp.einsum("jpb,ibco->ijcpo", jnp.asarray(band, kernel.dtype), kernel)
    stacked = jnp.concatenate([spans[:, i : i + rows] for i in range(height)], -1)
    y = stacked @ matrix.reshape(height * span * channels, tile * features)
    return y.reshape(batch, rows, tiles * tile, features)[:, :, :columns]


def cpu_convolution(x: Array, kernel: Array, strides: tuple[int, int], padding: Pairs) -> Array:
    """The fastest on a CPU: with stride 1 `column_tiles` for few channels and features, else `minimal_filtering` for kernels 2 to 5 wide and at
    least float32; `im2col` for all else."""
    exact_enough = jnp.finfo(x.dtype).bits >= 32
    if strides == (1, 1) and kernel.shape[2] <= _FEW_CHANNELS and kernel.shape[3] <= _FEW_FEATURES:
        return column_tiles(x, kernel, strides, padding)
    if strides == (1, 1) and 2 <= kernel.shape[1] <= len(_POINTS) and exact_enough:
        return minimal_filtering(x, kernel, strides, padding)
    return im2col(x, kernel, strides, padding)


def default_convolution() -> Convolution:
    """The convolution for the default backend: `cpu_convolution` on a CPU, XLA's own elsewhere."""
    return cpu_convolution if jax.default_backend() == "cpu" else xla_convolution


def _combine(coefficients: np.ndarray, arrays: list[Array]) -> Array:
    """The linear combination of arrays with static coefficients; a zero costs nothing."""
    terms = [array if c == 1 else float(c) * array for c, array in zip(coefficients, arrays, strict=True) if c != 0]
    return sum(terms[1:], start=terms[0])


@cache
def _transforms(tile: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The matrices (A^T [m, n], G [n, w], B^T [n, n]) of F(m, w), n = m + w - 1.

    y = A^T [(G g) * (B^T d)] (Lavin and Gray, eq. 5).
    They are the transpose of Toom-Cook's product of polynomials: evaluate both at n points, multiply, interpolate.
    """
    size = tile + width - 1

    def evaluate(terms: int) -> np.ndarray:
        matrix = np.vander(_POINTS[: size - 1], terms, increasing=True)
        infinity = np.zeros((1, terms))
        infinity[0, -1] = 1  # the value at infinity is the leading coefficient
        return np.concatenate([matrix, infinity])

    inputs = np.linalg.inv(evaluate(size)).T
    smallest = np.min(np.abs(inputs), axis=1, initial=np.inf, where=np.abs(inputs) > 1e-9, keepdims=True)
    inputs = np.round(inputs / smallest, 9)  # rows of small integers, exact in float32; the filter takes the scale
    return evaluate(tile).T, evaluate(width) * smallest, inputs
