"""Pytree helpers: split and merge are inverse, rows are rows, and NaN stays where it is not chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fl_jax import trees
from fl_jax.types import Variables

TREE = Variables(
    {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, "list": [jnp.arange(2), (jnp.float32(1),)]},
    {"mean": jnp.ones(4)})
TABLE = {"a": jnp.arange(20.0).reshape(5, 2, 2), "b": (jnp.arange(5), jnp.arange(5) % 2 == 0)}


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


def test_paths_are_plain_strings():
    paths = [trees.path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(TREE)]
    assert paths == [("params", "Dense_0", "bias"), ("params", "Dense_0", "kernel"), ("params", "list", "0"),
                     ("params", "list", "1", "0"), ("stats", "mean")]


@pytest.mark.parametrize("predicate", [
    lambda path: False, lambda path: True, lambda path: path[0] == "stats", lambda path: path[-1] in ("kernel", "0")])
def test_split_and_merge_are_inverse(predicate):
    chosen, rest = trees.split(TREE, predicate)
    for path, leaf in jax.tree_util.tree_leaves_with_path(TREE):
        for half, inside in ((chosen, predicate(trees.path_of(path))), (rest, not predicate(trees.path_of(path)))):
            assert any(other is leaf for other in jax.tree.leaves(half)) == inside
    same(trees.merge(chosen, rest), TREE)
    same(trees.merge(rest, chosen), TREE)


@pytest.mark.parametrize("index", [0, 3, 4, 9])
def test_a_row_is_read_and_written_in_place(index):
    clipped = min(index, 4)
    same(trees.row(TABLE, jnp.int32(index)), jax.tree.map(lambda leaf: leaf[clipped], TABLE))
    value = jax.tree.map(lambda leaf: ~leaf[0] if leaf.dtype == bool else leaf[0] - 7, TABLE)
    same(trees.set_row(TABLE, jnp.int32(index), value), jax.tree.map(lambda leaf, new: leaf.at[clipped].set(new), TABLE, value))


def test_rows_repeat_in_any_order_and_the_copying_form_is_the_same():
    indices = jnp.array([3, 0, 3, 4, 1, 8])
    expected = jax.tree.map(lambda leaf: leaf[jnp.array([3, 0, 3, 4, 1, 4])], TABLE)
    same(trees.rows(TABLE, indices), expected)
    same(jax.jit(trees.copy_rows)(TABLE, indices), expected)
    several = jax.jit(jax.vmap(trees.copy_rows, (None, 0)))(TABLE, jnp.stack([indices, indices[::-1]]))
    same(jax.tree.map(lambda leaf: leaf[0], several), expected)


def test_rows_are_written_and_padding_is_not():
    indices = jnp.array([2, 5, 0, 99])  # of five rows: the last and the second are padding
    values = jax.tree.map(lambda leaf: jnp.stack([leaf[4], leaf[1], leaf[1], leaf[3]]), TABLE)
    same(trees.set_rows(TABLE, indices, values), jax.tree.map(lambda leaf: leaf.at[2].set(leaf[4]).at[0].set(leaf[1]), TABLE))


def test_what_is_not_selected_may_hold_nan():
    good, bad = {"a": jnp.arange(3.0)}, {"a": jnp.full(3, jnp.nan)}
    same(trees.select(jnp.bool_(True), good, bad), good)
    same(trees.select(jnp.bool_(False), bad, good), good)


@pytest.mark.parametrize(("value", "finite"), [(1.0, True), (jnp.nan, False), (jnp.inf, False), (-jnp.inf, False), (3e38, True)])
def test_all_finite_looks_at_every_leaf(value, finite):
    assert bool(trees.all_finite({"a": jnp.ones(3), "b": [jnp.arange(2), jnp.zeros((2, 2)).at[1, 0].set(value)]})) == finite


def test_all_finite_of_nothing_to_look_at():
    assert bool(trees.all_finite({})) and bool(trees.all_finite({"ids": jnp.arange(3)}))


def test_bytes_on_the_wire():
    tree = {"a": jnp.zeros((3, 4)), "b": jax.ShapeDtypeStruct((5,), jnp.bfloat16), "c": jnp.int32(0), "none": None}
    assert trees.num_bytes(tree) == 48 + 10 + 4
    assert trees.num_bytes({}) == 0


def test_leaves_are_told_apart_by_what_they_are():
    tree = (Variables({"w": 1, "none": None}, {"mean": 2}), {"c": 3}, [Variables({}, {"var": 4})])
    found = trees.by_role(tree, lambda leaf: ("param", leaf), lambda leaf: ("stat", leaf), lambda leaf: ("other", leaf))
    assert found == (Variables({"w": ("param", 1), "none": None}, {"mean": ("stat", 2)}), {"c": ("other", 3)}, [Variables({}, {"var": ("stat", 4)})])
