"""What a run ran on: versions, hardware, source and times, so that its numbers can be traced and its speed compared."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

import fl_jax
from fl_jax.runtime import usable_cores

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pandas", "scikit-learn", "dp-accounting")
_GIT_SECONDS = 10
_SOURCES = ("*.py", "*.cfg", "*.toml")


def now() -> datetime.datetime:
    """The time with its zone, UTC: what `describe_environment` takes as start."""
    return datetime.datetime.now(datetime.UTC)


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, the others KiB


def describe_environment(
    started: datetime.datetime, wall_seconds: float | None = None, compile_seconds: float | None = None
) -> dict[str, Any]:
    """Versions, hardware, source and times as a JSON dict; it uses jax's devices, so `virtual_devices` comes before it.

    started: when this process began its work (`now()`). wall_seconds: since then, compilation included; compile_seconds: spent
    compiling; None where they are not known yet.
    """
    return {
        "started": started.isoformat(timespec="milliseconds"),
        "wall_seconds": wall_seconds,
        "compile_seconds": compile_seconds,
        "peak_memory_bytes": peak_memory(),
        "versions": versions(),
        "platform": platform.platform(),
        "hardware": hardware(),
        "source": source(),
    }


def versions() -> dict[str, str | None]:
    """The versions of Python, fl_jax and the packages that numbers depend on; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "fl_jax": fl_jax.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def hardware() -> dict[str, Any]:
    """The processor, its cores (of the machine, and those that this process may use), memory in bytes, and jax's devices."""
    devices = jax.devices()
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "backend": jax.default_backend(),
        "devices": [str(device.device_kind) for device in devices],
    }


def source(folder: Path | None = None) -> dict[str, Any] | None:
    """The git commit of fl_jax's source, and whether source files differ from it; None outside a checkout or without git.

    folder: of the package, default: that of the fl_jax which is imported.
    """
    package = Path(fl_jax.__file__).parent if folder is None else folder
    # An installed package may lie inside the checkout of something else, which does not track it.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(package, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(package, "status", "--porcelain", "--", *(f":(top,glob)**/{pattern}" for pattern in _SOURCES))
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None where it fails, is missing or hangs; variables that point it elsewhere are left out."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "--no-optional-locks", *arguments],
            capture_output=True, text=True, timeout=_GIT_SECONDS, env=environment, check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip().lower() in ("model name", "hardware"):
                return value.strip()
    return platform.processor() or platform.machine()
