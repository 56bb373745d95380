"""Reproducing: what runs, what is kept, what goes on, and how the program ends."""

import dataclasses
import json
from pathlib import Path

import pytest

from experiments import reproduce
from experiments.common import cli, results_page
from experiments.common.reproduction import STUDIES, Reproduction, Study, code_of, study
from fl_jax import data, shell
from fl_jax.data.catalog import published
from fl_jax.errors import FlJaxError
from fl_jax.results import CLAIMS, Claim, Direction, RunFolder, describe_environment, judge, now

CLAIM = Claim("accuracy is .8", "Table 1", 0.8, Direction.WITHIN, 0.1, "seeds vary by .1")


@dataclasses.dataclass(frozen=True)
class Small(cli.Common):
    """A study that is small."""

    rounds: int = 30


@pytest.fixture
def world(monkeypatch, tmp_path):
    """A study whose process is played by `world.process`, and what was started."""

    class World:
        def __init__(self):
            self.started = []
            self.value, self.status, self.code = 0.8, 0, "1"
            self.reproduction = Reproduction(lambda config: [CLAIM])
            self.out = tmp_path / "out"

        def process(self, command):
            self.started.append(command)
            folder = RunFolder.create(command[command.index("--out") + 1], {"rounds": 30}, "--resume" in command)
            folder.record_environment(describe_environment(now(), 3.0, 1.0))
            if self.status == 0:
                folder.write_claims(judge("small", [CLAIM], {CLAIM.claim: [self.value] * 3}))
            return self.status

        def run(self, **changes):
            reproduce.run(reproduce.Config(**{"names": ("small",), "out": self.out} | changes))

    world = World()
    monkeypatch.setattr(reproduce, "study", lambda name: Study(name, world.reproduction, Small))
    monkeypatch.setattr(reproduce, "code_of", lambda name: world.code)
    monkeypatch.setattr(reproduce, "_wait", world.process)
    return world


def test_a_study_that_holds_leaves_its_claims_and_the_table(world, capsys):
    world.run()
    (command,) = world.started
    assert command[1:] == ["-m", "experiments.small", "--out", f"{world.out / 'small'}", "--resume"]
    (item,) = json.loads((world.out / CLAIMS).read_text())
    assert item["study"] == "small" and item["holds"] is True and item["measured"] == pytest.approx(0.8) and item["seeds"] == 3
    printed = capsys.readouterr().out
    assert "accuracy is .8" in printed and "1 of 1 claims hold, 0 were not run" in printed


def test_a_finished_study_is_kept_until_its_configuration_or_code_changes(world):
    world.run()
    world.run()
    assert len(world.started) == 1
    world.code = "2"
    world.run()
    assert len(world.started) == 2 and (world.out / "small_1" / CLAIMS).exists()
    world.run(quick=True)
    assert len(world.started) == 3 and world.started[-1][-1] == "--quick" and (world.out / "small_2" / CLAIMS).exists()


def test_an_interrupted_study_goes_on(world):
    world.status = shell.INTERRUPTED
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        world.run()
    (world.out / "small" / "kept").write_text("")
    world.status = 0
    world.run()
    assert (world.out / "small" / "kept").exists() and len(world.started) == 2
    assert json.loads((world.out / CLAIMS).read_text())[0]["holds"] is True


def test_a_claim_that_does_not_hold_ends_with_1(world, capsys):
    world.value = 0.5
    with pytest.raises(SystemExit) as ended:
        world.run()
    assert ended.value.code == 1 and "1 were expected to hold and do not" in capsys.readouterr().out
    assert json.loads((world.out / CLAIMS).read_text())[0]["holds"] is False


def test_a_study_that_fails_does_not_hold_and_runs_again(world):
    world.status = 2
    with pytest.raises(SystemExit) as ended:
        world.run()
    (item,) = json.loads((world.out / CLAIMS).read_text())
    assert ended.value.code == 1 and item["holds"] is False and item["cause"].endswith("ended with status 2")
    world.status = 0
    world.run()
    assert len(world.started) == 2


def test_a_study_without_its_data_is_reported_as_not_run(world, monkeypatch):
    def missing(name):
        raise data.DataMissing(f"{name} is not here.")

    monkeypatch.setattr(data, "ensure_prepared", missing)
    world.reproduction = Reproduction(lambda config: [CLAIM], ("hearts",))
    world.run()
    (item,) = json.loads((world.out / CLAIMS).read_text())
    assert item["holds"] is None and item["measured"] is None and item["cause"] == "not run: hearts is not here." and not world.started


