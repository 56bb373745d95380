"""Checkpoints: what is restored is what was saved, whatever is killed, cut, flipped, full or in use."""

import json
import os
import resource
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fl_jax.checkpoint import Checkpoints, check_config
from fl_jax.errors import FlJaxError


class Pair(NamedTuple):
    first: Any
    second: Any


def a_tree(step: int) -> Any:
    """One of everything that a run carries, all of it a function of the step."""
    rng = np.random.default_rng(step)
    return Pair(
        first={
            "kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
            "half": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
            "nan": jnp.asarray([np.nan, -0.0, np.inf]),
            "a/b": {"c.d": jnp.int32(step)},
            "none": None,
            "stats": {},
            "empty": jnp.zeros((0, 4)),
        },
        second=[
            jax.random.key(step),
            jax.random.split(jax.random.key(step, impl="rbg"), 3),
            (np.arange(step + 2, step + 4, dtype=np.uint8), np.int64(2**40 + step), np.float64(0.1)),
            (step, 0.5 + step, step % 2 == 0),
            jax.device_put(jnp.float32(step), jax.devices()[0]),
        ],
    )


def raw(leaf: Any) -> Any:
    """A leaf's type, dtype, shape and bytes: equal only if the leaves are, bit for bit."""
    kind = "jax" if isinstance(leaf, jax.Array) else type(leaf).__name__
    dtype = str(getattr(leaf, "dtype", ""))
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return kind, dtype, np.shape(leaf), np.asarray(leaf).tobytes()


