"""Membership inference: was this record trained on? By its loss, and by the likelihood ratio of shadow models.

What a released model gives away about its records, with or without a guarantee. Success is counted at a low false positive rate
(`scores.true_positive_rate`): an attack that finds a few members for sure is worse than one that is a little right about all.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from fl_jax.audit.scores import Scores
from fl_jax.errors import FlJaxError
from fl_jax.sweep import each_run
from fl_jax.types import Array, Key, Model, PyTree, Variables


class Shadows(NamedTuple):
    """Models of which it is known what they were trained on. members: bool[K, R]. variables: every leaf [K, ...]."""

    members: Array
    variables: Variables


def shadow_models(train: Callable[[Key, Array], Variables], key: Key, num_models: int, num_records: int) -> Shadows:
    """Trains K models, each on a random half of R records, as the rows of one program.

    train: (key, included bool[R]) -> variables, e.g. a federated run on canaries.only(sites, included). Every record is in exactly half of
    an even number of models (Carlini et al. 2022, section 6).
    """
    if num_models < 2:
        raise FlJaxError(f"A comparison of models with and without a record needs at least 2 of them, not {num_models}.")
    coins, training = jax.random.split(key)
    rank = jax.vmap(lambda key: jax.random.permutation(key, num_models), out_axes=1)(jax.random.split(coins, num_records))
    members = rank < num_models // 2
    variables = jax.jit(each_run(lambda row: train(*row)))((jax.random.split(training, num_models), members))
    return Shadows(members, variables)


def confidences(model: Model, variables: Variables, x: PyTree, y: Array) -> Array:
    """float32[K, R]: for each of K models the log-odds log(p / (1 - p)) that it gives each record's label, which is nearly normal over
    models (Carlini et al. 2022, section 5). x [R, ...], y int[R]; logits of K >= 2 classes, or one."""

    def one(variables: Variables) -> Array:
        logits = model.predict(variables, x)
        if logits.shape[-1] == 1:
            return jnp.where(y.reshape(-1) > 0, logits[:, 0], -logits[:, 0])
        chosen = jax.nn.one_hot(y, logits.shape[-1], dtype=bool)
        others = jax.nn.logsumexp(jnp.where(chosen, -jnp.inf, logits), axis=-1)
        return jnp.sum(jnp.where(chosen, logits, 0), axis=-1) - others

    return jax.lax.map(one, variables)


def by_loss(confidence: npt.ArrayLike, members: npt.ArrayLike) -> Scores:
    """One threshold for all records: what is predicted with confidence was trained on (Yeom et al. 2018, "Privacy risk in machine
    learning", section 3.2). confidence: float[R] or [K, R], of models whose members are bool of the same shape."""
    return _told_apart(np.asarray(confidence, np.float64), np.asarray(members, bool))


def by_likelihood_ratio(confidence: npt.ArrayLike, members: npt.ArrayLike) -> Scores:
    """LiRA: for each record, the likelihood ratio of two normals, of models that had it and of models that had not (Carlini et al. 2022,
    "Membership inference attacks from first principles", Algorithm 1, online).

    confidence: float[K, R] of K models; members: bool[K, R]. Each model is attacked with all others as its shadows, so that K models give
    K * R scores. Their variances are of all records together, as the paper advises for few models. Raises FlJaxError where a record
    is in fewer than two of the others, or out of fewer than two.
    """
    values, inside = np.asarray(confidence, np.float64), np.asarray(members, bool)
    if values.ndim != 2 or values.shape != inside.shape:
        raise FlJaxError(f"LiRA needs confidences [K, R] and members of the same shape, not {values.shape} and {inside.shape}.")
    least = min(int(inside.sum(0).min()), int((~inside).sum(0).min()))
    if least < 3:
        raise FlJaxError(f"A record is in or out of only {least} models: train more shadow models, at least 3 with and 3 without each record.")
    ratio = _log_density(values, inside) - _log_density(values, ~inside)
    return _told_apart(ratio, inside)


def _log_density(values: npt.NDArray[np.float64], group: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """float64[K, R]: of each model's confidence under the normal of the other models of the group."""
    count = group.sum(0) - group  # of the others
    total = np.where(group, values, 0)
    mean = (total.sum(0) - total) / count
    own = group.sum(0)
    centred = np.where(group, values - total.sum(0) / own, 0)
    variance = (centred**2).sum() / (own - 1).sum()  # within records, over all of them
    return -((values - mean) ** 2) / (2 * variance) - 0.5 * np.log(variance)


def _told_apart(scores: npt.NDArray[np.float64], members: npt.NDArray[np.bool_]) -> Scores:
    if scores.shape != members.shape:
        raise FlJaxError(f"Each score needs to be known as a member's or not, but there are {scores.shape} scores and {members.shape} members.")
    return Scores(scores[members], scores[~members])
