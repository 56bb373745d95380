"""The least noise of a budget, and the command line: against published numbers, one sentence for each mistake, without jax."""

import json
import math
import subprocess
import sys
from functools import partial

import dp_accounting as dp
import pytest
from PIL import Image

from fl_jax import batches, privacy, sampling
from fl_jax.errors import FlJaxError
from fl_jax.privacy import Accountant, Budget, Cost, NeighboringRelation, PrivacyLedger, Unit, calibration, curve
from fl_jax.privacy.__main__ import main

RDP, PLD = Accountant.RDP, Accountant.PLD
DELTA = 1e-5
ONE_OF_20 = sampling.fixed_size(1, 20).amplify  # slow to account for by RDP: all ask for the same epsilon, which is remembered


def spent(sampled, noise, rounds, accountant):
    cost = Cost(sampled(dp.GaussianDpEvent(noise)), Unit.CLIENT)
    return privacy.open_ledger(cost).spend(cost, rounds).epsilon(DELTA, accountant)


@pytest.mark.parametrize("sampled, epsilon, rounds, accountant", [
    (partial(dp.PoissonSampledDpEvent, 0.01), 3.0, 1000, RDP),
    (partial(dp.PoissonSampledDpEvent, 0.2), 1.0, 20, PLD),
    (ONE_OF_20, 6.4665847, 100, RDP),
    (sampling.everyone().amplify, 0.5, 30, RDP),
    (sampling.everyone().amplify, 20.0, 30, PLD),
    (partial(batches.poisson(0.02, 50, 500).account, num_records=400), 2.0, 4, RDP),
    (partial(dp.PoissonSampledDpEvent, 0.01), 0.02, 1, RDP),
])
def test_calibrated_noise_is_enough_and_hardly_more(sampled, epsilon, rounds, accountant):
    noise = privacy.calibrate(Budget(epsilon, DELTA, accountant), rounds, sampled)
    assert spent(sampled, noise, rounds, accountant) <= epsilon < spent(sampled, noise * (1 - 1e-3), rounds, accountant)


