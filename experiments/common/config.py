"""Configurations: frozen dataclasses with a default for every field, read from JSON and recorded as JSON.

A field is a bool, int, float, str, Path, enum, Literal, another such dataclass, a tuple, list or dict of these, or one of them or None.
"""

import contextlib
import dataclasses
import difflib
import enum
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from fl_jax.errors import FlJaxError
from fl_jax.files import disk_errors, jsonable

UNRECORDED: Mapping[str, Any] = types.MappingProxyType({"recorded": False})
"""dataclasses.field(metadata=...) of what says where and how to run, and not what: a run may be resumed with another value."""


@dataclasses.dataclass(frozen=True)
class Common:
    """What every experiment takes."""

    quick: bool = False
    """a small form of the study that shows in a short time whether it works; its numbers mean nothing"""
    out: Path | None = dataclasses.field(default=None, metadata=UNRECORDED)
    """the run folder, new or empty; a new one below runs/ where it is not given"""
    resume: bool = dataclasses.field(default=False, metadata=UNRECORDED)
    """go on with the run in --out, from its last checkpoint"""
    devices: int | None = dataclasses.field(default=None, metadata=UNRECORDED)
    """virtual devices that the CPU is split into; one a core where it is not given"""
    tensorboard: bool = dataclasses.field(default=False, metadata=UNRECORDED)
    """write the metrics as TensorBoard event files too, to tensorboard/ in the run folder"""

    @classmethod
    def quick_defaults(cls) -> Self:
        """The defaults under --quick, to which a configuration file and the command line then apply."""
        return cls(quick=True)


ConfigT = TypeVar("ConfigT", bound=Common)


def at_least_one(config: Any, *names: str) -> None:
    """Raises FlJaxError for the first of these fields that is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise FlJaxError(f"{name} must be 1 or more, and is {getattr(config, name)}.")


def recorded(config: Any) -> dict[str, Any]:
    """A configuration as the JSON dict that `config_from_file` reads back: all its fields but those marked UNRECORDED."""
    return jsonable(_encode(config))


def load_json(path: Path) -> dict[str, Any]:
    """The content of a configuration file. Raises FlJaxError where it cannot be read, is not JSON, no object, or gives a key twice."""
    with disk_errors(f"read the configuration {path}"):
        content = path.read_bytes()
    try:
        loaded = json.loads(content, object_pairs_hook=lambda pairs: _once(path, pairs))
    except FlJaxError:
        raise
    except ValueError as error:
        raise FlJaxError(f"The configuration {path} is not JSON ({error}): correct it.") from error
    if not isinstance(loaded, dict):
        raise FlJaxError(f"The configuration {path} must be a JSON object, {{...}}, of fields and their values.")
    return loaded


def override(config: ConfigT, content: Mapping[str, Any], source: Path | str = "the configuration") -> ConfigT:
    """The configuration with the fields that `content` gives, nested ones too.

    source: what the content came from, for errors. Raises FlJaxError for a key that is no field, naming the nearest, and for a value
    of another type.
    """
    return _decode(type(config), content, config, "", f"{source}")


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise FlJaxError(f"The configuration {path} gives {twice!r} twice: keep one.")
    return found


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field for field in dataclasses.fields(value) if field.metadata.get("recorded", True)]
        return {field.name: _encode(getattr(value, field.name)) for field in fields}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, tuple | list):
        return [_encode(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    return value


class _Mismatch(Exception):
    """A value is not of its field's type."""


def _decode(kind: Any, value: Any, default: Any, where: str, source: str) -> Any:
    """`value`, as JSON has it, as a `kind`; where: the dotted name of its field. Raises FlJaxError."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, Mapping):
            raise FlJaxError(f"In {source}, {where} must be an object, {{...}}, of fields and their values, and is {_shown(value)}.")
        hints = typing.get_type_hints(kind)
        names = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
        for name in value:
            if name not in names:
                raise FlJaxError(f"In {source}, {_dotted(where, name)} is not a field: {_suggestion(name, list(names))}")
        base = default if isinstance(default, kind) else kind()
        given = {
            name: _decode(names[name], item, getattr(base, name), _dotted(where, name), source) for name, item in value.items()
        }
        return dataclasses.replace(base, **given)
    if isinstance(value, Mapping) and _is_union(kind):
        for member in typing.get_args(kind):
            if dataclasses.is_dataclass(member):
                return _decode(member, value, default, where, source)
    try:
        return _leaf(kind, value, where, source)
    except _Mismatch:
        raise FlJaxError(f"In {source}, {where} must be {_words(kind)}, and is {_shown(value)}.") from None


def _leaf(kind: Any, value: Any, where: str, source: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if _is_union(kind):
        return _first(arguments, value, where, source)
    if origin is typing.Literal:
        found = [choice for choice in arguments if choice == value and type(choice) is type(value)]
        return found[0] if found else _mismatch()
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            _mismatch()
        any_length = origin is list or arguments[-1] is Ellipsis
        kinds = [arguments[0]] * len(value) if any_length else list(arguments)
        if len(kinds) != len(value):
            _mismatch()
        return origin(_decode(item_kind, item, None, f"{where}[{i}]", source)
                      for i, (item_kind, item) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        if not isinstance(value, Mapping):
            _mismatch()
        return {key: _decode(arguments[1], item, None, _dotted(where, key), source) for key, item in value.items()}
    if kind is type(None):
        return None if value is None else _mismatch()
    if kind is float:
        return _float(value)
    if kind in (bool, int, str):
        return value if type(value) is kind else _mismatch()
    if kind is Path:
        return Path(value) if isinstance(value, str) else _mismatch()
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind[value] if value in kind.__members__ else _mismatch()
    raise TypeError(f"{where}: a configuration cannot have a field of type {kind}.")


def _float(value: Any) -> float:
    infinite = value in ("inf", "-inf")  # what JSON cannot hold is recorded as text
    if not infinite and (isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value)):
        _mismatch()
    return float(value)


def _first(kinds: tuple[Any, ...], value: Any, where: str, source: str) -> Any:
    """The value as the first of several types that takes it."""
    for kind in kinds:
        if not dataclasses.is_dataclass(kind):
            with contextlib.suppress(_Mismatch):
                return _leaf(kind, value, where, source)
    return _mismatch()


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _mismatch() -> typing.NoReturn:
    raise _Mismatch


def _dotted(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _suggestion(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}."


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _words(kind: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if _is_union(kind):
        return " or ".join(_words(argument) for argument in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(json.dumps(choice) for choice in arguments)
    if origin in (tuple, list):
        if origin is tuple and arguments[-1] is not Ellipsis:
            return f"a list of {len(arguments)} values"
        return "a list"
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "one of " + ", ".join(kind.__members__)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path in quotes", type(None): "null"}
    return names.get(kind, "an object, {...},")
