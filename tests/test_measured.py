"""What a site measures of a model on all its records, against sums over them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SIZES

from fl_jax import core, gradients, measured

KEY = jax.random.key(3)


def at_every_site(measure, variables, sites):
    def at(id):
        return measure(KEY, variables, core.site_at(sites, id))

    return jax.jit(lambda: jax.lax.map(at, jnp.arange(len(sites.size))))()


def test_the_loss_is_the_mean_over_the_sites_records_in_evaluation_mode(normed_model, sites):
    """With running statistics, not those of the batch."""
    variables = normed_model.init(KEY)
    variables = variables._replace(stats=jax.tree.map(lambda leaf: leaf + 0.7, variables.stats))
    found = at_every_site(measured.mean_loss(normed_model, 3), variables, sites)
    losses = normed_model.evaluate(normed_model.predict(variables, sites.x), sites.y)
    expected = [np.mean(losses[o:o + n]) for o, n in zip(np.asarray(sites.offset), SIZES, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("size", [3, 16])
def test_the_full_gradient_is_that_of_the_mean_loss(plain_model, sites, size):
    """Of softmax regression, in float64 NumPy."""
    variables = plain_model.init(KEY)
    found = at_every_site(measured.full_gradient(gradients.plain(plain_model), size), variables, sites)["Dense_0"]
    head = {name: np.float64(leaf) for name, leaf in variables.params["Dense_0"].items()}
    for i, (offset, n) in enumerate(zip(np.asarray(sites.offset), SIZES, strict=True)):
        x, y = np.float64(sites.x[offset:offset + n]), np.asarray(sites.y[offset:offset + n])
        exponents = np.exp(x @ head["kernel"] + head["bias"])
        errors = exponents / exponents.sum(1, keepdims=True) - np.eye(3)[y]
        np.testing.assert_allclose(found["kernel"][i], x.T @ errors / n, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found["bias"][i], errors.mean(0), rtol=1e-4, atol=1e-6)
