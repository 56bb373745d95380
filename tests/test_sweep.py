"""Runs as an axis of one program: however rows are executed, each has the result that it has alone."""

from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fl_jax.sweep import each_run, grid, run_mesh


def walk(row, step):
    """A short run of noisy steps, as many as the row says: what a training run is to each_run."""
    key, length, scale = row

    def move(t, position):
        return position + step * scale * jax.random.normal(jax.random.fold_in(key, t), (2,))

    return {"position": jax.lax.fori_loop(0, length, move, jnp.zeros(2)), "length": length}


def rows_of(count):
    keys = jax.vmap(jax.random.key)(jnp.arange(count, dtype=jnp.uint32))
    return keys, jnp.arange(count, dtype=jnp.int32) * 2 + 1, jnp.linspace(0.5, 2, count)


STEP = jnp.array([1.0, -3.0])


@pytest.mark.parametrize("how", [
    {"side_by_side": False}, {"side_by_side": True}, {}, {"mesh": 2}, {"mesh": 2, "side_by_side": True}, {"mesh": 8},
], ids=str)
@pytest.mark.parametrize("count", [3, 4])  # of which 3 is no multiple of the devices
def test_every_row_is_the_run_alone(how, count):
    if "mesh" in how:
        how = {**how, "mesh": run_mesh(how["mesh"])}
    runs = rows_of(count)
    found = jax.jit(each_run(walk, **how))(runs, STEP)
    for i in range(count):
        alone = walk(jax.tree.map(itemgetter(i), runs), STEP)
        np.testing.assert_allclose(found["position"][i], alone["position"], rtol=1e-6, atol=1e-6)
        assert int(found["length"][i]) == 2 * i + 1
    assert found["position"].shape == (count, 2)


def test_rows_are_executed_where_the_mesh_says():
    found = jax.jit(each_run(walk, mesh=run_mesh(2)))(rows_of(4), STEP)
    assert {shard.device.id: shard.data.shape for shard in found["position"].addressable_shards} == {0: (2, 2), 1: (2, 2)}
    assert run_mesh(1) is None


def test_a_grid_is_the_cross_product_with_the_seeds_of_a_point_side_by_side():
    keys = rows_of(3)[0]
    crossed, points = grid(keys, {"mu": jnp.array([0.1, 0.2]), "layers": jnp.arange(4).reshape(2, 2)})
    assert crossed.shape == (6,) and points["layers"].shape == (6, 2)
    found = [(jax.random.key_data(crossed)[i].tolist(), round(float(points["mu"][i]), 3)) for i in range(6)]
    assert found == [(jax.random.key_data(keys)[s].tolist(), mu) for mu in (0.1, 0.2) for s in range(3)]
    np.testing.assert_array_equal(points["layers"], np.repeat([[0, 1], [2, 3]], 3, axis=0))
