"""DP-SGD at a site: the clipped, summed, noised gradients of a batch's records, divided by the batch that was expected.

jax-privacy's `clipped_grad` composes with vmapped sites, and the tests compare with it; here it is not used, since it
materialises every gradient (50 to 700 plain steps on a CPU with the batch in memory, 1.4 to 13 in microbatches of one), and since
a norm cannot have several bounds there. Its `noise_addition` keeps the key in a state, which vmapped sites would share.
Nor are microbatches optax's, which are as many whatever a batch holds.
"""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import dp_accounting
import jax
import jax.numpy as jnp

from fl_jax import clipping, mechanism, trees
from fl_jax.clipping import Clipping
from fl_jax.errors import FlJaxError
from fl_jax.gradients import scaling
from fl_jax.gradients.mixing import refuse_batch_layers, refuse_mixing
from fl_jax.gradients.noise import gaussian
from fl_jax.gradients.records import Form, by_layers, materialised
from fl_jax.gradients.scaling import FLAT, Scaling
from fl_jax.types import Array, Batch, Gradient, Key, Metrics, Model, PyTree

Noise = Callable[[Key, PyTree], PyTree]
"""(key, tree of arrays) -> independent standard normals, float32, in its structure and shapes; optax.tree.random_like is one."""

_METRICS = ("loss", "record_clip", "records_clipped", "records_nonfinite")


def private(
    model: Model, clip: float | Array | Clipping, noise_multiplier: float | Array, *,
    norm: Scaling = FLAT, microbatch: int | None = None, noise: Noise = gaussian,
) -> Gradient:
    """DP-SGD's gradient: each record's is clipped, the sum gets Gaussian noise, the denominator is the expected batch (Abadi et
    al. 2016, "Deep learning with differential privacy", Algorithm 1), at about the price of a plain gradient plus the noise
    (records.by_layers).

    clip: bound on the L2 norm of one record's gradient, or how it moves (fl_jax.clipping): a schedule, or a quantile of the norms
    that the site follows from step to step and keeps between rounds (Andrew et al. 2021). noise_multiplier: standard deviation of
    the noise on the sum, in clips, for everything that a step publishes: with a quantile, part of it goes into the quantile's
    count. norm: scaling.FLAT, PER_LAYER, normalised(), how a gradient is brought within its bound. microbatch: how many records
    are worked on at a time, which bounds memory and changes nothing else; all of them by default. noise: where the normals are
    from.

    Every record is a batch of one with a key of its own (the step's, folded with its row), for dropout and the like. Padding adds
    nothing, and a batch without records is noise alone. A gradient that is not finite, or whose norm overflows, adds nothing.

    Guarantee: a step is one Gaussian mechanism of this multiplier for adding or removing one record of the batch (the sum moves
    by at most the clip), and of half of it for replacing one (`event` states noise over clip; fl_jax.privacy converts), before
    any amplification by how batches are drawn, which is the Batches' account. It covers the gradient and the clip, and not the
    metrics, which are exact: "loss", "record_clip" (the bound), "records_clipped" (the share that did not fit it) and "records_nonfinite"
    (the share that added nothing).

    Raises FlJaxError: a clip or noise_multiplier out of range; a model with BatchNorm or other statistics, or that mixes records
    otherwise, or a loss of the whole batch (see gradients.mixing); a Batch that does not say what is expected.
    """
    return _mechanism(model, by_layers(model), clip, noise_multiplier, norm, microbatch, noise)


def private_reference(
    model: Model, clip: float | Array | Clipping, noise_multiplier: float | Array, *,
    norm: Scaling = FLAT, microbatch: int | None = None, noise: Noise = gaussian,
) -> Gradient:
    """`private` with the gradient of every record in memory: the same keys, noise and results, many times slower on a CPU. What
    `private` is tested against, and a way out should it ever be in doubt."""
    return _mechanism(model, materialised(model), clip, noise_multiplier, norm, microbatch, noise)


