"""The first study from the command line: what it leaves behind and says, on simulated hospitals and on a user's own table."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from experiments import quickstart
from experiments.common import cli
from fl_jax import runtime
from fl_jax.results import RunFolder, load_run

pytestmark = pytest.mark.usefixtures("one_device")

ARMS = ["local only", "centralized", "FedAvg", "FedProx", "FedAdam", "FedBN", "DP, weak", "DP, strong", "DP-SGD"]
BUDGET = "DP-SGD: the privacy budget allows all {} rounds, and would allow 0 more.\n"
FIGURES = {"auroc_over_rounds", "accuracy_over_rounds", "auroc_per_site", "accuracy_per_site", "labels_per_site"}


def table(path, rows=30):
    """A CSV of four clinics: ages and wards with gaps, two visits a patient, and a clinic where everybody is ill."""
    rng = np.random.default_rng(0)
    lines = ["clinic,patient,age,ward,marker,outcome"]
    for clinic, share in (("North [1]", 2), ("South", 1.5), ("Only ill", 0.5), ("Away", 1)):
        for i in range(int(share * rows)):
            marker = rng.normal()
            ill = clinic == "Only ill" or marker + rng.normal() > 0
            age = "" if i % 7 == 0 else str(rng.integers(20, 90))
            lines.append(f"{clinic},{clinic[0]}{i // 2},{age},{rng.choice(['red', 'blue', 'NA'])},{marker:.3f},{'ill' if ill else 'well'}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """(arguments) -> the running program, with a compilation cache that all share."""
    environment = {**os.environ, "COLUMNS": "80", "FL_JAX_CACHE": str(tmp_path_factory.mktemp("cache"))}

    def start(*arguments):
        command = [sys.executable, "-m", "experiments.quickstart", "--quick", *map(str, arguments)]
        return subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[1], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return start


@pytest.fixture(scope="module")
def hospitals(program, tmp_path_factory):
    """The study of the simulated hospitals, interrupted by Ctrl-C after its first checkpoint and resumed: the run, what it printed."""
    folder = tmp_path_factory.mktemp("hospitals") / "run"
    with program("--out", folder) as first:
        while first.poll() is None and not list(folder.glob("checkpoints/*/*/manifest.json")):
            time.sleep(0.01)
        first.send_signal(signal.SIGINT)
        error = first.communicate()[1]
    assert first.returncode == 130, error
    assert error.splitlines()[-1].startswith("quickstart: stopped after round "), error
    assert error.splitlines()[-1].endswith(f"it is saved in {folder} and can be resumed.")
    with program("--out", folder, "--resume", "--tensorboard") as second:
        printed, error = second.communicate()
    assert second.returncode == 0 and error == BUDGET.format(6), error
    return load_run(folder), printed


@pytest.fixture(scope="module")
def clinics(program, tmp_path_factory):
    """The study of a user's table: the run, what it printed."""
    folder = tmp_path_factory.mktemp("clinics")
    path = table(folder / "clinics.csv")
    with program("--out", folder / "run", "--csv", path, "--site", "clinic", "--label", "outcome", "--group", "patient",
                 "--unseen", "Away") as process:
        printed, error = process.communicate()
    assert process.returncode == 0 and error == BUDGET.format(6), error
    return load_run(folder / "run"), printed


def plain(text):
    return " ".join(text.split())


@pytest.mark.slow
def test_the_run_folder_is_complete(hospitals):
    run, _ = hospitals
    assert {path.name for path in run.path.iterdir() if not path.name.startswith(".")} == {
        "arms.json", "checkpoints", "config.json", "environment.json", "figures", "metrics.csv", "summary.json", "tensorboard"}
    assert len(list((run.path / "tensorboard").glob("*/seed_*/events.*"))) == len(ARMS) * 3
    assert {path.stem for path in (run.path / "figures").glob("*.png")} == FIGURES
    assert len(list((run.path / "checkpoints").iterdir())) == len(ARMS)
    assert run.config["quick"] is True and run.config["rounds"] == 6 and not {"out", "resume", "devices", "tensorboard"} & set(run.config)
    first, second = run.environment
    assert first["wall_seconds"] is None and second["wall_seconds"] > 0 and second["compile_seconds"] > 0
    assert list(dict.fromkeys(run.metrics["arm"])) == ARMS
    assert not run.metrics.duplicated(["arm", "seed", "round", "split", "site", "metric"]).any()
    for arm in ARMS:
        own = run.metrics[(run.metrics["arm"] == arm) & (run.metrics["metric"] == "auroc") & (run.metrics["site"] == "mean")]
        assert sorted({*zip(own["round"], own["seed"], own["split"])}) == [
            (round, seed, split) for round in (3, 6) for seed in range(3) for split in ("test", "validation")]


