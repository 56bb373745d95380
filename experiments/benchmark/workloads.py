"""The four workloads of experiments.speed: networks, federations of the right shape, and the work that a file prescribes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fl_jax import models, sampling
from fl_jax.data.synthetic import CLASSES, FEATURES, synthetic, synthetic_sizes
from fl_jax.errors import FlJaxError
from fl_jax.types import Model, Sites, Variables

EVALUATED = 2000  # records of the final training loss where no file names them


class Workload(NamedTuple):
    """A published setting. shape: of one record. sizes: (rng) -> records per client. epochs, batch_size, learning_rate: of a client's
    SGD. weights: the clients' weights in the average."""

    title: str
    module: nn.Module
    shape: tuple[int, ...]
    num_classes: int
    sizes: Callable[[np.random.Generator], np.ndarray]
    cohort_size: int
    epochs: int
    batch_size: int
    learning_rate: float
    weights: Callable[[Sites], jax.Array] = sampling.by_records


class Work(NamedTuple):
    """What is to be computed: a model with its initial variables, the sites' records, who takes part in each round, and the records
    of the final training loss. cohorts: int32[rounds, c]. eval_idx: int64[E], rows of the flat arrays."""

    workload: Workload
    model: Model
    variables: Variables
    sites: Sites
    cohorts: np.ndarray
    eval_idx: np.ndarray


def _lognormal_sizes(rng: np.random.Generator) -> np.ndarray:
    return np.maximum(np.round(100 * np.exp(0.6 * rng.standard_normal(340))), 10).astype(np.int64)


WORKLOADS: dict[str, Workload] = {
    "W1": Workload("2NN, 100 clients x 600 images", models.TwoNN(10), (784,), 10, lambda rng: np.full(100, 600), 10, 1, 10, 0.1),
    "W2": Workload("EMNIST CNN, 340 clients of log-normal sizes", models.FedAvgCNN(62), (28, 28, 1), 62, _lognormal_sizes, 10, 1, 20, 0.05),
    "W3": Workload("CIFAR-10 CNN with dropout, 1,000 clients x 50", models.PflCifarCNN(10), (32, 32, 3), 10, lambda rng: np.full(1000, 50),
                   50, 1, 10, 0.1, sampling.equal),
    "W4": Workload("logistic regression, Synthetic(1, 1)", models.LogisticRegression(CLASSES), (FEATURES,), CLASSES,
                   lambda rng: synthetic_sizes(rng, 30, largest=5000), 10, 20, 10, 0.01),
}


def generate(name: str, rounds: int, seed: int = 0) -> Work:
    """The workload `name` on generated records: W4's own, elsewhere images of a class's pattern under as much noise."""
    workload = WORKLOADS[name]
    rng = np.random.default_rng(seed)
    sizes = workload.sizes(rng)
    if name == "W4":
        x, y, _ = synthetic(rng, 1.0, 1.0, sizes)
    else:
        x, y = _images(rng, int(sizes.sum()), workload.shape, workload.num_classes)
    cohorts = np.stack([rng.permutation(len(sizes))[: workload.cohort_size] for _ in range(rounds)])
    eval_idx = rng.choice(len(y), min(EVALUATED, len(y)), replace=False)
    model = _model(workload, x.dtype)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return Work(workload, model, model.init(jax.random.key(seed)), _sites(x, y, offsets), cohorts.astype(np.int32), eval_idx)


