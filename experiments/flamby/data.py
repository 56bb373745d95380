"""How a study of FLamby's protocol shares out records: to all sites, without one of them, to one alone, or together in one place.

All of these have the same shapes, so that they are rows of one program; and where each seed's model starts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.flamby.protocol import LOCAL, POOLED, POOLED_OWN_SCALE, Load
from fl_jax.data import FederatedDataset, Records
from fl_jax.types import Array, Model, PyTree, Sites, Splits


class Variant(NamedTuple):
    """One way to share out the records. left_out: the site that has none for training. arm: what its runs are called, if not as
    the arm."""

    splits: Splits
    left_out: str = ""
    arm: str = ""


def torch_linear(seed: int, num_inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """The initial weights float32[num_inputs] and bias float32[1] of torch.nn.Linear(num_inputs, 1) after
    torch.manual_seed(seed).

    Uniform in +- 1 / sqrt(num_inputs), from the low 24 bits of each number of the Mersenne twister, as PyTorch draws on a CPU.
    """
    bits = np.random.RandomState(seed).randint(0, 2**32, size=num_inputs + 1, dtype=np.uint32) & (2**24 - 1)
    values = ((2 * (bits / 2**24) - 1) * num_inputs**-0.5).astype(np.float32)
    return values[:-1], values[-1:]


def initial_params(model: Model, seeds: Sequence[int], num_inputs: int) -> PyTree:
    """The parameters that each seed starts from, every leaf [S, ...]: PyTorch's, in the places of a model of one dense layer."""
    weights, biases = (np.stack(values) for values in zip(*(torch_linear(seed, num_inputs) for seed in seeds), strict=True))
    shapes = jax.eval_shape(model.init, jax.random.key(0)).params
    return jax.tree.map(lambda leaf: jnp.asarray(biases if leaf.ndim == 1 else weights[:, :, None]), shapes)


def variants_of_rounds(load: Load, leave_out: bool) -> list[Variant]:
    """The federation and, with leave_out, the federation without each of its sites."""
    whole = load(())
    without = whole.site_names if leave_out else ()
    variants = [Variant(_placed(whole, whole.site_names))]
    return variants + [Variant(_placed(load((name,)), whole.site_names), name) for name in without]


def variants_of_epochs(rounds: Sequence[Variant], load_pooled: Load | None, names: Sequence[str]) -> list[Variant]:
    """All records in one place, also without each site, and each site alone.

    rounds: the variants of the federation. load_pooled: the data as the pooled arm trains on them, where that is something else;
    it is tested at sites with the data as they have them, as in FLamby.
    """
    splits = rounds[0].splits
    alone = [Variant(splits._replace(train=_only(splits.train, i)), arm=LOCAL.format(name)) for i, name in enumerate(names)]
    if load_pooled is None:
        return [*(Variant(v.splits._replace(train=_together(v.splits.train)), v.left_out, POOLED) for v in rounds), *alone]
    pooled = []
    for variant in rounds:
        own = _placed(load_pooled((variant.left_out,) if variant.left_out else ()), names)
        pooled.append(Variant(own._replace(train=_together(own.train), test=variant.splits.test), variant.left_out, POOLED))
    return [*pooled, Variant(splits._replace(train=_together(splits.train)), arm=POOLED_OWN_SCALE), *alone]


def _placed(dataset: FederatedDataset, names: Sequence[str]) -> Splits:
    """A data set on the host with a place for each of the named sites, empty for those that it lacks; what is unseen is one
    site."""

    def place(records: Records) -> Sites:
        offset, size = np.zeros((2, len(names)), np.int32)
        at = [names.index(name) for name in dataset.site_names]
        offset[at], size[at] = records.offsets[:-1], records.sizes
        return _sites(records, offset, size)

    unseen = _sites(dataset.unseen, np.zeros(1, np.int32), dataset.unseen.offsets[-1:].astype(np.int32))
    return Splits(place(dataset.train), place(dataset.validation), place(dataset.test), unseen)


def _sites(records: Records, offset: np.ndarray, size: np.ndarray) -> Sites:
    return Sites(records.x, records.y, offset, size)  # type: ignore[arg-type]  # NumPy until it is stacked


def _only(sites: Sites, index: int) -> Sites:
    return sites._replace(size=np.where(np.arange(len(sites.size)) == index, sites.size, 0))  # type: ignore[arg-type]


def _together(sites: Sites) -> Sites:
    """All records at the first site."""
    first = np.arange(len(sites.size)) == 0
    size = np.where(first, np.sum(sites.size), 0).astype(np.int32)
    return sites._replace(offset=np.zeros_like(sites.offset), size=size)  # type: ignore[arg-type]


def stacked(splits: Sequence[Splits]) -> Splits:
    """Stacked on a new first axis, tables padded with zeros to the longest."""

    def stack(*leaves: np.ndarray) -> Array:
        length = max(1, *(len(leaf) for leaf in leaves))
        return jnp.asarray(np.stack([np.pad(leaf, [(0, length - len(leaf))] + [(0, 0)] * (leaf.ndim - 1)) for leaf in leaves]))

    return jax.tree.map(stack, *splits)