@pytest.mark.slow
def test_the_summary_has_intervals_of_the_rows(hospitals):
    run, _ = hospitals
    rows = run.metrics[(run.metrics["round"] == 6) & (run.metrics["metric"] == "auroc")]

    def values(arm, split, site):
        chosen = rows[(rows["arm"] == arm) & (rows["split"] == split) & (rows["site"] == site)]
        return chosen.sort_values("seed")["value"].to_numpy()

    def assert_interval(found, sample):
        low, high = scipy.stats.ttest_1samp(sample, 0).confidence_interval(0.95)
        np.testing.assert_allclose([found["mean"], found["low"], found["high"]], [sample.mean(), low, high], rtol=1e-9, atol=1e-12)
        assert (found["n"], found["missing"]) == (3, 0)

    for arm in ARMS:
        found = run.summary["arms"][arm]["auroc"]
        assert set(found) == {"mean", "worst", "all", *(f"Hospital {letter}" for letter in "ABCDEF")}
        for split, site in (("test", "mean"), ("test", "worst"), ("test", "Hospital B"), ("unseen", "Hospital F")):
            assert_interval(found[site], values(arm, split, site))
    for other in ("local only", "centralized"):
        assert_interval(run.summary["differences"]["FedBN"]["auroc"][other], values("FedBN", "test", "mean") - values(other, "test", "mean"))
    epsilon = {arm: found["epsilon"] for arm, found in run.summary["epsilon"].items()}
    assert 0 < epsilon["DP, strong"] < epsilon["DP, weak"] < 100 and 2.97 < epsilon["DP-SGD"] <= 3
    assert [run.summary["epsilon"][arm]["name"] for arm in ("DP, weak", "DP-SGD")] == ["site", "patient"]
    sent = {arm: found["up"] for arm, found in run.summary["bytes_per_round"].items()}
    assert 0 == sent["local only"] < sent["FedBN"] < sent["DP, weak"] < sent["FedAvg"]
    assert run.summary["troubles"] == []
    assert run.summary["norms"]["FedBN"] == "BatchNorm local" and run.summary["norms"]["DP-SGD"] == "no BatchNorm"


@pytest.mark.slow
def test_what_is_printed_says_what_is_real_and_fits_the_terminal(hospitals):
    run, printed = hospitals
    for words in ("Real: the patients", "Simulated: the hospitals", "Hospital F (unseen)", "AUROC at each site", "Costs of a site", "BatchNorm: ", "The ledger of DP-SGD at Hospital A: 6 rounds of 4 times (Gaussian noise of",
                  "Δ central", "interval over 3 seeds", f"{run.summary['epsilon']['DP, strong']['epsilon']:.3g}", *ARMS):
        assert words in plain(printed), words
    assert printed.splitlines()[-1] == str(run.path)
    assert not re.search(r"\bnan\b", printed) and "Take note" not in printed
    report = printed[printed.index("\nAUROC\n"):].splitlines()[:-1]
    assert max(map(len, report)) <= 80


