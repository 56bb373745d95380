"""The code of the README runs, and its new algorithm is one."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fl_jax import batches, sampling

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_readmes_code_runs(capsys, sites, plain_model):
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "three clinics" in printed and "auroc" in printed
    assert set(names["fits"]["FedAvg"].rows["round"]) == {1, 2, 3, 4}

    algorithm = names["fedpull"](plain_model, optax.sgd(0.1), batches.epochs(1, 4))
    state = algorithm.init(plain_model.init(jax.random.key(0)), sites.size.shape[0])
    after, metrics = jax.jit(algorithm.round)(jax.random.key(1), state, sampling.everyone().draw(jax.random.key(2), 0, sites), sites)
    moved = optax.tree.norm(optax.tree.sub(after.shared, state.shared))
    mean_length = metrics.server["length"] / metrics.server["participants"]
    assert 0 < moved <= mean_length  # a mean of unit directions is no longer than one
    assert np.isfinite(jnp.asarray(moved))
