"""What a program sets up before it computes: one device a core, and compiled programs that outlive the process.

Programs call these on their first lines; importing fl_jax sets nothing.
"""

import contextlib
import hashlib
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from fl_jax.errors import FlJaxError
from fl_jax.files import explain

CACHE_VARIABLE = "FL_JAX_CACHE"
_OFF = ("off", "0", "no", "false")


def to_stderr(sentence: str) -> None:
    """Print one sentence to the standard error stream."""
    print(sentence, file=sys.stderr)


def usable_cores() -> int:
    """How many CPU cores this process may use: fewer than the machine has, under a scheduler or in a container."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def virtual_devices(n: int | None = None) -> int:
    """Split the CPU into n devices (default: one a usable core), each with its own lanes; returns how many devices there are.

    To be called before the first use of a device: afterwards nothing changes. A GPU's devices stay what they are, and so does a
    number that the user has set (JAX_NUM_CPU_DEVICES, XLA_FLAGS) where n is None. Raises FlJaxError for n < 1.
    """
    if n is not None and n < 1:
        raise FlJaxError(f"{n} virtual devices cannot compute; give 1 or more.")
    set_by_user = jax.config.jax_num_cpu_devices != -1  # type: ignore[attr-defined]
    set_by_user |= "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if n is not None or not set_by_user:
        with contextlib.suppress(RuntimeError):  # a device was used already
            jax.config.update("jax_num_cpu_devices", usable_cores() if n is None else n)
    return jax.device_count()


def default_cache_folder() -> Path:
    """fl_jax/jax in the user's cache folder: $XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fl_jax" / "jax"


def compilation_cache(
    folder: str | os.PathLike[str] | None = None,
    enabled: bool = True,
    report: Callable[[str], None] = to_stderr,
) -> Path | None:
    """Keep compiled programs on the disk, so that a later process need not compile them again; returns where, None if nowhere.

    folder: default: the environment variable FL_JAX_CACHE, else `default_cache_folder()`; programs for different processors go to
    different subfolders of it. Nothing is kept where enabled is False or FL_JAX_CACHE is "off"; a cache that the user has already
    given to jax (JAX_COMPILATION_CACHE_DIR) stays as it is. Where the folder cannot be written, `report` gets one sentence and
    nothing is kept.
    """
    wish = os.environ.get(CACHE_VARIABLE, "")
    if not enabled or wish.lower() in _OFF:
        return None
    present = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if present:
        return Path(present)
    try:
        target = Path(folder or wish or default_cache_folder()).expanduser().absolute() / _processor()
        target.mkdir(parents=True, exist_ok=True)
        probe = target / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        reason = explain(error) if isinstance(error, OSError) else str(error)
        report(f"Compiled programs are not kept for the next run ({reason}); set {CACHE_VARIABLE} to a folder, or to off.")
        return None
    jax.config.update("jax_compilation_cache_dir", str(target))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return target


def _processor() -> str:
    """A name for what the CPU can do: code that was compiled for one processor may stop another with an illegal instruction."""
    features = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    identity = f"{platform.system()} {platform.machine()} {features}"
    return hashlib.sha256(identity.encode()).hexdigest()[:12]
