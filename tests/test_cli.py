"""The command line of experiments: what overrides what, what is recorded, and how a program ends."""

import dataclasses
import enum
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from experiments.common import cli
from experiments.common.config import load_json, override
from fl_jax import runtime
from fl_jax.errors import FlJaxError
from fl_jax.files import check_config
from fl_jax.results import MetricRow, load_run

PROGRAM = "python -m experiments.small"


class Policy(enum.Enum):
    AVERAGED = 1
    LOCAL = 2


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The sites' optimizer."""

    lr: float = 0.5
    """step size"""
    clip: float | None = None
    """bound on the norm"""


@dataclasses.dataclass(frozen=True)
class Config(cli.Common):
    """A study that is small."""

    rounds: int = 30
    """rounds of training"""
    name: str = "small"
    optimizer: Optimizer = Optimizer()
    server: Optimizer | None = None
    sizes: tuple[int, ...] = (10, 20)
    span: tuple[float, float] = (0.0, 1.0)
    loss: Literal["mse", "huber"] = "mse"
    policy: Policy = Policy.AVERAGED
    data: Path = Path("data")
    shuffle: bool = True
    bound: float = math.inf

    def __post_init__(self):
        if self.rounds < 1:
            raise FlJaxError(f"rounds must be 1 or more, and is {self.rounds}.")

    @classmethod
    def quick_defaults(cls):
        return cls(rounds=2, sizes=(1,))


def parse(*arguments: str) -> Config:
    return cli.parse(Config, arguments, PROGRAM)


@pytest.fixture
def write(tmp_path):
    """(content) -> the path of a configuration file with this content, as text or as a dict."""

    def write(content) -> str:
        path = tmp_path / "given.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


@pytest.fixture
def prepared(monkeypatch):
    """What main sets up before it runs an experiment, in order; the process that the tests share keeps its set-up."""
    calls = []
    monkeypatch.setattr(runtime, "compilation_cache", lambda: calls.append("cache"))
    monkeypatch.setattr(runtime, "virtual_devices", lambda n: calls.append(n) or n or 2)
    return calls


def test_defaults_file_and_command_line_override_in_this_order(write):
    file = write({"rounds": 7, "optimizer": {"lr": 0.25, "clip": 1}})
    assert parse() == Config()
    assert parse("--config", file) == Config(rounds=7, optimizer=Optimizer(0.25, 1.0))
    assert parse("--optimizer.lr", ".1") == Config(optimizer=Optimizer(0.1))
    assert parse("--rounds", "9", "--config", file, "--optimizer.lr", ".1") == Config(rounds=9, optimizer=Optimizer(0.1, 1.0))
    assert parse(f"--config={file}", "--optimizer.clip", "None").optimizer == Optimizer(0.25, None)
    assert parse("--sizes", "3", "4", "5", "--policy", "LOCAL", "--no-shuffle", "--out", "there") == Config(
        sizes=(3, 4, 5), policy=Policy.LOCAL, shuffle=False, out=Path("there"))


def test_quick_chooses_the_defaults_and_nothing_else(write):
    quick = Config(quick=True, rounds=2, sizes=(1,))
    assert parse("--quick") == parse("--config", write({"quick": True})) == quick
    assert parse("--quick", "--rounds", "3") == dataclasses.replace(quick, rounds=3)
    assert parse("--quick", "--config", write({"rounds": 7})) == dataclasses.replace(quick, rounds=7)
    assert parse("--no-quick", "--config", write({"quick": True, "rounds": 7})) == Config(rounds=7)
    with pytest.raises(FlJaxError, match="--quick would not change"):
        parse("--quick", "--config", write(cli.recorded(Config())))
    assert cli.Common.quick_defaults() == cli.Common(quick=True)


ODD = Config(
    quick=True, rounds=3, name="naïve", optimizer=Optimizer(1 / 3, 2.0), server=Optimizer(1e-300), sizes=(), span=(-0.1, math.inf),
    loss="huber", policy=Policy.LOCAL, data=Path("a/b"), shuffle=False, bound=-math.inf)


