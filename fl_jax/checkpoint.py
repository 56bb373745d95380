"""Checkpoints of a training run that are complete, verified bit for bit, or not there.

Orbax writes the arrays and renames a finished step into place, so a kill leaves no half step. It does not notice a flipped bit:
a damaged file restores with wrong numbers. So each step gets a manifest with the SHA-256 of every file, written last. A step
without a manifest is not complete; one whose files do not match it is damaged, and the step before is used.

Layout: folder/checkpoints.json (format and configuration), folder/<step>/ (orbax's files, and manifest.json). For one process;
saving is synchronous, since the manifest must come after everything else.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import orbax.checkpoint as ocp

from fl_jax.errors import FlJaxError
from fl_jax.files import check_config, disk_errors, explain, read_json, sync_folder, write_json
from fl_jax.leaves import Description, describe, from_arrays, templates, to_arrays
from fl_jax.runtime import to_stderr
from fl_jax.types import PyTree

__all__ = ["Checkpoints", "check_config"]

_FORMAT = 1
_HEADER = "checkpoints.json"
_MANIFEST = "manifest.json"
_LOCK = ".lock"
_LEFTOVER = ".orbax-checkpoint-tmp"
_NEVER_EMPTY = {"leaves": np.asarray(0)}  # orbax refuses a tree without leaves
_SETTLE = 0.2  # seconds for writes that are under way to end, after one of them failed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep orbax's log off the terminal for the block: what matters of it reaches the user as an exception or a report."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _late_callbacks_ignored() -> Iterator[None]:
    """Keep silent about tensorstore writes that fail after orbax has given up on a save and closed its event loop."""
    hook = sys.unraisablehook

    def ignoring(unraisable: Any) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and "Event loop is closed" in str(unraisable.exc_value)):
            hook(unraisable)

    sys.unraisablehook = ignoring
    try:
        yield
    finally:
        sys.unraisablehook = hook


def _digest(path: Path) -> str:
    """The SHA-256 of a file, which is flushed to the disk on the way."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damage(step_folder: Path) -> str | None:
    """Why a complete step is not intact, as a clause; None where every file has the stated SHA-256."""
    try:
        manifest = json.loads((step_folder / _MANIFEST).read_bytes())
        for name, digest in manifest["sha256"].items():
            if not (step_folder / name).is_file():
                return f"{name} is missing"
            if _digest(step_folder / name) != digest:
                return f"{name} does not match its checksum"
    except OSError as error:
        return explain(error)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{_MANIFEST} is unreadable"
    return None