def assert_identical(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert [raw(leaf) for leaf in jax.tree.leaves(one)] == [raw(leaf) for leaf in jax.tree.leaves(other)]


def small(step: int) -> dict[str, jax.Array]:
    return {"w": jnp.full(3, float(step)), "key": jax.random.key(step)}


def fill(folder: Path, *steps: int, keep: int = 9) -> None:
    with Checkpoints(folder, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, small(step), {"step": step})


def arrays_file(folder: Path, step: int) -> Path:
    """The data file of a step in which a flipped bit changes numbers."""
    return max((folder / str(step) / "state").glob("**/d/*"), key=lambda path: path.stat().st_size)


def flip_bit(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


def test_restores_everything_bit_for_bit(tmp_path: Path) -> None:
    meta = {"epsilon": [1.5, None], "text": "ä", "nested": {"n": 3}}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(a_tree(0)) is None
        assert checkpoints.latest_step() is None
        checkpoints.save(3, a_tree(3), meta)
        checkpoints.save(5, a_tree(5), meta)
        assert checkpoints.latest_step() == 5
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(a_tree(0))
    assert restored is not None
    step, tree, stored_meta = restored
    assert (step, stored_meta) == (5, meta)
    assert_identical(tree, a_tree(5))
    # An array that was free to move stays so, or a resumed run could not enter a program over several devices.
    assert not tree.first["kernel"].committed and not tree.second[0].committed
    assert tree.second[4].committed


def test_restores_into_shapes_alone_and_draws_the_same_numbers(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(jax.eval_shape(lambda: small(0)))
    assert restored is not None
    assert_identical(restored[1], small(1))
    np.testing.assert_array_equal(jax.random.bits(restored[1]["key"], (4,)), jax.random.bits(jax.random.key(1), (4,)))


@pytest.mark.parametrize("tree", [None, {}, jnp.zeros((2, 0)), jnp.float32(3)], ids=["none", "dict", "no elements", "one leaf"])
def test_trees_of_hardly_anything(tmp_path: Path, tree: Any) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, tree, {})
        restored = checkpoints.restore_latest(tree)
    assert restored is not None
    assert_identical(restored[1], tree)


def test_keeps_the_newest(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["3", "4"]
    with pytest.raises(FlJaxError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)


@pytest.mark.parametrize("where", [0.0, 0.1, 0.5, 0.9])
def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path, where: float) -> None:
    fill(tmp_path, 1, 2)
    flip_bit(arrays_file(tmp_path, 2), where)
    reports: list[str] = []
    with Checkpoints(tmp_path, report=reports.append) as checkpoints:
        restored = checkpoints.restore_latest(small(0))
    assert restored is not None and restored[0] == 1
    assert_identical(restored[1], small(1))
    assert len(reports) == 1 and "step 2" in reports[0] and "checksum" in reports[0]


def test_every_file_of_a_step_is_guarded(tmp_path: Path) -> None:
    fill(tmp_path / "run", 1, 2)
    names = [path for path in (tmp_path / "run" / "2").rglob("*") if path.is_file() and path.stat().st_size]
    assert len(names) > 8
    reports: list[str] = []
    with Checkpoints(tmp_path / "run", report=reports.append) as checkpoints:
        for count, name in enumerate(names, start=1):
            flip_bit(name)
            restored = checkpoints.restore_latest(small(0))
            assert restored is not None and restored[0] == 1 and len(reports) == count, name
            flip_bit(name)
        restored = checkpoints.restore_latest(small(0))
    assert restored is not None and restored[0] == 2


def test_cut_and_missing_files_are_noticed_and_a_later_save_replaces_the_step(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2, 3)
    cut = arrays_file(tmp_path, 3)
    cut.write_bytes(cut.read_bytes()[:-1])
    arrays_file(tmp_path, 2).unlink()
    reports: list[str] = []
    with Checkpoints(tmp_path, report=reports.append) as checkpoints:
        assert checkpoints.latest_step() == 3
        restored = checkpoints.restore_latest(small(0))
        assert restored is not None and restored[0] == 1
        assert ["is missing" in report for report in reports] == [False, True]
        assert checkpoints.latest_step() == 1
        checkpoints.save(3, small(3), {})
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["1", "3"]
    with Checkpoints(tmp_path, report=pytest.fail) as checkpoints:
        restored = checkpoints.restore_latest(small(0))
    assert restored is not None and restored[0] == 3
    assert_identical(restored[1], small(3))


def test_nothing_intact_is_an_error_and_deletes_nothing(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2)
    flip_bit(arrays_file(tmp_path, 1))
    (tmp_path / "2" / "manifest.json").write_text("{")
    nothing = pytest.raises(FlJaxError, match="No checkpoint in .* is intact")
    with Checkpoints(tmp_path, report=lambda _: None) as checkpoints, nothing:
        checkpoints.restore_latest(small(0))
    assert (tmp_path / "1").is_dir() and (tmp_path / "2").is_dir()


def test_a_step_without_a_manifest_is_not_complete(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2)
    (tmp_path / "2" / "manifest.json").unlink()
    (tmp_path / "7.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with Checkpoints(tmp_path, report=pytest.fail) as checkpoints:
        restored = checkpoints.restore_latest(small(0))
        assert restored is not None and restored[0] == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["1"]


def test_refuses_steps_that_are_not_newer(tmp_path: Path) -> None:
    fill(tmp_path, 4)
    with Checkpoints(tmp_path) as checkpoints:
        for step in (3, 4):
            with pytest.raises(FlJaxError, match="already has step 4"):
                checkpoints.save(step, small(step), {})


def test_another_structure_is_named(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(FlJaxError, match=r"\['w'\] is float32\[3\] there and float32\[4\] here"):
            checkpoints.restore_latest({**small(0), "w": jnp.zeros(4)})
        with pytest.raises(FlJaxError, match=r"\['more'\] is absent there"):
            checkpoints.restore_latest({**small(0), "more": jnp.zeros(4)})
        with pytest.raises(FlJaxError, match=r"\['key'\] is key<fry>\[\] there and key<rbg>\[\] here"):
            checkpoints.restore_latest({**small(0), "key": jax.random.key(0, impl="rbg")})


def test_what_cannot_be_stored_is_named(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(FlJaxError, match=r"\['name'\] is a str"):
            checkpoints.save(0, {"name": "fedavg"}, {})
        with pytest.raises(FlJaxError, match="object"):
            checkpoints.save(0, {"name": np.asarray([{}])}, {})
        with pytest.raises(FlJaxError, match="JSON"):
            checkpoints.save(0, {}, {"x": jnp.zeros(3)})
        assert checkpoints.latest_step() is None


def test_config_is_stored_once_and_checked(tmp_path: Path) -> None:
    config = {"lr": 0.1, "model": {"width": 8, "layers": (1, 2)}, "note": None}
    Checkpoints(tmp_path, config).close()
    Checkpoints(tmp_path, json.loads(json.dumps(config))).close()
    Checkpoints(tmp_path).close()
    other = {"lr": 0.1, "model": {"width": 9, "layers": [1, 2]}, "seed": 1}
    with pytest.raises(FlJaxError) as error:
        Checkpoints(tmp_path, other)
    assert "model.width: 8 -> 9; note: null -> (absent); seed: (absent) -> 1" in str(error.value)
    Checkpoints(tmp_path, config).close()


def test_config_differences_tell_true_from_one_and_an_empty_dict_from_none() -> None:
    check_config({"a": np.float32(0.5), "b": (1,)}, {"b": [1], "a": 0.5})
    different = [({"a": True}, {"a": 1}), ({"a": 1}, {"a": 1.0}), ({"a": {}}, {}), ({"a": {"b": 1}}, {"a": 1}), ({}, {"": 0})]
    for stored, given in different:
        for one, other in [(stored, given), (given, stored)]:
            with pytest.raises(FlJaxError, match="differs"):
                check_config(one, other)


def test_refuses_folders_that_hold_something_else(tmp_path: Path) -> None:
    (tmp_path / "2024").mkdir()
    with pytest.raises(FlJaxError, match=r"holds other files \(2024"):
        Checkpoints(tmp_path)
    assert (tmp_path / "2024").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(FlJaxError, match="file is where a folder should be"):
        Checkpoints(tmp_path / "file")
    with pytest.raises(FlJaxError, match="Could not use"):
        Checkpoints(tmp_path / "file" / "below")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(FlJaxError, match="not permitted"):
        Checkpoints(tmp_path / "locked")


def test_one_process_at_a_time_and_no_threads_stay(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(1), {})
        with pytest.raises(FlJaxError, match="Another process"):
            Checkpoints(tmp_path)
    checkpoints.close()
    assert set(threading.enumerate()) == before
    Checkpoints(tmp_path).close()


def test_full_disk_keeps_what_was_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, 1, 2)
    big = {"w": jnp.asarray(np.random.default_rng(0).normal(size=20_000)), "key": jax.random.key(0)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path) as checkpoints:
        capfd.readouterr()
        for limit in (20_000, 1_500, 10):  # too little for the arrays, for the metadata, for anything
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # a write beyond it fails as on a full disk
            try:
                with pytest.raises(FlJaxError, match="earlier checkpoints are intact.*full"):
                    checkpoints.save(3, big, {})
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert capfd.readouterr() == ("", "")
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["1", "2"]
        restored = checkpoints.restore_latest(small(0))
        assert restored is not None and restored[0] == 2
        checkpoints.save(3, big, {})
        assert checkpoints.latest_step() == 3


# Children of a fork (the imports are paid for once) save in a loop until they are killed, at any time of a save.
KILLED = """
    import os, random, signal, sys, time
    import jax, jax.numpy as jnp
    from fl_jax.checkpoint import Checkpoints

    def tree(step):
        return {"w": jnp.full((64, 64), float(step)), "key": jax.random.key(step)}

    def train(folder, ready):
        with Checkpoints(folder, report=lambda sentence: os._exit(3)) as checkpoints:
            restored = checkpoints.restore_latest(tree(0))
            step = 0
            if restored is not None:
                step, stored, meta = restored
                if not (meta == {"step": step} and (stored["w"] == step).all() and stored["key"] == jax.random.key(step)):
                    os._exit(4)
            while True:
                step += 1
                checkpoints.save(step, tree(step), {"step": step})
                os.write(ready, b".")

    rng = random.Random(0)
    for trial in range(int(sys.argv[2])):
        reader, ready = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                train(sys.argv[1], ready)
            finally:
                os._exit(5)
        os.close(ready)
        os.read(reader, 1)  # a first save is done: from here on the child does little but save
        time.sleep(rng.uniform(0, .1))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        os.close(reader)
        assert os.WIFSIGNALED(status), f"trial {trial}: the child ended with {os.waitstatus_to_exitcode(status)}"
        states = [name + "/" * os.path.exists(f"{sys.argv[1]}/{name}/manifest.json") for name in os.listdir(sys.argv[1])]
        print(*sorted(states), flush=True)
"""


def test_killed_while_saving_again_and_again(tmp_path: Path) -> None:
    trials = 6
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "run"), str(trials)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    seen = [line.split() for line in done.stdout.splitlines()]
    assert len(seen) == trials
    newest = [max(int(name[:-1]) for name in names if name.endswith("/")) for names in seen]
    assert newest == sorted(set(newest))  # each child went on from what the one before it had completed
    assert any("tmp" in name for names in seen for name in names)  # some were killed in the middle of a step
    with Checkpoints(tmp_path / "run", report=pytest.fail) as checkpoints:
        like = {"w": jnp.zeros((64, 64)), "key": jax.random.key(0)}
        restored = checkpoints.restore_latest(like)
    assert restored is not None
    step, tree, meta = restored
    assert meta == {"step": step} and step == newest[-1]
    assert_identical(tree, {"w": jnp.full((64, 64), float(step)), "key": jax.random.key(step)})
