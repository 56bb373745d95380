"""Virtual devices and the compilation cache, each in a process of its own: both act once per process."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fl_jax import runtime
from fl_jax.errors import FlJaxError

ON_CPU = {"JAX_PLATFORMS": "cpu"}


def python(program: str, **environment: str) -> list[str]:
    """The lines that a program prints in a fresh process; warnings are errors, and so is anything on stderr."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "FL_JAX_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
        env={**clean, **ON_CPU, **environment},
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.splitlines()


def test_virtual_devices_before_and_after_the_first_use() -> None:
    lines = python("""
        import jax
        from fl_jax.runtime import virtual_devices
        print(virtual_devices(3), len(jax.devices()))
        print(virtual_devices(2), virtual_devices())
    """)
    assert lines == ["3 3", "3 3"]


def test_virtual_devices_default_to_the_usable_cores_unless_the_user_has_chosen() -> None:
    program = "from fl_jax.runtime import usable_cores, virtual_devices; print(usable_cores(), virtual_devices())"
    cores, devices = python(program)[0].split()
    assert cores == devices
    assert python(program, JAX_NUM_CPU_DEVICES="5")[0].split()[1] == "5"
    with pytest.raises(FlJaxError, match="0 virtual devices"):
        runtime.virtual_devices(0)


CACHED = """
    import jax, jax.numpy as jnp
    from fl_jax.runtime import compilation_cache
    jax.jit(lambda x: x + 1)(jnp.ones(3))  # jax may have compiled before it is asked to remember
    counts = {"/jax/compilation_cache/cache_hits": 0, "/jax/compilation_cache/cache_misses": 0}
    def count(event, **_):
        counts[event] = counts.get(event, 0) + 1
    jax.monitoring.register_event_listener(count)
    folder = compilation_cache(report=print)
    @jax.jit
    def program(x):
        return jnp.sin(x) @ x
    program(jnp.ones((4, 4))).block_until_ready()
    print(folder)
    print(counts["/jax/compilation_cache/cache_hits"] > 0, counts["/jax/compilation_cache/cache_misses"] > 0)
"""


def test_a_second_process_finds_what_the_first_compiled(tmp_path: Path) -> None:
    first, counts = python(CACHED, XDG_CACHE_HOME=str(tmp_path))
    assert counts == "False True"
    assert Path(first).parent == tmp_path / "fl_jax" / "jax"
    assert any(Path(first).iterdir())
    assert python(CACHED, XDG_CACHE_HOME=str(tmp_path)) == [first, "True False"]


def test_the_environment_chooses_a_folder_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(python(CACHED, FL_JAX_CACHE=str(tmp_path / "there"))[0]).parent == tmp_path / "there"
    for word in ("off", "OFF"):
        monkeypatch.setenv("FL_JAX_CACHE", word)
        assert runtime.compilation_cache(tmp_path) is None
    monkeypatch.delenv("FL_JAX_CACHE")
    assert runtime.compilation_cache(tmp_path, enabled=False) is None
    assert not list(tmp_path.glob("*/.writable*"))


def test_a_folder_that_cannot_be_written_is_reported_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    report, folder, counts = python(CACHED, FL_JAX_CACHE=str(tmp_path / "file" / "cache"))
    assert "a file is where a folder should be" in report and "set FL_JAX_CACHE" in report
    assert (folder, counts) == ("None", "False False")
