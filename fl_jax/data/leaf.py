"""LEAF's JSON files: users with their records, in a folder for training and one for testing (Caldas et al. 2018, arXiv 1812.01097)."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fl_jax.data.arrays import from_arrays
from fl_jax.data.federated import FederatedDataset
from fl_jax.errors import FlJaxError
from fl_jax.files import disk_errors

Encode = Callable[[list[Any]], np.ndarray]
"""A user's records as they stand in the file -> an array with a row for each."""


def _floats(records: list[Any]) -> np.ndarray:
    return np.asarray(records, np.float32)


def _classes(records: list[Any]) -> np.ndarray:
    numbers = np.asarray(records, np.float64)
    classes = numbers.astype(np.int32)
    if (classes != numbers).any():
        raise ValueError("not whole numbers")
    return classes


def read_leaf(
    train: str | Path,
    test: str | Path | None = None,
    *,
    name: str = "LEAF",
    encode_x: Encode = _floats,
    encode_y: Encode = _classes,
    validation: float = 0.0,
    seed: int | np.random.Generator = 0,
    num_classes: int | None = None,
) -> FederatedDataset:
    """A federation from folders of LEAF's JSON files (or single files), a site for each user, in the order of their names.

    A file holds {"users": [...], "num_samples": [...], "user_data": {user: {"x": [...], "y": [...]}}}. The published code of FedProx
    keeps its data so, and many others do. Users of the test files that have no training records (LEAF's split by user) are unseen
    sites; None: nothing is for testing. encode_x, encode_y: a user's list -> array; the defaults make float32 features and int32
    classes, and text needs others. validation: a fraction of each user's training records, drawn by `seed`.
    num_classes: None is the largest label + 1. Raises FlJaxError, naming file and user, for what is not such a file.
    """
    tables = [_read(Path(folder), encode_x, encode_y) for folder in (train, test) if folder is not None]
    users = [
        (user, is_test, *records) for is_test, table in enumerate(tables) for user, records in table.items() if len(records[1])
    ]
    if not users:
        raise FlJaxError(f"'{train}' holds no records: name a folder of LEAF's JSON files.")
    sites = np.repeat([user for user, *_ in users], [len(y) for *_, y in users])
    unseen = sorted({user for user, is_test, *_ in users if is_test} - {user for user, is_test, *_ in users if not is_test})
    try:
        x, y = (np.concatenate([record[k] for record in users]) for k in (2, 3))
    except ValueError as error:
        raise FlJaxError(
            f"The records in '{train}' are not all of one shape ({error}): give encode_x and encode_y that make them so."
        ) from error
    return from_arrays(
        x,
        y,
        sites,
        name=name,
        seed=seed,
        validation=validation,
        test=np.repeat([bool(is_test) for _, is_test, *_ in users], [len(y) for *_, y in users]),
        unseen=unseen,
        num_classes=num_classes,
        notes=(
            f"Users, records and split are those of the files in '{Path(train).name}' and '{Path(test).name}'."
            if test is not None
            else f"Users and records are those of the files in '{Path(train).name}'; none are for testing.",
        ),
    )


def _read(path: Path, encode_x: Encode, encode_y: Encode) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """User -> records, of a file or of all JSON files in a folder."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise FlJaxError(f"'{path}' holds no JSON file: name a folder of LEAF's files.")
    table: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for file in files:
        content = _json(file)
        for user, count in zip(content["users"], content["num_samples"], strict=True):
            if user in table:
                raise FlJaxError(f"'{file}': user '{user}' has records in another place too; a user's records belong together.")
            table[user] = _user(file, user, content["user_data"].get(user), count, encode_x, encode_y)
    return table


def _json(file: Path) -> Mapping[str, Any]:
    with disk_errors(f"read '{file}'"):
        text = file.read_bytes()
    try:
        content = json.loads(text)
    except ValueError as error:  # JSONDecodeError says line and column
        raise FlJaxError(f"'{file}' is no JSON ({error}): it is damaged or another file.") from error
    if not isinstance(content, dict):
        raise FlJaxError(f"'{file}' is not in LEAF's format: it holds no object.")
    for key, kind in (("users", list), ("num_samples", list), ("user_data", dict)):
        if not isinstance(content.get(key), kind):
            raise FlJaxError(f"'{file}' is not in LEAF's format: it has no {kind.__name__} '{key}'.")
    if len(content["users"]) != len(content["num_samples"]):
        raise FlJaxError(f"'{file}' names {len(content['users'])} users, but has {len(content['num_samples'])} num_samples.")
    return content


def _user(file: Path, user: str, data: Any, count: int, encode_x: Encode, encode_y: Encode) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(data, dict) or not all(isinstance(data.get(key), list) for key in "xy"):
        raise FlJaxError(f"'{file}': user_data of user '{user}' has no lists x and y.")
    if not len(data["x"]) == len(data["y"]) == count:
        raise FlJaxError(
            f"'{file}': user '{user}' has {len(data['x'])} records x and {len(data['y'])} labels y, but num_samples says {count}; the file "
            "is truncated or was changed."
        )
    try:
        return encode_x(data["x"]), encode_y(data["y"])
    except (ValueError, TypeError) as error:
        raise FlJaxError(
            f"'{file}': the records of user '{user}' are not numbers of one shape with whole classes ({error}): give encode_x or encode_y."
        ) from error
