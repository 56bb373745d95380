"""Budgets, and the ledger as the state of a run: refused before it is overspent, resumed exactly, never spent twice or forgotten.

Everything trains one private arm of three sites, whose programs are compiled once: with noise as an argument they serve all tests.
"""

import json
import math
import shutil
import signal

import dp_accounting as dp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest

from fl_jax import aggregators, algorithms, batches, gradients, models, privacy, sampling, spending, training
from fl_jax.checkpoint import Checkpoints
from fl_jax.data import FederatedDataset, Records, stack
from fl_jax.errors import FlJaxError
from fl_jax.metrics import CLASSIFICATION
from fl_jax.privacy import Account, Accountant, Budget, Cost, Guarantee, NeighboringRelation, PrivacyLedger, Unit
from fl_jax.results import RunFolder, load_metrics

ADD, REPLACE = NeighboringRelation.ADD_OR_REMOVE_ONE, NeighboringRelation.REPLACE_ONE
RDP, PLD = Accountant.RDP, Accountant.PLD
DELTA = 1e-5
SITES, SIZES = ("north", "south", "west"), (12, 5, 8)
ROUNDS, EVERY, SEEDS = 6, 2, [3, 4]
MODEL = models.bridge(models.LogisticRegression(2), jnp.zeros((1, 3)), models.softmax_cross_entropy)
NOISE = 4.0
WORK = batches.epochs(1, 8)
METRICS = {"accuracy": CLASSIFICATION["accuracy"]}  # what is measured is not looked at here


def records(sizes, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(sum(sizes), 3)).astype(np.float32)
    return Records(x, (x[:, 0] > 0).astype(np.int32), np.cumsum([0, *sizes]))


def study(**changes):
    data = FederatedDataset("small", records(SIZES, 0), records((3, 3, 3), 1), records((4, 4, 4), 2), records((), 3), SITES, (), num_classes=2)
    return training.Study(MODEL, stack([data]), SITES, (), ROUNDS, EVERY, chunk=8, metrics=METRICS)._replace(**changes)


def arm(noise=None, sampler=None, name="DP"):
    """Client-level private averaging; its noise is the run's hyper-parameter, or a constant."""

    def build(hyper):
        return algorithms.fedavg(MODEL, optax.sgd(0.1), WORK, aggregator=aggregators.private_mean(1.0, hyper if noise is None else noise, 3))

    return training.Arm(name, build, lambda sites: sampler or sampling.everyone(sampling.equal))


def runs(noise=NOISE):
    return training.seeds_of(SEEDS, stacked=False)._replace(hyper=jnp.full(len(SEEDS), noise))


def epsilon_of(rounds, noise=NOISE, accountant=RDP):
    return PrivacyLedger(Unit.CLIENT, ADD).spend(Cost(dp.GaussianDpEvent(noise), Unit.CLIENT), rounds).epsilon(DELTA, accountant)


def budget_for(rounds, accountant=RDP):
    """A budget that allows so many rounds and no more."""
    return Budget((epsilon_of(rounds, accountant=accountant) + epsilon_of(rounds + 1, accountant=accountant)) / 2, DELTA, accountant)


CLIENT = Guarantee(Unit.CLIENT, DELTA, name="clinic")
compiled = {}


original = training.compile_arms


def compile_arms(study, arms, runs, bar):
    """Compiles once, and each other length of block when it is first needed: noise is an argument of the programs."""
    if not compiled:
        compiled["programs"] = original(study, [one._replace(rounds=None) for one in arms], runs, bar)
    (program,), measure = compiled["programs"]
    return [program._replace(name=arms[0].name, rounds=study.rounds if arms[0].rounds is None else arms[0].rounds)], measure


@pytest.fixture(autouse=True, scope="module")
def compile_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "compile_arms", compile_arms)
        yield


