"""Runs as an axis of one program: seeds, hyper-parameters and left-out sites, each a row of a pytree.

A run is a pure function, so `jax.vmap` of it works. Side by side is not always fastest: under `vmap` the loops of all runs last as
long as the longest, and on a CPU a wide step fills the caches. There runs follow one another inside the program (`lax.map`), and
devices share them out.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from fl_jax import trees
from fl_jax.core import device_mesh
from fl_jax.types import PyTree

RUNS = "runs"  # the mesh axis over which runs are dealt


def run_mesh(num_devices: int | None = None) -> Mesh | None:
    """The mesh over whose devices `each_run` deals its rows: `core.device_mesh` with the axis "runs"."""
    return device_mesh(RUNS, num_devices)


def each_run(run: Callable[..., PyTree], *, mesh: Mesh | None = None, side_by_side: bool | None = None) -> Callable[..., PyTree]:
    """The function (runs, *common) -> results that applies `run(row, *common)` to every row; a pytree with the rows in front.

    runs: pytree, every leaf [S, ...]. common: pytrees that all runs share. mesh: with an axis named "runs", over whose devices the
    rows are dealt (S need not be a multiple of them). side_by_side: True vmaps a device's rows, False maps over them one after
    another; None chooses by platform, one after another on a CPU. The results are those of `run` row by row (float32 rounding).
    """

    def of_device(runs: PyTree, *common: PyTree) -> PyTree:
        vectorized = jax.default_backend() != "cpu" if side_by_side is None else side_by_side
        if vectorized:
            return jax.vmap(run, in_axes=(0, *(None,) * len(common)))(runs, *common)
        return jax.lax.map(lambda row: run(row, *common), runs)

    def of_all(runs: PyTree, *common: PyTree) -> PyTree:
        if mesh is None:
            return of_device(runs, *common)
        count = jax.tree.leaves(runs)[0].shape[0]
        padded = -(-count // mesh.size) * mesh.size
        filled = runs if padded == count else trees.rows(runs, jnp.minimum(jnp.arange(padded), count - 1))
        specs: Any = (PartitionSpec(RUNS), *(PartitionSpec(),) * len(common))
        shared_out = jax.shard_map(of_device, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(RUNS), check_vma=False)
        results = shared_out(filled, *common)
        return results if padded == count else jax.tree.map(lambda leaf: leaf[:count], results)

    return of_all


def grid(keys: jax.Array, points: PyTree) -> tuple[jax.Array, PyTree]:
    """The cross product of S keys and G points (a pytree, every leaf [G, ...]) as G * S rows, the seeds of a point side by side."""
    num_seeds, num_points = keys.shape[0], jax.tree.leaves(points)[0].shape[0]
    return jnp.tile(keys, num_points), jax.tree.map(lambda leaf: jnp.repeat(leaf, num_seeds, axis=0), points)