@pytest.mark.parametrize("config", [Config(), ODD, Config.quick_defaults()])
def test_what_is_recorded_reads_back_as_the_same_configuration(config, write):
    text = json.dumps(cli.recorded(config), allow_nan=False)
    again = parse("--config", write(text))
    assert again == config and json.dumps(cli.recorded(again)) == text


def test_where_and_how_to_run_is_not_recorded(tmp_path):
    begun, resumed = Config(out=tmp_path), Config(out=tmp_path, resume=True, devices=2, tensorboard=True)
    check_config(cli.recorded(begun), cli.recorded(resumed))
    with pytest.raises(FlJaxError, match="rounds: 30 -> 31"):
        check_config(cli.recorded(begun), cli.recorded(dataclasses.replace(resumed, rounds=31)))


@pytest.mark.parametrize("content, words", [
    ({"round": 3}, "round is not a field: did you mean 'rounds'?"),
    ({"optimizer": {"learning-rate": 3}}, "optimizer.learning-rate is not a field: there are lr, clip"),
    ({"optimizer": {"l-r": 3}}, "optimizer.l-r is not a field: did you mean 'lr'?"),
    ({"server": {"momentum": 3}}, "server.momentum is not a field"),
    ({"rounds": "three"}, 'rounds must be a whole number, and is "three"'),
    ({"rounds": 3.0}, "rounds must be a whole number, and is 3.0"),
    ({"rounds": True}, "rounds must be a whole number, and is true"),
    ({"shuffle": 1}, "shuffle must be true or false, and is 1"),
    ({"optimizer": 0.1}, "optimizer must be an object"),
    ({"optimizer": {"lr": None}}, "optimizer.lr must be a number, and is null"),
    ({"optimizer": {"clip": "a"}}, "optimizer.clip must be a number or null"),
    ({"sizes": 3}, "sizes must be a list, and is 3"),
    ({"sizes": [1, "a"]}, r"sizes\[1\] must be a whole number"),
    ({"span": [1]}, "span must be a list of 2 values"),
    ({"loss": "l2"}, 'loss must be one of "mse", "huber"'),
    ({"policy": "local"}, "policy must be one of AVERAGED, LOCAL"),
    ({"data": 1}, "data must be a path in quotes"),
    ('{"bound": NaN}', "bound must be a number"),
    ('{"rounds": 1, "rounds": 2}', "gives 'rounds' twice"),
    ("{", "is not JSON"),
    ("[1]", "must be a JSON object"),
])
def test_a_file_that_does_not_fit_is_refused_in_one_sentence(content, words, write):
    with pytest.raises(FlJaxError, match=words.replace("?", r"\?")) as caught:
        parse("--config", write(content))
    assert "\n" not in str(caught.value) and "given.json" in str(caught.value)


def test_a_value_out_of_range_is_refused_from_a_file_too(write):
    with pytest.raises(FlJaxError, match="rounds must be 1 or more"):
        parse("--config", write({"rounds": 0}))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FlJaxError, match=r"Could not read the configuration .*absent\.json"):
        load_json(tmp_path / "absent.json")


def test_a_field_of_a_type_that_json_cannot_give_is_the_programmers_mistake():
    @dataclasses.dataclass(frozen=True)
    class Odd(cli.Common):
        rate: complex = 1j

    with pytest.raises(TypeError, match="rate"):
        override(Odd(), {"rate": 1})


