"""Censored survival times: Harrell's C-index of every site at once, in O(R log R) time and O(R) memory.

Everything counted is an integer and all shapes are static, as in fl_jax.ranks: nothing depends on the order in which records lie.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fl_jax.errors import FlJaxError
from fl_jax.metrics import Metric, Predictions
from fl_jax.ranks import ordered_bits, sorted_stably, sums_of_spans
from fl_jax.types import Array, Survival


class Pairs(NamedTuple):
    """For each of R records, those that can be compared with it since it had its event first: int32[R] each, 0 where censored.

    A pair is admissible where one record had its event and the other was still seen after it: a later time, or the same time and
    censored. concordant: of those, how many have a lower risk. tied: the same risk. admissible: all. The records come in the
    order of their sites. begin, end: int32[N], a site's span in it.
    """

    concordant: Array
    tied: Array
    admissible: Array
    begin: Array
    end: Array


def comparable_pairs(risk: Array, y: Survival, site: Array, num_records: Array) -> Pairs:
    """Counts pairs of R > 0 records: risk float32[R], y of [R], site int32[R] (N = a padding row), num_records int32[N].

    Not all pairs are formed: records are sorted by risk, and then back by time, one bit of their place at a time; whenever two
    halves part, the records in the later half that lay below one of the earlier half are counted (a wavelet tree: Grossi et al.
    2003, "High-order entropy-compressed text indexes"). A NaN among a site's risks makes that site's counts meaningless, and no
    other's.
    """
    num_rows = site.shape[0]
    levels = (num_rows - 1).bit_length()
    beyond = (0, 2**levels - num_rows)
    event = jnp.pad(y.event > 0, beyond)
    risk, time = (ordered_bits(jnp.pad(values.astype(jnp.float32), beyond)) for values in (risk, y.time))
    site = jnp.pad(site, beyond, constant_values=num_records.shape[0]).astype(jnp.uint32)
    index = jnp.arange(2**levels, dtype=jnp.int32)
    site_bits = num_records.shape[0].bit_length()

    # `place`: where a record stands by site, then time, at one time events before censored records, and then by rising risk. A
    # record at a later place with a lower risk is then one that outlived it: records of one time and kind never count against
    # each other.
    by_risk = sorted_stably(index, risk, 32)
    by_time = sorted_stably(sorted_stably(by_risk, (~event).astype(jnp.uint32), 1), time, 32)
    by_time = sorted_stably(by_time, site, site_bits)
    place = jnp.zeros_like(index).at[by_time].set(index, unique_indices=True)
    by_risk = sorted_stably(sorted_stably(by_time, risk, 32), site, site_bits)

    same = (site[by_time], time[by_time], event[by_time])
    after = _ends(same)  # the place of the first record that outlived this one's time
    bounds = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(num_records, dtype=jnp.int32)])
    last = jnp.append(bounds[1:], 2**levels)[site[by_time].astype(jnp.int32)]

    group = (site[by_risk], risk[by_risk])
    behind = _ends(group) - _ends((*group, time[by_risk], event[by_risk]))
    tied = jnp.zeros_like(index).at[place[by_risk]].set(behind, unique_indices=True)

    def part(level: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        # The records lie in blocks of equal higher bits of their place, each by rising risk.
        place, lower = carry
        bit = levels - 1 - level
        later = (place >> bit) & 1
        start = (index >> (bit + 1)) << (bit + 1)  # of the record's block; of those before it exactly half are later
        later_before = jnp.cumsum(later, dtype=jnp.int32) - later - start // 2
        lower = jnp.where(later == 1, lower, lower + later_before)
        target = start + jnp.where(later == 1, (1 << bit) + later_before, index - start - later_before)
        moved = jnp.zeros((2, *index.shape), jnp.int32).at[:, target].set(jnp.stack([place, lower]), unique_indices=True)
        return moved[0], moved[1]

    _, lower = jax.lax.fori_loop(0, levels, part, (place[by_risk], jnp.zeros_like(index)))
    concordant, tied, admissible = jnp.where(event[by_time], jnp.stack([lower, tied, last - after]), 0)[:, :num_rows]
    return Pairs(concordant, tied, admissible, bounds[:-1], bounds[1:])


def concordance_index(predictions: Predictions) -> Array:
    """Harrell's C-index: float32[N], NaN where no pair is admissible (Harrell et al. 1996, "Multivariable prognostic models").

    The share of admissible pairs whose record with the earlier event has the higher risk, equal risks counting one half. outputs
    [R, 1] are risks: the higher, the earlier the event. y is a Survival; a pair of one time is admissible where one of the two is
    censored, and that one outlived the other. lifelines' concordance_index(time, -risk, event) to float32 rounding.
    """
    y, outputs = predictions.y, predictions.outputs
    if not isinstance(y, Survival) or outputs.shape[1] != 1:
        raise FlJaxError(
            "the C-index needs one risk a record, outputs [R, 1], and y = fl_jax.types.Survival(time, event): choose metrics that "
            "fit the task."
        )
    if predictions.site.shape[0] == 0 or predictions.num_sites == 0:
        return jnp.full(predictions.num_sites, jnp.nan, jnp.float32)
    pairs = comparable_pairs(outputs[:, 0], y, predictions.site, predictions.num_records)
    doubled, admissible = (
        sums_of_spans(values, pairs.begin, pairs.end) for values in (2 * pairs.concordant + pairs.tied, pairs.admissible))
    measured = (predictions.not_finite == 0) & (admissible > 0)
    return jnp.where(measured, jnp.minimum(doubled / (2 * jnp.maximum(admissible, 1)), 1.0), jnp.nan)


SURVIVAL: Mapping[str, Metric] = {"c_index": Metric(concordance_index)}
"""The metrics of a risk score, by the names they have in results."""


def _ends(keys: tuple[Array, ...]) -> Array:
    """int32[R]: of records of which equal ones lie together, the position after the last that equals each one in all keys."""
    num_rows = keys[0].shape[0]
    differs = jnp.any(jnp.stack([key[1:] != key[:-1] for key in keys]), axis=0)
    stop = jnp.where(jnp.append(differs, True), jnp.arange(1, num_rows + 1, dtype=jnp.int32), num_rows)
    return jax.lax.cummin(stop, reverse=True)