def load(name: str, file: Path, rounds: int) -> Work:
    """The workload `name` on the work of a file: x, y, offsets [clients + 1], cohorts int[rounds, cohort], eval_idx, and the initial
    parameters p0, p1, ... in layer order, kernel (HWIO, or in x out) before bias.

    Raises FlJaxError, with what is wrong, for a file that cannot be read or does not hold the work of `rounds` rounds.
    """
    workload = WORKLOADS[name]
    try:
        with np.load(file) as archive:
            held = {key: archive[key] for key in archive.files}
    except (OSError, ValueError) as error:
        raise FlJaxError(f"{file} cannot be read as an .npz archive of NumPy arrays: {error}.") from error
    missing = [key for key in ("x", "y", "offsets", "cohorts", "eval_idx", "p0") if key not in held]
    if missing:
        raise FlJaxError(f"{file} lacks the array '{missing[0]}'; it needs x, y, offsets, cohorts, eval_idx and p0, p1, ...")
    x, y, offsets, cohorts = held["x"], held["y"], held["offsets"].astype(np.int64), held["cohorts"]
    if x.shape[0] != len(y) or int(np.prod(x.shape[1:])) != int(np.prod(workload.shape)):
        raise FlJaxError(f"{file} holds x of shape {list(x.shape)} and {len(y)} labels; {name} has records of shape {list(workload.shape)}.")
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(y) or (np.diff(offsets) < 1).any():
        raise FlJaxError(f"The offsets in {file} must rise from 0 to the {len(y)} records, so that every client holds at least one.")
    if cohorts.ndim != 2 or len(cohorts) < rounds:
        raise FlJaxError(f"{file} holds the cohorts of {len(cohorts)} rounds, and {rounds} are asked for, the warm-up among them.")
    if cohorts.min() < 0 or cohorts.max() >= len(offsets) - 1:
        raise FlJaxError(f"The cohorts in {file} name clients outside 0 to {len(offsets) - 2}.")
    if y.min() < 0 or y.max() >= workload.num_classes:
        raise FlJaxError(f"The labels in {file} must be 0 to {workload.num_classes - 1}.")
    eval_idx = held["eval_idx"].astype(np.int64)
    if eval_idx.ndim != 1 or not len(eval_idx) or eval_idx.min() < 0 or eval_idx.max() >= len(y):
        raise FlJaxError(f"eval_idx in {file} must list at least one of the records 0 to {len(y) - 1}.")
    x = x.reshape(len(x), *workload.shape)
    x = x if x.dtype == np.uint8 else x.astype(np.float32)
    model = _model(workload, x.dtype)
    given: list[np.ndarray] = []
    while f"p{len(given)}" in held:
        given.append(held[f"p{len(given)}"])
    variables = _in_layer_order(model, given, file)
    return Work(workload, model, variables, _sites(x, y, offsets), cohorts[:rounds].astype(np.int32), eval_idx)


def _images(rng: np.random.Generator, number: int, shape: tuple[int, ...], num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    y = rng.integers(0, num_classes, number).astype(np.int32)
    patterns = rng.integers(0, 128, (num_classes, *shape), dtype=np.uint8)
    x = rng.integers(0, 128, (number, *shape), dtype=np.uint8)
    for k, pattern in enumerate(patterns):
        x[y == k] += pattern
    return x, y


def _model(workload: Workload, dtype: Any) -> Model:
    preprocess = models.images_uint8 if dtype == np.uint8 else None
    example = jax.ShapeDtypeStruct((1, *workload.shape), dtype)
    return models.bridge(workload.module, example, models.softmax_cross_entropy, preprocess=preprocess)


def _sites(x: np.ndarray, y: np.ndarray, offsets: np.ndarray) -> Sites:
    offset, size = jnp.asarray(offsets[:-1], jnp.int32), jnp.asarray(np.diff(offsets), jnp.int32)
    return Sites(jnp.asarray(x), jnp.asarray(y, jnp.int32), offset, size)


def _in_layer_order(model: Model, given: list[np.ndarray], file: Path) -> Variables:
    """Variables whose parameters are `given`, in the order in which the network calls its layers."""
    shapes = jax.eval_shape(model.init, jax.random.key(0)).params
    layers = [path for path in model.modules if path and path[0] in shapes]  # in order of their first call
    slots = [(path[0], leaf) for path in layers for leaf in ("kernel", "bias")]
    expected = [shapes[layer][leaf].shape for layer, leaf in slots]
    if [array.shape for array in given] != expected:
        raise FlJaxError(f"The parameters in {file} have the shapes {[array.shape for array in given]}; {model.name} has {expected}.")
    params: dict[str, dict[str, jax.Array]] = {}
    for (layer, leaf), array in zip(slots, given, strict=True):
        params.setdefault(layer, {})[leaf] = jnp.asarray(array, jnp.float32)
    return Variables(params, {})
