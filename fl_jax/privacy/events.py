"""Privacy events as values: checked, made of plain numbers, readable, and written as JSON by their structure.

Convention, everywhere in fl_jax: the noise multiplier of a Gaussian event is the standard deviation of the noise in units of the bound
on one summand (the clip). That is how dp_accounting.GaussianDpEvent defines it, and what a mechanism knows of itself; what the sum's
sensitivity is, one clip or two, depends on the neighbouring relation, which belongs to the ledger (see fl_jax.privacy.accounting).
"""

import math
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import dp_accounting
from dp_accounting import dp_event

from fl_jax.errors import FlJaxError

_TYPE = "type"
_POSITIVE_INTEGERS = ("count", "source_dataset_size", "dataset_size", "truncated_batch_size")


def event_to_dict(event: dp_accounting.DpEvent) -> dict[str, Any]:
    """An event as nested dicts of its class and its fields, with plain Python numbers.

    Raises FlJaxError for an event that dp_accounting does not define, and for a field that is not a number, e.g. inside jit.
    """
    if not isinstance(event, dp_accounting.DpEvent):
        raise FlJaxError(f"A privacy cost is one of dp_accounting's events, and {type(event).__name__} is none.")
    return _plain(event.to_named_tuple())


def event_from_dict(content: Mapping[str, Any]) -> dp_accounting.DpEvent:
    """The event of `event_to_dict`, with its fields checked. Raises FlJaxError for a probability above 1, a negative noise, etc."""
    if not isinstance(content, Mapping):
        raise FlJaxError(f"A privacy event is described by its type and its fields, not by {content!r}.")
    kind = vars(dp_event).get(str(content.get(_TYPE)))
    if not (isinstance(kind, type) and issubclass(kind, dp_accounting.DpEvent)):
        raise FlJaxError(f"{content.get(_TYPE)!r} is not a privacy event of dp_accounting.")
    fields = {name: _field(kind.__name__, name, value) for name, value in content.items() if name != _TYPE}
    try:
        event = kind(**fields)
    except TypeError as error:
        raise FlJaxError(f"A {kind.__name__} does not have exactly the fields {', '.join(fields) or '(none)'}.") from error
    match event:
        case dp_accounting.SampledWithoutReplacementDpEvent() if event.sample_size > event.source_dataset_size:
            raise FlJaxError(f"{event.sample_size} cannot be sampled out of {event.source_dataset_size} without replacement.")
        case dp_accounting.GaussianDpEvent() | dp_accounting.TruncatedSubsampledGaussianDpEvent() if event.noise_multiplier == 0:
            return dp_accounting.NonPrivateDpEvent()
        case dp_accounting.ComposedDpEvent() if not event.events:
            return dp_accounting.NoOpDpEvent()
    return event


def checked(event: dp_accounting.DpEvent) -> dp_accounting.DpEvent:
    """The same event out of Python floats, ints and tuples: hashable, comparable, and safe to hand to an accountant.

    dp_accounting's RDP accountant takes the composition of Gaussians inside a sampled event for one Gaussian, and stops adding at the first
    multiplier that is no Python float: an int or a float32 there would give an epsilon that is too small. No noise becomes the event
    that is not private. Raises FlJaxError, see `event_to_dict` and `event_from_dict`.
    """
    return event_from_dict(event_to_dict(event))