@pytest.mark.slow
def test_a_users_table_is_studied_and_what_its_sites_cannot_have_is_said(clinics):
    run, printed = clinics
    words = plain(printed)
    for expected in ("nothing was simulated", "Missing values by column: age 24, ward", "North [1]", "Away (unseen)",
                     "¹ Only ill: one class only", "AUROC is undefined at Only ill (one class only; 3 of 3 seeds)"):
        assert expected in words, expected
    assert "Simulated" not in printed and "hospitals too" not in printed and not re.search(r"\bnan\b", printed)
    auroc = run.summary["arms"]["FedAvg"]["auroc"]
    assert auroc["Only ill"] == {"reason": "Only ill: one class only"}
    assert auroc["mean"]["mean"] == pytest.approx((auroc["North [1]"]["mean"] + auroc["South"]["mean"]) / 2)
    assert set(auroc) == {"mean", "worst", "all", "North [1]", "South", "Only ill", "Away"}
    assert run.summary["arms"]["FedAvg"]["accuracy"]["Only ill"]["n"] == 3
    assert {path.stem for path in (run.path / "figures").glob("*.png")} == FIGURES
    assert json.loads((run.path / "config.json").read_text())["unseen"] == ["Away"]


@pytest.fixture
def failing(monkeypatch, capsys):
    """(arguments) -> the one line with which the program ends, without computing."""
    monkeypatch.setattr(runtime, "compilation_cache", lambda: None)
    monkeypatch.setattr(runtime, "virtual_devices", lambda n: 8)

    def fail(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(quickstart.run, quickstart.Config, ["--quick", *map(str, arguments)])
        printed = capsys.readouterr()
        assert ended.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
        return printed.err

    return fail


@pytest.mark.parametrize("arguments, words", [
    (["--csv", "CSV"], "--csv needs --site COLUMN and --label COLUMN"),
    (["--csv", "CSV", "--site", "clinic"], "--csv needs --site COLUMN and --label COLUMN"),
    (["--site", "clinic"], "give it with --csv FILE"),
    (["--csv", "CSV", "--site", "town", "--label", "outcome"],
     "has no column 'town': its columns are 'clinic', 'patient', 'age', 'ward', 'marker', 'outcome'"),
    (["--csv", "CSV", "--site", "clinic", "--label", "result"], "has no column 'result': its columns are 'clinic'"),
    (["--csv", "CSV", "--site", "clinic", "--label", "outcome", "--group", "id"], "has no column 'id'"),
    (["--csv", "CSV", "--site", "clinic", "--label", "outcome", "--group", "patient", "--unseen", "Home"], "'Home' is no site of data set 'clinics.csv'"),
    (["--csv", "CSV", "--site", "clinic", "--label", "outcome"], "Column 'patient' of"),
    (["--csv", "CSV", "--site", "clinic", "--label", "outcome", "--drop", "patient", "visit"], "has no column 'visit'"),
    (["--csv", "nowhere.csv", "--site", "clinic", "--label", "outcome"], "nowhere.csv' cannot be read"),
    (["--seeds", "0"], "seeds must be 1 or more, and is 0"),
    (["--batch-size", "0"], "batch_size must be 1 or more"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_mistakes_on_the_command_line_are_one_sentence(failing, tmp_path, arguments, words):
    path = table(tmp_path / "clinics.csv")
    assert words in failing("--out", tmp_path / "run", *(path if argument == "CSV" else argument for argument in arguments))
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be_used_is_one_sentence_and_stays_as_it_is(failing, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    assert "a file is where a folder should be" in failing("--out", file)
    assert "a file is where a folder should be" in failing("--out", file / "run")
    assert "holds other files (file, ...); give the run an empty or new folder" in failing("--out", tmp_path)
    assert file.read_text() == "mine" and list(tmp_path.iterdir()) == [file]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, limit[1]))
    try:
        assert "the disk or quota is full, free some space" in failing("--out", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_an_unknown_key_of_a_configuration_is_named_with_the_nearest(failing, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"learning_rat": 0.1}))
    assert "learning_rat is not a field: did you mean 'learning_rate'?" in failing("--config", path)


def test_another_configuration_does_not_resume_a_run(failing, tmp_path):
    RunFolder.create(tmp_path, cli.recorded(cli.parse(quickstart.Config, ["--quick"])))
    assert "already holds this run; resume it" in failing("--out", tmp_path)
    assert "(rounds: 6 -> 7); use the stored one" in failing("--out", tmp_path, "--resume", "--rounds", "7")
