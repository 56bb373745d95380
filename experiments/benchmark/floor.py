"""The floor of experiments.speed: the same SGD steps on the same records by one jitted loop, with nothing federated about it.

One model, plain SGD, records shuffled beforehand so that a batch is a contiguous slice, no mask, no keys but for dropout. The loop is
built in several forms and the fastest counts: a slow floor would flatter the ratio.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark.workloads import Work
from fl_jax import models
from fl_jax.types import Array, PyTree

Loop = Callable[[PyTree, PyTree, Array, Array], PyTree]
"""(params, batches, first step, step after the last) -> params."""

TRIAL_SECONDS = 0.3
UNROLLED = 4


class Floor:
    """The fastest form of the loop for a work. form: its name. seconds_per_step: of every form that was tried."""

    def __init__(self, work: Work, seed: int = 0):
        self._params = work.variables.params
        self._batches = shuffled(work, seed)
        loops = dict(forms(work))
        self.seconds_per_step = {}
        for name, loop in loops.items():
            self._loop = loop
            self.seconds(UNROLLED)  # compiles
            steps = UNROLLED
            while (least := self.seconds(steps)) < TRIAL_SECONDS / 4:
                steps *= 4
            for _ in range(max(1, round(TRIAL_SECONDS / least))):
                least = min(least, self.seconds(steps))
            self.seconds_per_step[name] = least / steps
        self.form = min(self.seconds_per_step, key=lambda name: self.seconds_per_step[name])
        self._loop = loops[self.form]

    def seconds(self, steps: int) -> float:
        """Seconds of `steps` steps from the initial parameters (rounded up to whole turns of an unrolled loop)."""
        first, last = jnp.int32(0), jnp.int32(steps)
        jax.block_until_ready((self._params, self._batches))
        start = time.perf_counter()
        jax.block_until_ready(self._loop(self._params, self._batches, first, last))
        return time.perf_counter() - start


def shuffled(work: Work, seed: int) -> tuple[Array, Array]:
    """All records in a random order and whole batches: x float32[K, B, ...], y int32[K, B]; pixels are scaled beforehand."""
    size = work.workload.batch_size
    index = np.random.default_rng(seed).permutation(len(work.sites.y))
    index = index[: len(index) // size * size].reshape(-1, size)
    x = jnp.asarray(work.sites.x)[index]
    return (models.images_uint8(x) if x.dtype == jnp.uint8 else x), jnp.asarray(work.sites.y)[index]


def forms(work: Work) -> Iterator[tuple[str, Loop]]:
    """The forms of the loop that are tried: convolutions as in the models, elsewhere one step a turn or several."""
    module = work.workload.module
    if hasattr(module, "implementation"):
        for convolution in (models.cpu_convolution, models.im2col):
            yield convolution.__name__, _loop(work, module.clone(implementation=convolution), 1)
    else:
        yield "rolled", _loop(work, module, 1)
        yield f"unrolled by {UNROLLED}", _loop(work, module, UNROLLED)


def _loop(work: Work, module: Any, unroll: int) -> Loop:
    rate = work.workload.learning_rate
    dropout = any("Dropout" in path[-1] for path in work.model.modules if path)
    training: dict[str, Any] = {"train": True} if dropout else {}

    def step(params: PyTree, batches: PyTree, t: Array) -> PyTree:
        x, y = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, t % leaf.shape[0], 0, keepdims=False), batches)

        def loss(params: PyTree) -> Array:
            rngs = {"dropout": jax.random.fold_in(jax.random.key(0), t)} if dropout else None
            outputs = module.apply({"params": params}, x, rngs=rngs, **training)
            return models.softmax_cross_entropy.batch(outputs, y, jnp.ones(y.shape[0]))

        return jax.tree.map(lambda leaf, gradient: leaf - rate * gradient, params, jax.grad(loss)(params))

    @jax.jit
    def loop(params: PyTree, batches: PyTree, first: Array, last: Array) -> PyTree:
        def turn(i: Array, params: PyTree) -> PyTree:
            for k in range(unroll):
                params = step(params, batches, i * unroll + k)
            return params

        return jax.lax.fori_loop(first, -(-last // unroll), turn, params)

    return loop