def describe(event: dp_accounting.DpEvent) -> str:
    """The event in words, e.g. "Gaussian noise of 1.5 clips, on 5 of 100 drawn without replacement"."""
    match event:
        case dp_accounting.NonPrivateDpEvent():
            return "not private"
        case dp_accounting.GaussianDpEvent():
            return f"Gaussian noise of {event.noise_multiplier:g} clips"
        case dp_accounting.PoissonSampledDpEvent():
            return f"{describe(event.event)}, on a Poisson sample at rate {event.sampling_probability:g}"
        case dp_accounting.SampledWithoutReplacementDpEvent():
            return f"{describe(event.event)}, on {event.sample_size} of {event.source_dataset_size} drawn without replacement"
        case dp_accounting.TruncatedSubsampledGaussianDpEvent():
            return (f"Gaussian noise of {event.noise_multiplier:g} clips, on a Poisson sample at rate {event.sampling_probability:g} of "
                    f"{event.dataset_size}, {event.truncated_batch_size} at most")
        case dp_accounting.SelfComposedDpEvent():
            return describe(event.event) if event.count == 1 else f"{event.count} times ({describe(event.event)})"
        case dp_accounting.ComposedDpEvent(events=(
            dp_accounting.UnsupportedDpEvent(), dp_accounting.SelfComposedDpEvent(event=dp_accounting.NoOpDpEvent(), count=period), known,
        )):  # of fl_jax.mechanism.once_in
            return f"{describe(known)} for who takes part once in {period} rounds, which this sampling does not promise"
        case dp_accounting.ComposedDpEvent():
            return " and ".join(f"({describe(part)})" for part in event.events)
    return str(event)


def parts(event: dp_accounting.DpEvent, count: int = 1) -> Iterator[tuple[dp_accounting.DpEvent, int]]:
    """What `count` times an event is composed of, each with how often: without compositions and without events that cost nothing."""
    match event:
        case dp_accounting.NoOpDpEvent():
            pass
        case dp_accounting.SelfComposedDpEvent():
            yield from parts(event.event, count * event.count)
        case dp_accounting.ComposedDpEvent():
            for part in event.events:
                yield from parts(part, count)
        case _:
            yield event, count


def precision(event: dp_accounting.DpEvent) -> float | None:
    """1 / z^2 of the one Gaussian that Gaussians without sampling amount to; infinity without noise, None for any other event."""
    total = 0.0
    for part, count in parts(event):
        if not isinstance(part, dp_accounting.GaussianDpEvent):
            return None
        # twice, since the square of a small multiplier would be 0
        total += count / part.noise_multiplier / part.noise_multiplier if part.noise_multiplier > 0 else math.inf
    return total


def one_gaussian(event: dp_accounting.DpEvent) -> dp_accounting.GaussianDpEvent | None:
    """The one Gaussian that a composition of Gaussians on the same data amounts to; None for any other event, and for no event at all."""
    if isinstance(event, dp_accounting.GaussianDpEvent):
        return event
    total = precision(event)
    return dp_accounting.GaussianDpEvent(1 / math.sqrt(total)) if total else None


def _plain(value: Any, kind: type = object, field: str = "") -> Any:
    if isinstance(value, dp_event.DpEventNamedTuple):
        if value.module_name != dp_event.__name__:
            raise FlJaxError(f"A privacy cost is one of dp_accounting's events, and {value.class_name} is none.")
        types = type(value).__annotations__
        fields = [name for name in value._fields if name not in ("module_name", "class_name")]
        return {_TYPE: value.class_name, **{name: _plain(getattr(value, name), types[name], name) for name in fields}}
    if isinstance(value, list | tuple):
        return [_plain(item, object, field) for item in value]
    try:
        if kind is not float:
            try:
                return operator.index(value)
            except TypeError:
                pass
        return float(value)
    except (TypeError, ValueError) as error:
        raise FlJaxError(f"The {field} of a privacy event must be a number that is known outside of jit and vmap, not {value}.") from error


def _field(kind: str, name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return event_from_dict(value)
    if isinstance(value, list | tuple):
        return tuple(_field(kind, name, item) for item in value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FlJaxError(f"The {name} of a {kind} must be a finite number, and is {value!r}.")
    if value < 0:
        raise FlJaxError(f"The {name} of a {kind} must not be negative, and is {value}.")
    if "prob" in name and value > 1:
        raise FlJaxError(f"The {name} of a {kind} must be at most 1, and is {value}.")
    if name in _POSITIVE_INTEGERS and (value < 1 or not isinstance(value, int)):
        raise FlJaxError(f"The {name} of a {kind} must be a whole number above 0, and is {value}.")
    return value