def test_help_names_every_field_with_its_docstring(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    printed = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    for words in (PROGRAM, "A study that is small.", "--config FILE.json", "--optimizer.lr", "step size", "rounds of training", "--quick",
                  "--out", "--resume", "--devices", "--tensorboard"):
        assert words in printed, words


@pytest.mark.parametrize("arguments", [["--optimizer.l", "3"], ["--rounds", "many"], ["--loss", "l2"], ["stray"], ["--config"]])
def test_arguments_that_cannot_be_parsed_end_with_2(arguments, prepared, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(lambda config: None, Config, arguments)
    assert ended.value.code == 2 and capsys.readouterr().err and not prepared


def test_main_sets_up_before_it_runs(prepared, capsys):
    def run(config):
        prepared.append(config)

    cli.main(run, Config, ["--devices", "3"])
    assert prepared == ["cache", 3, Config(devices=3)] and capsys.readouterr().err == ""


def test_devices_without_effect_are_reported(prepared, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "virtual_devices", lambda n: 8)
    cli.main(lambda config: None, Config, ["--devices", "3"])
    assert capsys.readouterr().err == "test_cli: --devices 3 has no effect here: there are 8.\n"


def raising(error):
    def run(config):
        print("so far")
        raise error

    return run


@pytest.mark.parametrize("error, status, line", [
    (FlJaxError("the table has no column 'site'."), 2, "test_cli: the table has no column 'site'.\n"),
    (KeyboardInterrupt("stopped after round 5."), 130, "test_cli: stopped after round 5.\n"),
    (KeyboardInterrupt(), 130, "test_cli: interrupted.\n"),
    (BrokenPipeError(), 141, ""),
])
def test_an_end_before_the_end_is_one_line_and_a_status(error, status, line, prepared, capsys, monkeypatch):
    monkeypatch.setattr(os, "dup2", lambda *descriptors: None)  # pytest's own streams stay
    with pytest.raises(SystemExit) as ended:
        cli.main(raising(error), Config, [])
    assert ended.value.code == status
    assert capsys.readouterr() == ("so far\n", line)


def test_a_bug_keeps_its_traceback(prepared):
    with pytest.raises(ZeroDivisionError):
        cli.main(raising(ZeroDivisionError()), Config, [])


@pytest.mark.parametrize("arguments, words", [
    (["--rounds", "0"], "rounds must be 1 or more, and is 0."),
    (["--resume"], "give its folder with --out DIR."),
])
def test_values_that_make_no_sense_together_are_one_line(arguments, words, prepared, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(lambda config: None, Config, arguments)
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_a_run_folder_has_times_and_event_files_at_the_end(tmp_path):
    for resume in (False, True):
        with cli.run_folder(Config(out=tmp_path / "run", resume=resume, tensorboard=True), "small") as folder:
            folder.append_metrics([MetricRow("FedAvg", 0, 1 + resume, "test", "mean", "accuracy", 0.5)])
            folder.compile_seconds += 2
            assert load_run(folder.path).environment[-1]["wall_seconds"] is None
    run = load_run(tmp_path / "run")
    assert len(run.environment) == 2 and all(entry["wall_seconds"] > 0 and entry["compile_seconds"] == 2 for entry in run.environment)
    assert len(list((run.path / "tensorboard").glob("FedAvg/seed_0/events.*"))) == 1


def test_event_files_that_cannot_be_written_are_told_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(FlJaxError, match="pip install"), cli.run_folder(Config(out=tmp_path / "run", tensorboard=True), "small"):
        pytest.fail("the study ran")
    assert not (tmp_path / "run").exists()


def test_new_folders_are_new(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    made = []
    for _ in range(3):
        made.append(cli.new_folder("small"))
        made[-1].mkdir(parents=True)
    assert len(set(made)) == 3 and {folder.parent for folder in made} == {Path("runs/small")}


PROGRAM_THAT_TALKS = """
import dataclasses, sys
from experiments.common import cli
assert "jax" not in sys.modules  # what --help and a typing error need not wait for

@dataclasses.dataclass(frozen=True)
class Config(cli.Common):
    lines: int = 1

def run(config):
    print("first", flush=True)
    input()
    for _ in range(config.lines):
        print("more")

if __name__ == "__main__":
    cli.main(run, Config)
"""


@pytest.mark.parametrize("lines", [1, 100_000])  # what fills the buffer, and what is only flushed at the end
def test_a_program_whose_reader_left_ends_quietly(lines, tmp_path):
    (tmp_path / "talks.py").write_text(PROGRAM_THAT_TALKS)
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{tmp_path}", "FL_JAX_CACHE": "off", "PYTHONUNBUFFERED": ""}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-m", "talks", "--lines", str(lines)], env=environment, **pipes) as process:
        assert process.stdout.readline() == b"first\n"
        process.stdout.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.stderr.read() == b"" and process.wait(60) == 141
