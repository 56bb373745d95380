"""The normals of private gradients: the generator is jax's, the transformation is exact, and nothing repeats or depends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from scipy import stats

from fl_jax.gradients import noise

MANY = 1_000_000


@pytest.fixture(scope="module")
def drawn():
    """A million and one normals in two leaves, from each of three keys."""
    like = {"a": jnp.zeros((1000, MANY // 1000)), "b": jnp.zeros(MANY), "c": jnp.zeros(())}
    draw = jax.jit(lambda key: noise.gaussian(key, like))
    return [jax.tree.map(np.asarray, draw(key)) for key in jax.random.split(jax.random.key(5), 3)]


def test_the_words_are_those_of_jaxs_own_generator():
    words = jnp.array([123456789, 4000000000], jnp.uint32)
    first, second = jnp.arange(1000, dtype=jnp.uint32) * 4000001, jnp.full(1000, 7, jnp.uint32)
    ours = noise.threefry(words, first, second)
    np.testing.assert_array_equal(jnp.concatenate(ours), threefry_2x32(words, jnp.concatenate([first, second])))


def test_thirteen_rounds_are_those_of_the_reference_implementation():
    """Random123's known answers for threefry2x32, 13 rounds: counter and key all zeros, all ones, and digits of pi."""
    ones = 0xFFFFFFFF
    known = [((0, 0), (0, 0), (0x9D1C5EC6, 0x8BD50731)), ((ones, ones), (ones, ones), (0xFD36D048, 0x2D17272C)),
             ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xBA3E4725, 0xF27D669E))]
    for counter, key, expected in known:
        got = noise.threefry(jnp.array(key, jnp.uint32), *(jnp.array([c], jnp.uint32) for c in counter), 13)
        assert tuple(int(word[0]) for word in got) == expected


def test_box_muller_is_exact_to_float32():
    rng = np.random.default_rng(0)
    u, v = (rng.integers(0, 2**32, 100_000, dtype=np.uint32) for _ in range(2))
    u[:3], v[:9] = (0, 1, 2**32 - 1), np.arange(9, dtype=np.uint64) * 2**29 % 2**32
    # the angle as defined: quadrant v // 2^30, and a place around its middle
    place = (v << np.uint32(2)).view(np.int32) / 2**31 * np.pi / 4
    exact = np.sqrt(-2 * np.log((u + 0.5) / 2**32)) * np.cos(np.float64(v >> 30) * np.pi / 2 + place)
    ours = np.asarray(jax.jit(noise._box_muller)(u, v))
    np.testing.assert_allclose(ours, exact, atol=2e-5)  # where u is next to 1, its own rounding
    assert ours.max() == pytest.approx(np.sqrt(-2 * np.log(2.0**-33)), rel=1e-3)


def test_the_distribution_is_normal_up_to_its_tails(drawn):
    for tree in drawn:
        for leaf in ("a", "b"):
            z = tree[leaf].ravel()
            assert stats.kstest(z, "norm").pvalue > 1e-4
            assert abs(z.mean()) < 4e-3 and abs(z.std() - 1) < 3e-3
            assert abs(stats.skew(z)) < 0.01 and abs(stats.kurtosis(z)) < 0.02
            for tail in (3.0, 4.0):
                expected = MANY * stats.norm.sf(tail)
                for side in (z, -z):
                    assert abs((side > tail).sum() - expected) < 4.5 * expected**0.5


def test_elements_leaves_and_keys_are_independent(drawn):
    rows = np.stack([tree[leaf].ravel() for tree in drawn for leaf in ("a", "b")])
    bound = 5 / MANY**0.5
    assert np.abs(np.corrcoef(rows) - np.eye(6)).max() < bound
    assert np.abs(np.corrcoef(rows**2) - np.eye(6)).max() < bound
    z = rows[0]
    for lag in (1, 2, 8, 1000, 65536):
        assert abs(np.corrcoef(z[:-lag], z[lag:])[0, 1]) < bound and abs(np.corrcoef(z[:-lag] ** 2, z[lag:] ** 2)[0, 1]) < bound
    assert len({tree["c"].item() for tree in drawn}) == 3


def test_lanes_draw_what_each_would_draw_alone_and_any_kind_of_key_will_do():
    like = {"a": jnp.zeros((3, 5)), "b": jnp.zeros(7)}
    keys = jax.random.split(jax.random.key(1), 4)
    together = jax.jit(jax.vmap(lambda key: noise.gaussian(key, like)))(keys)
    alone = jax.jit(lambda key: noise.gaussian(key, like))
    apart = jax.tree.map(lambda *leaves: np.stack(leaves), *[alone(key) for key in keys])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), together, apart)
    assert len(np.unique(together["a"])) == 60
    other = noise.gaussian(jax.random.key(1, impl="rbg"), like)
    assert len(np.unique(other["a"])) == 15 and not np.isin(other["a"], together["a"]).any()
    fewer = noise.gaussian(keys[0], like, rounds=13)
    assert not np.allclose(fewer["a"], together["a"][0])


def test_another_source_of_normals_is_optax_with_jaxs_own():
    import optax

    from fl_jax import gradients, models

    model = models.bridge(models.LogisticRegression(3), jnp.zeros((1, 4)), models.softmax_cross_entropy)
    for source in (optax.tree.random_like, functools.partial(noise.gaussian, rounds=13)):
        assert gradients.private(model, 1.0, 1.0, noise=source).metrics[0] == "loss"