def test_published_multipliers():
    assert privacy.calibrate(Budget(3.0, DELTA), 1000, partial(dp.PoissonSampledDpEvent, 0.01)) == pytest.approx(0.8646, abs=5e-5)
    assert privacy.calibrate(Budget(6.4665847, DELTA), 100, ONE_OF_20) == pytest.approx(2.0, rel=1e-4)  # clips
    exact = dp.get_sigma_gaussian(1.0, DELTA)  # Balle & Wang 2018
    assert privacy.calibrate(Budget(1.0, DELTA, PLD), 1) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("call, words", [
    (lambda: privacy.calibrate(Budget(6.4665847, DELTA, PLD), 100, ONE_OF_20),
     "PLD cannot account for this sampling under replace-one"),
    (lambda: privacy.calibrate(Budget(1.0, DELTA), 10, partial(dp.PoissonSampledDpEvent, 0.1), NeighboringRelation.REPLACE_ONE),
     "RDP cannot account for this sampling under replace-one"),
    (lambda: privacy.calibrate(Budget(1.0, 1e-3, PLD), 1, partial(dp.PoissonSampledDpEvent, 1e-6)), "hardly any noise"),
    (lambda: privacy.calibrate(Budget(1.0, DELTA), 0), "1 or more, and is 0"),
])
def test_what_cannot_be_calibrated_is_one_sentence(monkeypatch, call, words):
    monkeypatch.setattr(calibration, "_LEAST", 2.0**-3)  # privacy losses of less noise take seconds
    with pytest.raises(FlJaxError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def line(words):
    return words.split()


def run(capsys, *words):
    status = main([str(word) for word in words])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.mark.parametrize("words, epsilon, rel", [
    ("--sampling poisson --rate 0.04 --noise 1.5 --rounds 2250", 7.3293347, 1e-6),
    ("--sampling poisson --rate 0.04 --noise 1.5 --rounds 2250 --accountant pld", 6.76879, 1e-3),
    ("--sampling poisson --rate 150/60000 --noise 1.3 --rounds 6000 --unit client", 0.72422340, 1e-6),
    ("--sampling poisson --rate 256/60000 --noise 1.1 --rounds 14062", 2.5965559, 1e-6),
    ("--sampling poisson --rate 256/60000 --noise 1.1 --rounds 14062 --accountant pld", 2.38169, 1e-3),
    ("--sampling fixed --rate .05 --noise 1 --rounds 100", 6.4665847, 1e-6),
])
def test_published_epsilons(capsys, words, epsilon, rel):
    status, out, err = run(capsys, "epsilon", *words.split(), "--delta", "1e-5", "--json")
    found = json.loads(out)
    assert status == 0 and err == "" and found["epsilon"] == pytest.approx(epsilon, rel=rel)
    fixed = "fixed" in words
    assert found["relation"] == ("REPLACE_ONE" if fixed else "ADD_OR_REMOVE_ONE") and found["sensitivity"] == (2 if fixed else 1)
    assert found["delta"] == DELTA and found["unit"] == ("client" if "client" in words else "record")
    assert found["accountant"] == ("pld" if "pld" in words else "rdp")


def test_everything_in_every_round_is_one_gaussian(capsys):
    _, out, _ = run(capsys, *line("epsilon --sampling all --noise 4 --rounds 25 --delta 1e-5 --accountant pld --json"))
    assert json.loads(out)["epsilon"] == pytest.approx(dp.get_epsilon_gaussian(4 / 5, DELTA)) and json.loads(out)["rate"] == 1
    _, out, _ = run(capsys, *line("epsilon --sampling all --noise 4 --rounds 25 --delta 1e-5 --unit client"))
    assert "no amplification by sampling" in out and "for each client after 25 rounds" in out


def test_calibrate_says_the_noise_over_the_sensitivity_and_in_clips(capsys):
    _, out, _ = run(capsys, *line("calibrate --sampling fixed --rate .05 --epsilon 6.4665847 --rounds 100 --delta 1e-5 --json"))
    found = json.loads(out)
    assert found["noise"] == pytest.approx(1, rel=1e-4) and found["epsilon"] <= 6.4665847
    status, out, _ = run(capsys, *line("calibrate --sampling poisson --rate .01 --epsilon 3 --rounds 1000 --delta 1e-5"))
    assert status == 0 and out.startswith("noise   0.8646 x the sensitivity of 1 clip (adding or removing one) = 0.8646 clips\nepsilon 2.999")
    assert "(at most 3) at delta 1e-05" in out


def test_the_curve_is_drawn_in_text_and_as_a_figure(capsys, tmp_path):
    path = tmp_path / "curve.png"
    words = "epsilon --sampling poisson --rate .1 --noise 2 --rounds 40 --delta 1e-5 --plot"
    _, out, _ = run(capsys, *words.split(), path)
    bars = [line for line in out.splitlines() if "█" in line]
    cost = Cost(dp.PoissonSampledDpEvent(0.1, dp.GaussianDpEvent(2.0)), Unit.RECORD)
    for line, rounds in zip(bars, range(4, 44, 4), strict=True):
        exact = PrivacyLedger(Unit.RECORD, NeighboringRelation.ADD_OR_REMOVE_ONE).spend(cost, rounds).epsilon(DELTA)
        assert line.split()[0] == str(rounds) and float(line.split()[-1]) == pytest.approx(exact, rel=1e-3)
    assert [len(line) for line in bars] == sorted(len(line) for line in bars)
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 400
    assert curve.points(3, 10) == [1, 2, 3] and curve.points(100, 4) == [25, 50, 75, 100]
    assert curve.bars([1, 2], [0.0, 0.0]) == "1  0\n2  0"


@pytest.mark.parametrize("words, said", [
    ("epsilon --noise 0", "--noise must be above 0 and finite, and is 0: without noise nothing is private"),
    ("epsilon --noise -1", "--noise must be above 0"),
    ("epsilon --noise nan", "--noise must be above 0"),
    ("epsilon --noise much", "invalid float value: 'much'"),
    ("epsilon", "--noise"),
    ("epsilon --noise 1 --delta 1", "--delta must lie between 0 and 1, and is 1"),
    ("epsilon --noise 1 --delta 0", "--delta must lie between 0 and 1"),
    ("epsilon --noise 1 --rate 1.5", "--rate is a share above 0 and at most 1, and is 1.5"),
    ("epsilon --noise 1 --rate 0", "--rate is a share"),
    ("epsilon --noise 1 --rate 1/0", "argument --rate: must be a number such as .01 or 256/60000, and is '1/0'"),
    ("epsilon --noise 1 --rounds 0", "--rounds must be 1 or more"),
    ("epsilon --noise 1 --rounds 1.5", "invalid int value"),
    ("epsilon --noise 1 --sampling all", "'all' has everything in every round"),
    ("epsilon --noise 1 --sampling some", "invalid choice"),
    ("epsilon --noise 1 --sampling fixed --accountant pld", "cannot be accounted for by pld"),
    ("epsilon --noise 1 --plot curve.pdf", "ends in .png"),
    ("epsilon --noise 1 --plot /nowhere/at/all.png", "Could not write /nowhere/at/all.png"),
    ("calibrate --epsilon 0", "--epsilon must be above 0"),
    ("calibrate --epsilon inf", "--epsilon must be above 0 and finite"),
    ("spend", "invalid choice: 'spend'"),
])
def test_a_mistake_is_one_sentence_and_status_2(capsys, words, said):
    defaults = {"--sampling": "poisson", "--rate": ".1", "--rounds": "10", "--delta": "1e-5"}
    given = words.split()
    missing = [word for name, value in defaults.items() if name not in given for word in (name, value)]
    status, out, err = run(capsys, *given, *missing)
    assert status == 2 and out == "" and said in err and err.startswith("fl_jax.privacy: ") and err.count("\n") == 1


def test_a_sample_needs_a_rate(capsys):
    status, _, err = run(capsys, *line("epsilon --sampling fixed --noise 1 --rounds 3 --delta 1e-5"))
    assert status == 2 and "--sampling fixed needs --rate" in err


def test_an_epsilon_beyond_all_numbers_is_said_and_is_json(capsys):
    words = line("epsilon --sampling poisson --rate .5 --noise 1e-200 --rounds 10 --delta 1e-5")
    status, out, _ = run(capsys, *words, "--json")
    assert status == 0 and float(json.loads(out)["epsilon"]) == math.inf
    assert run(capsys, *words)[1].startswith("epsilon inf")


def test_it_answers_without_jax():
    script = "import sys; from fl_jax.privacy.__main__ import main; main(sys.argv[1:]); assert 'jax' not in sys.modules and 'matplotlib' not in sys.modules"
    words = line("epsilon --sampling poisson --rate .01 --noise 1 --rounds 100 --delta 1e-5")
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("epsilon ")