class Checkpoints:
    """The checkpoints of one run in one folder; use it in a `with` block.

    folder: created where missing; it must be empty, or have been made by this class. One process at a time.
    config: the run's configuration (a JSON dict), stored when the folder is new; None neither stores nor checks.
    keep: how many complete steps stay, at least 1; older ones are deleted after a newer one is complete.
    report: gets one sentence where a damaged step is passed over.

    Opening removes what a killed run left half written. Raises FlJaxError where the folder cannot be used, holds something else,
    is in use by another process, or was started with another configuration.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: Mapping[str, Any] | None = None,
        keep: int = 2,
        report: Callable[[str], None] = to_stderr,
    ) -> None:
        if keep < 1:
            raise FlJaxError(f"keep is {keep}, but at least one checkpoint has to stay; give 1 or more.")
        self.folder = Path(folder).absolute()
        self._keep, self._report = keep, report
        self._damaged: set[int] = set()
        with contextlib.ExitStack() as undo, disk_errors(f"use {self.folder} for checkpoints"):
            self.folder.mkdir(parents=True, exist_ok=True)
            names = sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))
            if names and _HEADER not in names:
                raise FlJaxError(f"{self.folder} holds other files ({names[0]}, ...); give checkpoints an empty or new folder.")
            undo.callback(self._lock())
            self._check_header(config)
            self._clean()
            options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, save_root_metadata=False)
            with _quiet():
                self._manager = ocp.CheckpointManager(self.folder, options=options)
            undo.callback(self._manager.close)
            self._undo = undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop orbax's threads and let another process have the folder; safe to repeat."""
        with _quiet():
            self._undo.close()

    def latest_step(self) -> int | None:
        """The newest complete step that was not found damaged; None where there is none. It does not verify checksums."""
        return max(self._complete() - self._damaged, default=None)

    def save(self, step: int, tree: PyTree, meta: Mapping[str, Any]) -> None:
        """Store a step: returns once it is complete on the disk.

        step: above every intact step in the folder. tree: any pytree of arrays, typed PRNG keys and numbers, of any shape and
        dtype. meta: a dict of what JSON can hold. Raises FlJaxError where that is not so, or where the disk is full or not
        writable; the earlier checkpoints are then as they were.
        """
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise FlJaxError(f"{self.folder} already has step {latest}, so step {step} is not new; resume or use a new folder.")
        leaves = [leaf._asdict() for leaf in describe(tree)]
        try:
            text = json.dumps(meta)
        except (TypeError, ValueError) as error:
            raise FlJaxError(f"The meta of a checkpoint is not JSON ({error}); give text, numbers, lists or dicts.") from error
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave({**_NEVER_EMPTY, **to_arrays(tree)}),
            meta=ocp.args.JsonSave({"meta": json.loads(text), "leaves": leaves}),
        )
        action = f"save step {step} in {self.folder} (earlier checkpoints are intact)"
        with disk_errors(action):
            if step in self._damaged:
                self._delete(step)
            with _late_callbacks_ignored():
                failure = self._write(step, arguments)
                if failure is not None:
                    time.sleep(_SETTLE)
                    self._discard(step)
                    raise failure
            for old in sorted(self._complete() - self._damaged)[: -self._keep]:
                self._delete(old)
            for old in sorted(self._damaged):
                self._delete(old)

    def restore_latest(self, like_tree: PyTree) -> tuple[int, PyTree, Any] | None:
        """The newest intact step as (step, tree, meta), equal bit for bit to what was saved; None where nothing was saved.

        like_tree: a tree of the same structure, shapes and dtypes (arrays or jax.ShapeDtypeStruct); each restored leaf is of its
        kind and, for a committed array, on its devices. Damaged steps are reported and passed over. Raises FlJaxError where every
        step is damaged, or where the stored tree is not like `like_tree`.
        """
        steps = sorted(self._complete(), reverse=True)
        for step in steps:
            damage = _damage(self.folder / str(step))
            if damage is None:
                return step, *self._restore(step, like_tree)
            self._damaged.add(step)
            self._report(f"The checkpoint of step {step} in {self.folder} is damaged ({damage}); the one before it is used.")
        if steps:
            raise FlJaxError(f"No checkpoint in {self.folder} is intact; restore it from a copy, or start again in a new one.")
        return None

    def _restore(self, step: int, like_tree: PyTree) -> tuple[PyTree, Any]:
        """Read an intact step into the structure of `like_tree`: (tree, meta)."""
        with _quiet():
            stored = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        _check_structure(step, [Description(**leaf) for leaf in stored["leaves"]], describe(like_tree))
        arguments = ocp.args.StandardRestore({**_NEVER_EMPTY, **templates(like_tree)})
        with _quiet():
            arrays = self._manager.restore(step, args=ocp.args.Composite(state=arguments)).state
        return from_arrays(arrays, like_tree), stored["meta"]

    def _lock(self) -> Callable[[], None]:
        """Take the folder for this process, and return what gives it back; a killed process gives it back by dying."""
        descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise FlJaxError(f"Another process writes checkpoints to {self.folder}; wait for it or use another folder.") from None
        except OSError:
            pass  # some network file systems have no locks
        return lambda: os.close(descriptor)

    def _check_header(self, config: Mapping[str, Any] | None) -> None:
        """Write the folder's header where it is new, else compare the configurations."""
        path = self.folder / _HEADER
        if not path.exists():
            write_json(path, {"format": _FORMAT, "config": config})
            return
        header = read_json(path)
        if not isinstance(header, dict) or header.get("format") != _FORMAT:
            raise FlJaxError(f"{path} is of another version of fl_jax; use that version, or another folder.")
        if config is not None:
            check_config(header["config"] or {}, config)

    def _clean(self) -> None:
        """Remove what a killed process left behind: orbax's temporary folders and steps without a manifest."""
        for path in list(self.folder.iterdir()):
            if path.is_dir() and (_LEFTOVER in path.name or path.name.isdecimal() and not (path / _MANIFEST).exists()):
                shutil.rmtree(path)

    def _complete(self) -> set[int]:
        """The steps that have a manifest."""
        with disk_errors(f"read {self.folder}"):
            return {int(path.name) for path in self.folder.iterdir() if path.name.isdecimal() and (path / _MANIFEST).exists()}

    def _write(self, step: int, arguments: ocp.args.Composite) -> OSError | None:
        """Let orbax write a step, and seal it; return what the system reported where that failed."""
        try:
            with _quiet():
                self._manager.save(step, args=arguments, force=True)
                self._manager.wait_until_finished()
            self._seal(step)
        except OSError as error:
            return OSError(error.errno, error.strerror)
        except ValueError as error:  # tensorstore's errors; the leaves were checked, so it is the disk
            return OSError(*_os_error(error))
        return None

    def _seal(self, step: int) -> None:
        """Write the manifest of a step that orbax finished: from here on it is complete."""
        folder = self.folder / str(step)
        paths = sorted(folder.rglob("*"))
        sums = {path.relative_to(folder).as_posix(): _digest(path) for path in paths if path.is_file()}
        for path in paths:
            if path.is_dir():
                sync_folder(path)
        sync_folder(folder)
        sync_folder(self.folder)
        write_json(folder / _MANIFEST, {"step": step, "sha256": sums})

    def _delete(self, step: int) -> None:
        """Delete a step, manifest first: killed half way, it is a leftover and not a damaged step."""
        (self.folder / str(step) / _MANIFEST).unlink(missing_ok=True)
        with _quiet():
            self._manager.delete(step)
        self._damaged.discard(step)

    def _discard(self, step: int) -> None:
        """Remove what a failed save left behind, so that the disk is not fuller than before."""
        for path in self.folder.glob(f"{step}{_LEFTOVER}*"):
            shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(self.folder / str(step), ignore_errors=True)
        with _quiet():
            self._manager.reload()


def _os_error(error: Exception) -> tuple[int, str]:
    """(errno, text) of the operating system's error that tensorstore reports in its text; errno 0 where it names none."""
    text = str(error)
    _, found, code = text.partition("os_error_code='")
    number = int(code.split("'")[0]) if found else 0
    return number, os.strerror(number) if number else text.splitlines()[0]


def _check_structure(step: int, stored: list[Description], wanted: list[Description]) -> None:
    """Raise FlJaxError, naming the first leaf that differs, where a stored tree cannot be restored into the wanted one."""
    there, here = ({leaf.path: f"{leaf.dtype}{leaf.shape}" for leaf in leaves} for leaves in (stored, wanted))
    for path in [*there, *(path for path in here if path not in there)]:
        if there.get(path) != here.get(path):
            raise FlJaxError(
                f"The checkpoint of step {step} does not fit this run: {path} is {there.get(path, 'absent')} there and "
                f"{here.get(path, 'absent')} here; use the model, algorithm and seeds that it was saved with, or another folder."
            )
