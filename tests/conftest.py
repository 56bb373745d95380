"""The machine that the tests run on, and the small federation that they share."""

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

# The tests spend their time compiling programs that run for milliseconds: LLVM's optimizations and the newer emitters do not pay.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if version("jaxlib").startswith("0.10."):  # later ones have no other emitters, and stop at a flag that they do not know
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import settings

from fl_jax import models, sweep
from fl_jax.runtime import usable_cores
from fl_jax.types import Model, Sites

SIZES = np.array([7, 1, 12, 4, 10, 6])  # a batch of 4 is larger, equal, or no divisor; no batch of one among 0, 2, 4 and 5
FEATURES, CLASSES = 4, 3
COMPILED = pytest.StashKey[str]()

settings.register_profile("repeatable", derandomize=True, database=None)  # what fails, fails for everybody
settings.load_profile("repeatable")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: a worker a core that this process may use; many more would each compile what others compile."""
    return min(usable_cores(), 8)


def pytest_configure(config: pytest.Config) -> None:
    """What a test has compiled is kept for the others, and for other workers, until the end of the run."""
    if hasattr(config, "workerinput"):
        folder = config.workerinput["compiled"]
    else:
        compiled = tempfile.TemporaryDirectory(prefix="compiled-", ignore_cleanup_errors=True)
        config.add_cleanup(compiled.cleanup)
        config.stash[COMPILED] = folder = compiled.name
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    node.workerinput["compiled"] = node.config.stash[COMPILED]


def pytest_collection_finish() -> None:
    """Tracing makes many objects that live long: looking at all of them for garbage so often is a tenth of a run."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 50, 100)


class NormedNet(nn.Module):
    """The smallest network with a BatchNorm layer between two dense ones."""

    @nn.compact
    def __call__(self, x, *, train: bool):
        x = nn.Dense(6)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(CLASSES)(nn.relu(x))


class PlainNet(nn.Module):
    """Multinomial logistic regression."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES)(x)


def sites_of(sizes: np.ndarray, seed: int = 0) -> Sites:
    """Sites of these sizes with standard normal features and labels that depend on them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(sizes.sum(), FEATURES)).astype(np.float32)
    y = np.argmax(x @ rng.normal(size=(FEATURES, CLASSES)) + rng.normal(size=(len(x), CLASSES)), axis=1).astype(np.int32)
    offset = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return Sites(jnp.asarray(x), jnp.asarray(y), jnp.asarray(offset, jnp.int32), jnp.asarray(sizes, jnp.int32))


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    """Studies compute on one device: for the eight that there are here, their programs would compile for longer than they compute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "run_mesh", lambda: None)
        yield


@pytest.fixture(scope="session")
def sites() -> Sites:
    return sites_of(SIZES)


@pytest.fixture(scope="session")
def plain_model() -> Model:
    return models.bridge(PlainNet(), jnp.zeros((1, FEATURES)), models.softmax_cross_entropy)


@pytest.fixture(scope="session")
def normed_model() -> Model:
    return models.bridge(NormedNet(), jnp.zeros((1, FEATURES)), models.softmax_cross_entropy)


@pytest.fixture(scope="session")
def raw_files() -> Callable[[str], Path]:
    """(name of a published data set) -> folder of its raw files; the test is skipped where this machine does not have them."""
    parent = Path(os.environ.get("FL_JAX_RAW") or Path(__file__).parents[2] / "shared" / "data")

    def folder(name: str) -> Path:
        if not (parent / name).is_dir():
            pytest.skip(f"the raw files of '{name}' are not on this machine: name a folder that holds them by FL_JAX_RAW")
        return parent / name

    return folder


@pytest.fixture(scope="session")
def published_data(raw_files, tmp_path_factory) -> Callable[[str], Path]:
    """(name of a published data set) -> a data_dir in which it is prepared, once for all tests and all workers; or a skip."""
    from fl_jax.data import prepared
    from fl_jax.data.catalog import published

    base = tmp_path_factory.getbasetemp()
    data_dir = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "published"

    def prepare(name: str) -> Path:
        prepared.prepare(published(name), folder=raw_files(name), data_dir=data_dir, progress=False)
        return data_dir

    return prepare


@pytest.fixture
def quick_form(published_data, tmp_path) -> Callable[[str, str], Path]:
    """(study, its data set, or "" where it simulates its own) -> the run folder of `python -m experiments.STUDY --quick`, a process of its
    own: XLA's optimizations, which are off here, pay for programs that run for a minute, and it is what a user runs."""

    def run(study: str, dataset: str) -> Path:
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        environment["FL_JAX_CACHE"] = "off"
        if dataset:
            environment["TFDS_DATA_DIR"] = str(published_data(dataset))
        done = subprocess.run(
            [sys.executable, "-m", f"experiments.{study}", "--quick", "--out", str(tmp_path / "run")], env=environment,
            cwd=Path(__file__).parents[1], text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        return tmp_path / "run"

    return run