def fit(folder=None, guarantees=(CLIENT,), *, of=None, made=None, noise=NOISE):
    if folder is not None:
        folder = RunFolder.create(folder, {}, resume=True)
    privacy = {"DP": guarantees} if guarantees else None
    return training.fit(of or study(), [made or arm()], SEEDS, runs(noise), folder=folder, resume=folder is not None, privacy=privacy)["DP"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, fit(folder)


def epsilons(rows, metric="epsilon_client_rdp", site="all", seed=SEEDS[0]):
    rows = rows[(rows["metric"] == metric) & (rows["site"] == site) & (rows["seed"] == seed) & (rows["split"] == "round")]
    return dict(zip(rows["round"], rows["value"], strict=True))


def assert_like(whole, folder, found):
    assert (folder / "metrics.csv").read_bytes() == (whole[0] / "metrics.csv").read_bytes()
    pd.testing.assert_frame_equal(found.rows, whole[1].rows, check_exact=True)
    assert found.ledgers == whole[1].ledgers


def after_append(monkeypatch, count, action):
    append, calls = RunFolder.append_metrics, []

    def appended(self, rows):
        append(self, rows)
        calls.append(1)
        if len(calls) == count:
            action()

    monkeypatch.setattr(RunFolder, "append_metrics", appended)


def test_epsilon_is_in_the_rows_after_each_round_and_in_the_ledger_of_each_run(whole):
    folder, found = whole
    for rows in (found.rows, load_metrics(folder)):
        for seed in SEEDS:
            assert epsilons(rows, seed=seed) == {t: epsilon_of(t) for t in range(1, ROUNDS + 1)}
    (ledger,), (other,) = found.ledgers
    assert ledger == other and ledger.epsilon(DELTA) == epsilon_of(ROUNDS) and ledger.name == "clinic"
    assert fit(guarantees=()).ledgers == () and fit(guarantees=()).rows["metric"].str.startswith("epsilon").sum() == 0


@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_run_that_is_stopped_and_resumed_has_spent_what_one_that_was_not_has(whole, monkeypatch, tmp_path, stop_after):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        after_append(patch, stop_after, lambda: signal.raise_signal(signal.SIGINT))
        fit(tmp_path)
    assert max(epsilons(load_metrics(tmp_path)).values()) == epsilon_of(stop_after * EVERY)
    assert_like(whole, tmp_path, fit(tmp_path))
    assert_like(whole, tmp_path, fit(tmp_path))  # once more: there is nothing left to do


def test_rounds_beyond_the_checkpoint_are_repeated_and_spent_once(whole, monkeypatch, tmp_path):
    """Killed when the rows were on the disk and the checkpoint was not: the rounds run again bit for bit."""
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        after_append(patch, 2, twice)
        fit(tmp_path)
    assert max(epsilons(load_metrics(tmp_path))) == 4 and (tmp_path / "checkpoints" / "DP" / "2").is_dir()
    assert not (tmp_path / "checkpoints" / "DP" / "4").exists()
    assert_like(whole, tmp_path, fit(tmp_path))


@pytest.mark.parametrize("allowed", [1, 4, 5])
@pytest.mark.parametrize("accountant", [RDP, PLD])
def test_a_budget_ends_a_run_after_exactly_the_last_round_that_it_allows(whole, tmp_path, capsys, allowed, accountant):
    limited = Guarantee(Unit.CLIENT, budget=budget_for(allowed, accountant), name="clinic")
    found = fit(tmp_path, [limited])
    said = capsys.readouterr().err
    assert f"allows {allowed} of {ROUNDS} rounds" in said and "the budget of each clinic, epsilon" in said and f"by {accountant.upper()}" in said
    assert found.rows["round"].max() == allowed and int(found.state.round[0]) == allowed
    assert {t for t in found.rows[found.rows["split"] == "test"]["round"]} == {*range(EVERY, allowed + 1, EVERY), allowed}
    assert found.ledgers[0][0].epsilon(DELTA, accountant) <= limited.budget.epsilon < epsilon_of(allowed + 1, accountant=accountant)
    if accountant is PLD:
        assert epsilons(found.rows, "epsilon_client_pld")[allowed] == epsilon_of(allowed, accountant=PLD)
    # what it did is what the whole run did; with a larger budget it goes on to the same end
    ends = [rows[(rows["round"] <= allowed) & (rows["split"] == "round") & ~rows["metric"].str.endswith("_pld")] for rows in (found.rows, whole[1].rows)]
    pd.testing.assert_frame_equal(*(rows.reset_index(drop=True) for rows in ends), check_exact=True)
    assert fit(tmp_path, [limited]).ledgers == found.ledgers
    onward = fit(tmp_path, [Guarantee(Unit.CLIENT, budget=budget_for(ROUNDS, accountant), name="clinic")])
    assert onward.ledgers == whole[1].ledgers
    for one, other in zip(jax.tree.leaves(onward.state), jax.tree.leaves(whole[1].state), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_budget_that_allows_all_rounds_says_how_many_more(capsys):
    fit(guarantees=[Guarantee(Unit.CLIENT, budget=budget_for(ROUNDS + 3))])
    assert f"DP: the privacy budget allows all {ROUNDS} rounds, and would allow 3 more." in capsys.readouterr().err


@pytest.mark.parametrize("guarantee, words", [
    (Guarantee(Unit.CLIENT, budget=Budget(0.01, DELTA)), "does not allow one round, which would raise epsilon from 0 to"),
    (Guarantee(Unit.CLIENT, budget=budget_for(5), spent=PrivacyLedger(Unit.CLIENT, ADD).spend(Cost(dp.GaussianDpEvent(NOISE), Unit.CLIENT), 5)),
     "the budget of each client, epsilon .* at delta 1e-05 by RDP, does not allow one round"),
    (Guarantee(Unit.RECORD, budget=Budget(50.0, DELTA)), "budget of each record, .* from 0 to inf"),
])
def test_a_budget_without_a_round_in_it_is_one_sentence_before_anything_is_compiled(monkeypatch, guarantee, words):
    monkeypatch.setattr(training, "compile_arms", None)
    with pytest.raises(FlJaxError, match=words) as error:
        fit(guarantees=[guarantee])
    assert "\n" not in str(error.value)


def test_what_was_spent_before_counts(capsys):
    before = PrivacyLedger(Unit.CLIENT, ADD).spend(Cost(dp.GaussianDpEvent(NOISE), Unit.CLIENT, "an earlier study"), 2)
    found = fit(guarantees=[Guarantee(Unit.CLIENT, budget=budget_for(5), spent=before)])
    assert found.rows["round"].max() == 3 and epsilons(found.rows)[1] == pytest.approx(epsilon_of(3))
    assert found.ledgers[0][0].epsilon(DELTA) == pytest.approx(epsilon_of(5))


def stopped(tmp_path, whole):
    """A run of which a checkpoint remains."""
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "DP" / str(ROUNDS))
    return tmp_path / "run"


@pytest.mark.parametrize("change, words", [
    ({"noise": 5.0}, r"a round's cost was Gaussian noise of 4 clips, no amplification by sampling and is Gaussian noise of 5 clips"),
    ({"made": arm(sampler=sampling.poisson(0.5, 3))}, r"was Gaussian noise of 4 clips, no .* and is .* on a Poisson sample at rate 0.5"),
    ({"made": arm(sampler=sampling.fixed_size(2, 3, sampling.equal))}, r"the relation was ADD_OR_REMOVE_ONE and is REPLACE_ONE"),
    ({"guarantees": [Guarantee(Unit.CLIENT, 1e-6, name="clinic")]}, "delta was 1e-05 and is 1e-06"),
    ({"guarantees": [Guarantee(Unit.CLIENT, DELTA, name="hospital")]}, "the unit was clinic and is hospital"),
    ({"guarantees": [Guarantee(Unit.RECORD, DELTA)]}, "the unit was client and is record"),
    ({"guarantees": [CLIENT, Guarantee(Unit.RECORD, DELTA)]}, "other guarantees or runs"),
    ({"guarantees": []}, "has a privacy ledger and this run promises nothing"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_resume_with_another_cost_is_refused_with_the_difference(whole, tmp_path, change, words):
    folder = stopped(tmp_path, whole)
    before = (folder / "metrics.csv").read_bytes()
    with pytest.raises(FlJaxError, match=words) as error:
        fit(folder, change.pop("guarantees", (CLIENT,)), **change)
    assert "\n" not in str(error.value) and (folder / "metrics.csv").read_bytes() == before


def test_a_run_without_a_ledger_cannot_be_resumed_with_one(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        after_append(patch, 1, lambda: signal.raise_signal(signal.SIGINT))
        fit(tmp_path, [])
    with pytest.raises(FlJaxError, match="has no privacy ledger and this run promises something"):
        fit(tmp_path)


@pytest.mark.parametrize("damage", [
    lambda text: text[: len(text) // 2],
    lambda text: text.replace('"rounds": 4', '"rounds": 1'),
    lambda text: text.replace('"noise_multiplier": 4.0', '"noise_multiplier": 40.0'),
    lambda text: "{}",
], ids=["cut short", "fewer rounds", "more noise", "empty"])
def test_a_ledger_that_was_cut_short_or_edited_is_refused(whole, monkeypatch, tmp_path, damage):
    folder = stopped(tmp_path, whole)
    restore = Checkpoints.restore_latest

    def edited(self, like):
        step, tree, meta = restore(self, like)
        entry = meta["privacy"]["accounts"][0][0]
        assert damage(entry["ledger"]) != entry["ledger"]
        entry["ledger"] = damage(entry["ledger"])
        return step, tree, meta

    monkeypatch.setattr(Checkpoints, "restore_latest", edited)
    with pytest.raises(FlJaxError, match="damaged or was edited"):
        fit(folder)


def test_a_digest_of_other_rounds_is_found_out_too(whole):
    planned = spending.spending_of(study(), arm(), runs(), [CLIENT])
    forgotten = json.loads(json.dumps({"privacy": spending.to_meta(planned, 3)}))
    spending.check_meta("DP", forgotten, planned, 3)
    with pytest.raises(FlJaxError, match="3 rounds were spent on Gaussian noise of 4 clips, no amplification by sampling, and not 4"):
        spending.check_meta("DP", forgotten, planned, 4)


def recording(rate, num_steps, noise, max_records=12):
    """DP-SGD at the sites on batches that are drawn by coins."""
    work = batches.poisson(rate, num_steps, max_records)

    def build(hyper):
        return algorithms.fedavg(MODEL, optax.sgd(0.1), work, gradient=gradients.private(MODEL, 1.0, noise))

    return training.Arm("DP", build, lambda sites: sampling.everyone())


def test_records_pay_at_their_sites_and_the_worst_site_counts():
    made, promised = recording(0.25, 4, 2.0), Guarantee(Unit.RECORD, DELTA, name="stay", accountant=PLD)
    planned = spending.spending_of(study(), made, runs(), [promised])
    assert planned.of_run == (0, 0) and [cost.site for cost in planned.accounts[0][0].costs] == [*SITES]
    rows = list(spending.epsilon_rows([training.Label("DP", 3)], 1, 2, planned))
    work = batches.poisson(0.25, 4, max(SIZES))
    for site, n in zip(SITES, SIZES, strict=True):
        for accountant in Accountant:
            exact = PrivacyLedger(Unit.RECORD, ADD).spend(Cost(work.account(dp.GaussianDpEvent(2.0), n), Unit.RECORD), 2).epsilon(DELTA, accountant)
            (row,) = [row for row in rows if row.site == site and row.metric == f"epsilon_record_{accountant}"]
            assert row.value == exact and row.round == 2
    worst = {(row.round, row.metric): row.value for row in rows if row.site == "worst"}
    assert set(worst) == {(1, "epsilon_record_rdp"), (2, "epsilon_record_rdp"), (2, "epsilon_record_pld")}
    assert worst[2, "epsilon_record_rdp"] == max(row.value for row in rows if row.site in SITES and row.metric == "epsilon_record_rdp")
    with pytest.raises(FlJaxError, match="A site has 12 records, .* made for 5"):
        spending.spending_of(study(), recording(0.25, 4, 2.0, 5), runs(), [promised])


def test_dp_sgd_at_the_sites_ends_within_the_budget_of_the_worst_site(monkeypatch, tmp_path, capsys):
    kept = []
    monkeypatch.setattr(training, "compile_arms", lambda *arguments: kept[0] if kept else kept.append(original(*arguments)) or kept[0])
    made = recording(0.25, 2, 2.0)
    planned = spending.spending_of(study(), made, runs(), [Guarantee(Unit.RECORD, DELTA)])
    worst = {rounds: max(planned.accounts[0][0].after(rounds).epsilons(DELTA).values()) for rounds in range(1, 6)}
    limited = Guarantee(Unit.RECORD, budget=Budget((worst[4] + worst[5]) / 2, DELTA), name="stay")
    found = fit(tmp_path, [limited], made=made)
    said = f"the budget of each stay, epsilon {limited.budget.epsilon:g} at delta 1e-05 by RDP, allows 4 of 6 rounds"
    assert said in capsys.readouterr().err
    assert epsilons(load_metrics(tmp_path), "epsilon_record_rdp", "worst") == {t: worst[t] for t in range(1, 5)}
    for site in SITES:
        assert set(epsilons(found.rows, "epsilon_record_rdp", site)) == {2, 4}
    assert found.ledgers[0][0].epsilon(DELTA) == worst[4] and found.ledgers[0][0].name == "stay"
    with pytest.raises(FlJaxError, match=r"a round's cost at north was 2 times \(Gaussian noise of 2 clips, .* and is 2 times \(.* at rate 0.2 of 12"):
        fit(tmp_path, [limited], made=recording(0.2, 2, 2.0))


def test_runs_of_other_noise_have_ledgers_of_their_own_and_the_tightest_limits_all():
    both = runs()._replace(hyper=jnp.array([4.0, 8.0]))
    planned = spending.spending_of(study(), arm(), both, [Guarantee(Unit.CLIENT, budget=budget_for(2))])
    assert planned.of_run == (0, 1)
    assert [own[0].epsilon(DELTA) for own in planned.ledgers(3)] == [epsilon_of(3), epsilon_of(3, 8.0)]
    assert spending.within_budget(arm(), planned, ROUNDS)[0].rounds == 2
    assert spending.worst_epsilon(planned, 3) == epsilon_of(3)


def test_what_is_paid_once_a_period_is_spent_in_its_first_round():
    cost = Cost(dp.GaussianDpEvent(3.0), Unit.CLIENT, every=4)
    assert cost.label == "Gaussian noise of 3 clips, once every 4 rounds"
    empty = PrivacyLedger(Unit.CLIENT, ADD)
    plain = Cost(dp.GaussianDpEvent(3.0), Unit.CLIENT)
    for rounds, times in ((0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)):
        assert empty.spend(cost, rounds).epsilon(DELTA) == empty.spend(plain, times).epsilon(DELTA)
    by_ones = empty
    for _ in range(9):
        by_ones = by_ones.spend(cost)
    assert by_ones == empty.spend(cost, 9) == PrivacyLedger.from_json(by_ones.to_json())
    three = Budget((empty.spend(plain, 3).epsilon(DELTA) + empty.spend(plain, 4).epsilon(DELTA)) / 2, DELTA)
    assert Account(empty, (cost,), DELTA, three).affordable(100) == 12
    assert Account(empty, (cost,), DELTA, three).left(5, 100) == 7
    with pytest.raises(FlJaxError, match="every 1 or more rounds"):
        Cost(dp.GaussianDpEvent(3.0), Unit.CLIENT, every=0)


def test_dp_ftrl_pays_once_a_period():
    built = arm(noise=2.0).build(())._replace(client_period=3)
    cost = privacy.client_cost(built, sampling.everyone())
    assert cost.every == 3 and "once every 3 rounds" in cost.label


@pytest.mark.parametrize("rounds", [1, 2, 7, 63, 64, 100])
def test_the_projection_is_the_last_round_within_the_budget(rounds):
    cost = Cost(dp.PoissonSampledDpEvent(0.1, dp.GaussianDpEvent(1.5)), Unit.CLIENT)
    ledger = PrivacyLedger(Unit.CLIENT, ADD)
    exactly = Budget(ledger.spend(cost, rounds).epsilon(DELTA), DELTA)
    assert Account(ledger, (cost,), DELTA, exactly).affordable(100) == rounds
    assert Account(ledger, (cost,), DELTA, Budget(math.nextafter(exactly.epsilon, 0), DELTA)).affordable(100) == rounds - 1
    assert Account(ledger, (cost,), DELTA).affordable(100) == 100


@pytest.mark.parametrize("make, words", [
    (lambda: Budget(0.0, DELTA), "epsilon must be above 0"),
    (lambda: Budget(math.inf, DELTA), "epsilon must be above 0 and finite"),
    (lambda: Budget(1.0, 1.0), "delta must lie between 0 and 1"),
    (lambda: Guarantee(Unit.CLIENT), "delta must lie between 0 and 1, and is None"),
    (lambda: Guarantee(Unit.CLIENT, 1e-6, Budget(1.0, 1e-5)), "state one delta"),
    (lambda: Guarantee(Unit.RECORD, DELTA, spent=PrivacyLedger(Unit.CLIENT, ADD)), "of a client, and the guarantee of a record"),
    (lambda: Guarantee(Unit.CLIENT, DELTA, spent=PrivacyLedger(Unit.CLIENT, REPLACE), relation=ADD).account(
        [Cost(dp.GaussianDpEvent(1.0), Unit.CLIENT)]), "under REPLACE_ONE, and this run under ADD_OR_REMOVE_ONE"),
    (lambda: training.fit(study(), [arm()], SEEDS, runs(), privacy={"FedAvg": [CLIENT]}), "given for 'FedAvg', and the arms are DP"),
    (lambda: fit(noise=jnp.nan), "noise_multiplier of a GaussianDpEvent must be a finite number"),
])
def test_mistakes_are_one_sentence(make, words):
    with pytest.raises(FlJaxError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


def test_what_is_not_covered_is_said():
    cost = privacy.client_cost(arm(noise=2.0).build(()), sampling.everyone())
    said = " ".join(privacy.coverage(privacy.open_ledger(cost, name="clinic").spend(cost, 3)))
    for words in ("whether one clinic is there or not", "not these metrics", "hyper-parameters", "statistics", "no amplification by sampling"):
        assert words in said
    sampled = privacy.client_cost(arm(noise=2.0).build(()), sampling.poisson(0.5, 3))
    assert "no amplification" not in " ".join(privacy.coverage(privacy.open_ledger(sampled).spend(sampled)))
    images = PrivacyLedger(Unit.RECORD, REPLACE, name="image").spend(Cost(dp.GaussianDpEvent(1.0), Unit.RECORD, site="A"))
    said = " ".join(privacy.coverage(images))
    assert "what one image is, given that it is there, at its site" in said and "earns its records no amplification" in said