def _mechanism(
    model: Model, form: Form, clip: float | Array | Clipping, noise_multiplier: float | Array,
    norm: Scaling, microbatch: int | None, noise: Noise,
) -> Gradient:
    bounds = clip if isinstance(clip, Clipping) else clipping.constant(clip)
    if isinstance(noise_multiplier, Real) and not 0 <= noise_multiplier < math.inf:
        raise FlJaxError(f"noise_multiplier must be 0 or more and finite, and is {noise_multiplier}.")
    if microbatch is not None and microbatch < 1:
        raise FlJaxError(f"microbatch must be 1 or more, and is {microbatch}.")
    refuse_batch_layers(model)
    event = mechanism.gaussian(noise_multiplier)
    noisy = event != dp_accounting.NonPrivateDpEvent()
    multiplier = bounds.multiplier(noise_multiplier)  # type: ignore[arg-type]  # a tracer passes through a fixed clip
    check = refuse_mixing(model)

    def compute(key: Key, state: PyTree, params: PyTree, stats: PyTree, batch: Batch) -> tuple[PyTree, PyTree, PyTree, Metrics]:
        if batch.expected is None:
            raise FlJaxError("A private mean divides by how many records a batch has in expectation: give the Batch `expected`.")
        check(stats, batch)
        record_key, noise_key, clip_key = jax.random.split(key, 3)
        bound = bounds.bound(state)
        groups = scaling.groups(norm, [trees.path_of(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]])

        def part(row: Array, x: PyTree, y: PyTree, mask: Array) -> tuple[PyTree, Metrics]:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(record_key, row)
            records = form(keys, params, stats, x, y, groups)
            factors, fits, finite = scaling.factors(norm, records.norms, bound)
            present = mask > 0
            total = records.combine(jnp.where(present[:, None], factors, 0))
            counted: dict[str, Any] = {"loss": records.losses, "records": 1.0, "records_clipped": ~fits, "records_nonfinite": ~finite}
            return total, {name: jnp.sum(jnp.where(present, value, 0), dtype=jnp.float32) for name, value in counted.items()}

        rows = (jnp.arange(batch.mask.shape[0]), batch.x, batch.y, batch.mask)
        total, counts = part(*rows) if microbatch is None else _in_parts(part, rows, microbatch)
        if noisy:
            deviation = multiplier * bound
            total = jax.tree.map(lambda leaf, z: leaf + deviation * z, total, noise(noise_key, total))
        gradient = jax.tree.map(lambda leaf, like: (leaf / batch.expected).astype(like.dtype), total, params)
        centred = counts["records"] / 2 - counts["records_clipped"]
        shares = {name: counts[name] / jnp.maximum(counts["records"], 1) for name in _METRICS if name in counts}
        return gradient, bounds.update(clip_key, state, centred, batch.expected), stats, shares | {"record_clip": bound}

    return Gradient(lambda params: bounds.init(), compute, _METRICS, event)


def _in_parts(part: Callable[..., PyTree], rows: PyTree, size: int) -> PyTree:
    """The sum of `part` over so many rows at a time, up to the last that holds a record: a Poisson sample has room for many more
    than it has records. Rows of zeros, which the mask leaves out, fill the last part. rows: [B, ...], the mask last."""
    missing = -rows[0].shape[0] % size
    filled = jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, missing), *((0, 0),) * (leaf.ndim - 1))), rows)
    ends = jnp.where(filled[-1] > 0, jnp.arange(1, len(filled[-1]) + 1, dtype=jnp.int32), 0)

    def of_part(i: Array) -> PyTree:
        return part(*jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, i * size, size), filled))

    nothing = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(of_part, jnp.int32(0)))
    count = (jnp.max(ends, initial=0) + size - 1) // size
    return jax.lax.fori_loop(jnp.int32(0), count, lambda i, total: jax.tree.map(jnp.add, total, of_part(i)), nothing)