@pytest.mark.parametrize(("gpu", "quick", "runs"), [(False, False, False), (True, False, True), (False, True, True)])
def test_a_study_that_needs_a_gpu_runs_in_full_only_on_one(world, monkeypatch, gpu, quick, runs):
    monkeypatch.setattr(reproduce, "_has_gpu", lambda: gpu)
    world.reproduction = Reproduction(lambda config: [CLAIM], gpu=True)
    world.run(quick=quick)
    assert bool(world.started) == runs and (json.loads((world.out / CLAIMS).read_text())[0]["holds"] is None) != runs


@pytest.mark.parametrize(("gpu", "quick"), [(False, False), (True, False), (True, True)])
def test_a_study_with_a_long_form_runs_it_in_full_on_a_gpu_only(world, monkeypatch, gpu, quick):
    monkeypatch.setattr(reproduce, "_has_gpu", lambda: gpu)
    stated = []
    world.reproduction = Reproduction(lambda config: stated.append(config.rounds) or [CLAIM], on_gpu=("--rounds", "2000"))
    world.run(quick=quick)
    long = gpu and not quick
    assert stated == [2000 if long else 30]
    given = ["--rounds", "2000"] if long else ["--quick"] if quick else []
    assert world.started[0][6:] == given
    arguments = reproduce.arguments_of(reproduce.study("small"), reproduce.Config(quick=quick))
    entry = results_page.entry(world.out / "small", arguments)
    assert f"Command: `{' '.join(['python -m experiments.small', *given])}`" in results_page.page({"small": entry})
    monkeypatch.setattr(reproduce, "_has_gpu", lambda: not gpu)
    world.run(quick=quick)  # the other form is another configuration
    assert len(world.started) == (1 if quick else 2)


def test_the_page_keeps_what_was_not_run_again_and_the_readme_has_the_table(world, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n{results_page.BEGIN}\nstale\n{results_page.END}\nrest\n")
    (docs / "results.json").write_text(json.dumps({"other": results_page_entry(world)}))
    world.run(record=docs)
    stored = json.loads((docs / "results.json").read_text())
    assert list(stored) == ["other", "small"] and stored["small"]["seconds"] == 3.0
    page = (docs / "results.md").read_text()
    assert page.count("accuracy is .8") == 4 and "## other" in page and "## small" in page and "seeds vary by .1" in page
    text = readme.read_text()
    assert text.startswith("# Title\n") and text.endswith("\nrest\n") and "stale" not in text and text.count("accuracy is .8") == 2
    assert results_page.with_claims(text, stored) == text
    with pytest.raises(FlJaxError, match="put them back"):
        results_page.with_claims("# Title\n", stored)


def results_page_entry(world):
    folder = world.out.parent / "other"
    world.process(["", "--out", f"{folder}", "--resume"])
    return results_page.entry(folder)


def test_what_is_recorded_is_of_full_runs():
    with pytest.raises(FlJaxError, match="leave --quick out"):
        reproduce.Config(quick=True, record=Path("docs"))


def test_every_study_states_claims_in_both_forms():
    for name in STUDIES:
        found = study(name)
        for config in (found.config(), found.config.quick_defaults()):
            claims = found.reproduction.claims(config)
            assert claims and len({claim.claim for claim in claims}) == len(claims)
        for dataset in found.reproduction.datasets:
            published(dataset)
    with pytest.raises(FlJaxError, match="choose from"):
        study("nonsense")


def test_the_pages_are_made_from_the_results_that_are_kept():
    root = Path(__file__).parents[1]
    stored = json.loads((root / "docs" / "results.json").read_text())
    assert set(stored) <= set(STUDIES)
    assert (root / "docs" / "results.md").read_text() == results_page.page(stored)
    readme = (root / "README.md").read_text()
    assert results_page.with_claims(readme, stored) == readme


def test_the_code_of_a_study_is_what_computes(monkeypatch, tmp_path):
    root = tmp_path / "experiments"
    (root / "common").mkdir(parents=True)
    monkeypatch.setattr("experiments.common.reproduction.__file__", str(root / "common" / "reproduction.py"))

    def digest(main, helper="x = 1", other="z = 1"):
        for name, text in (("main", main), ("helper", helper), ("other", other)):
            (root / f"{name}.py").write_text(text)
        return code_of("main")

    plain = "from experiments import helper\n\ndef f(x):\n    return x\n"
    assert digest(plain) == digest('"""Says more."""\n# really\nfrom experiments import helper\ndef f(x):\n    """Too."""\n    return x')
    assert digest(plain) == digest(plain, other="z = 2")
    assert len({digest(plain), digest(plain, "x = 2"), digest(plain.replace("return x", "return 2"))}) == 3
    direct = plain.replace("from experiments import helper", "from experiments.helper import x")
    assert digest(direct) != digest(direct, "x = 2")
    (root / "common" / "shared.py").write_text("y = 1")
    deeper = plain.replace("from experiments import helper", "from experiments.common import shared")
    before = digest(deeper)
    (root / "common" / "shared.py").write_text("y = 2")
    assert digest(deeper) != before
