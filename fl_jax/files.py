"""Files that survive a kill, a full disk and a second run: atomic writes, JSON, and configurations that are written once."""

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fl_jax.errors import FlJaxError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
_ABSENT = "(absent)"


def explain(error: OSError) -> str:
    """What an OSError means for the person who reads it: a clause without a full stop, with what to do."""
    if error.errno in _NO_SPACE:
        return "the disk or quota is full, free some space and run again"
    if error.errno in _NO_ACCESS:
        return "writing is not permitted there, choose another folder or change its permissions"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return "a file is where a folder should be, choose another folder"
    return error.strerror or str(error)


@contextlib.contextmanager
def disk_errors(action: str) -> Iterator[None]:
    """Turn any OSError in the block into a FlJaxError of one sentence: "Could not {action}: {why and what to do}."."""
    try:
        yield
    except OSError as error:
        raise FlJaxError(f"Could not {action}: {explain(error)}.") from error


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` survive a power cut, on file systems that can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a whole file so that a reader, or a run after a crash, finds the old content or the new, never a part.

    The bytes go to a hidden file beside `path` (".name.tmp"), are flushed to the disk, and renamed. Raises OSError, with
    the old file untouched. One writer at a time.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def jsonable(value: Any, where: str = "") -> Any:
    """`value` in what strict JSON can hold.

    Mappings, sequences, strings, numbers, None, paths, arrays and array scalars; NaN becomes null, an infinity "inf" or "-inf"
    (which `float` reads back). Raises FlJaxError, naming the dotted key, for anything else.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): jsonable(item, f"{where}.{key}" if where else str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None if math.isnan(value) else str(float(value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "__array__") and np.asarray(value).dtype.kind in "biufUS":
        return jsonable(np.asarray(value).tolist(), where)
    raise FlJaxError(f"{where or 'A value'} is a {type(value).__name__}, not JSON; give text, numbers, lists or dicts.")


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as strict, indented JSON (see `jsonable`). Raises OSError, FlJaxError."""
    write_atomically(path, json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises FlJaxError where it is missing, unreadable or not JSON."""
    with disk_errors(f"read {path}"):
        content = path.read_bytes()
    try:
        return json.loads(content)
    except ValueError as error:
        raise FlJaxError(f"{path} is not valid JSON; restore it from a copy or start a new folder.") from error


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: leaf} of nested dicts; an empty dict is a leaf."""
    if isinstance(value, dict) and value:
        parts = (_flatten(item, f"{prefix}.{name}" if prefix else name) for name, item in value.items())
        return {key: leaf for part in parts for key, leaf in part.items()}
    return {prefix: value}


def config_differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """What changed between two configurations, as "dotted.key: stored -> given", in the order of the keys; [] where they agree.

    Both are compared as the JSON they are stored as, so a tuple equals a list and a NumPy number the Python one.
    """
    old, new = (_flatten(jsonable(config)) if config else {} for config in (stored, given))
    keys = [*old, *(key for key in new if key not in old)]

    def show(config: dict[str, Any], key: str) -> str:
        return json.dumps(config[key]) if key in config else _ABSENT

    # Compared as text: in Python True == 1 and 1 == 1.0, in a configuration they are different answers.
    return [f"{key}: {show(old, key)} -> {show(new, key)}" for key in keys if show(old, key) != show(new, key)]


def check_config(stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse to go on with a run under another configuration.

    Raises FlJaxError that shows each difference as "dotted.key: stored -> given".
    """
    differences = config_differences(stored, given)
    if differences:
        raise FlJaxError(
            "The configuration differs from the one that this folder was started with "
            f"({'; '.join(differences)}); use the stored one, or another folder."
        )
