"""Private chest X-rays: hospitals keep the official splits, clippings spend the same epsilon, claims are the rows' numbers."""

import dataclasses
import itertools

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import pld

from experiments import dp_chest_xray, dp_chest_xray_protocol
from experiments.common import rate_grid
from experiments.common.chest_xrays import SITES, UNSEEN
from experiments.dp_chest_xray_protocol import (
    BOUND,
    CONSTANT,
    KINDS,
    NO_DP,
    QUANTILE,
    RATE,
    SCHEDULED,
    Config,
    Plan,
    arm_name,
    arm_of,
    clipping_of,
    noise_of,
    promise,
    site_sizes,
    to_choose,
    to_measure,
)
from experiments.dp_chest_xray_report import claims
from fl_jax import models
from fl_jax.data import Source
from fl_jax.errors import FlJaxError
from fl_jax.privacy import record_costs
from fl_jax.results import load_run, read_claims

pytestmark = pytest.mark.usefixtures("one_device")

NUMBERS = {"train": 480, "validation": 100, "test": 120}
AS_PUBLISHED = {"gain": 0.0, "offset": 0.0, "noise": 0.0}
SMALL = Config(
    epsilons=(3.0,), rounds=2, rate=0.25, microbatch=8, seeds=2, tuning_seeds=2, evaluate_every=2, baselines=False,
    plain_rates=(1e-6, 0.2), private_rates=(0.1,), quantile_rates=(0.1,), clips=(1e-4, 1.0), starts=(1e-4, 2.0))


def images(split):
    """Two thirds show a bright square; every image carries its number and its split in three pixels, to be found again."""
    rng, count = np.random.default_rng([*NUMBERS].index(split)), NUMBERS[split]
    y = rng.permutation(np.arange(count) % 3 > 0).astype(np.int32)
    x = rng.integers(40, 160, (count, 28, 28, 1))
    x[:, 10:18, 10:18] += 30 * y[:, None, None, None]
    x[:, 0, 0, 0], x[:, 0, 1, 0], x[:, 0, 2, 0] = np.arange(count) // 100, np.arange(count) % 100, 50 * [*NUMBERS].index(split)
    return Source("squares", x.astype(np.uint8), y, ("normal", "pneumonia"), (), ())


def found(records):
    """Of which split the images are, and their numbers, sorted."""
    x = np.asarray(records.x[:, 0, :3, 0], int)
    splits = {[*NUMBERS][code // 50] for code in x[:, 2]}
    return splits, sorted((x[:, 0] * 100 + x[:, 1]).tolist())


@pytest.fixture(scope="module")
def pair():
    """The federation of one seed as published and as measured by its hospitals, without noise."""
    config = Config()
    return tuple(to_measure(dataclasses.replace(config, **changes), 3, images) for changes in (AS_PUBLISHED, {"noise": 0.0}))


def test_hospitals_keep_the_official_splits(pair):
    as_published = dataclasses.replace(Config(), **AS_PUBLISHED)
    for dataset, held_out in (pair[0], "test"), (to_choose(as_published, 3, images), "validation"):
        assert found(dataset.train) == ({"train"}, list(range(480)))
        assert found(getattr(dataset, held_out)) == ({held_out}, list(range(NUMBERS[held_out])))
    assert len(pair[0].validation.y) == 0 and found(pair[0].unseen) == ({"test"}, list(range(120)))
    assert len(dataset.test.y) == len(dataset.unseen.y) == 0 and dataset.unseen_names == ()
    assert dataset.site_names == SITES and pair[0].unseen_names == (UNSEEN,)


def test_hospitals_differ_in_size_and_case_mix_as_was_asked_for(pair):
    sizes = site_sizes(Config(), 4708)
    assert sizes.sum() == 4708 and sizes[0] / sizes[-1] == pytest.approx(2.0, abs=0.01) and (np.diff(sizes) < 0).all()
    for records in pair[1].train, pair[1].test:
        shares = np.array([records.y[start:end].mean() for start, end in itertools.pairwise(records.offsets)])
        log_odds = np.log(shares / (1 - shares))
        # the first two hospitals are a third of the way to where the last two are; one image of 20 moves log-odds by .2
        np.testing.assert_allclose(sorted(log_odds - log_odds.mean()), [-1, -1 / 3, 1 / 3, 1], atol=0.25)
    np.testing.assert_array_equal(pair[0].train.y, pair[1].train.y)


def test_a_hospital_has_one_calibration_in_all_splits_and_the_first_one_none(pair):
    """By the images that are not at the ends of the range: there an image is gain times itself plus offset, rounded."""
    published, measured = pair
    lines = {}
    for split in ("train", "test", "unseen"):
        before, after = getattr(published, split), getattr(measured, split)
        for i, (start, end) in enumerate(itertools.pairwise(before.offsets)):
            x, y = (np.asarray(records.x[start:end], float).ravel() for records in (before, after))
            inside = (y > 0) & (y < 255)
            line = np.polyfit(x[inside], y[inside], 1)
            assert np.abs(np.polyval(line, x[inside]) - y[inside]).max() < 0.6
            lines[UNSEEN if split == "unseen" else SITES[i], split] = line
    for name in SITES:
        np.testing.assert_allclose(lines[name, "train"], lines[name, "test"], rtol=0.01, atol=0.2)
    np.testing.assert_allclose(lines[SITES[0], "train"], [1, 0], atol=1e-9)
    gains, offsets = np.array([line for (_, split), line in lines.items() if split != "test"]).T
    assert len({*gains.round(4)}) == len({*offsets.round(3)}) == 5 and gains.std() > 0.05 and offsets.std() > 3
    noisy = to_measure(dataclasses.replace(Config(), gain=0.0, offset=0.0), 3, images)
    spread = np.asarray(images("train").x).std()
    residue = np.asarray(noisy.train.x, float) - np.asarray(published.train.x, float)
    assert residue.std() == pytest.approx(0.2 * spread, rel=0.05)
    assert not np.array_equal(to_measure(Config(), 4, images).train.x, to_measure(Config(), 3, images).train.x)


@pytest.fixture(scope="module")
def tiny():
    """Logistic regression in the place of the CNN."""
    example = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.uint8)
    return models.bridge(models.LogisticRegression(2), example, models.softmax_cross_entropy, preprocess=models.images_uint8)


def test_every_clipping_spends_the_epsilon_that_its_noise_was_calibrated_to(tiny):
    config, epsilon = Config(), 3.0
    sizes = dict(zip(SITES, site_sizes(config, 4708).tolist(), strict=True))
    plans = [Plan(arm_name(kind, epsilon), kind, epsilon) for kind in KINDS]
    built = {plan.kind: arm_of(config, tiny, plan, 4708).build({RATE: 1.0, BOUND[plan.kind]: 0.5}) for plan in plans}
    costs = {kind: record_costs(algorithm, sizes) for kind, algorithm in built.items()}
    assert costs[CONSTANT] == costs[QUANTILE] == costs[SCHEDULED] and len(costs[CONSTANT]) == 4
    ledger = promise(config)[0].account(costs[CONSTANT]).after(config.rounds)
    spent = ledger.epsilons(config.delta, dp_chest_xray_protocol.ACCOUNTANT)
    assert {*spent} == {*SITES} and all(0.99 * epsilon <= value <= epsilon for value in spent.values())
    accountant = pld.PLDAccountant()
    step = dp_accounting.PoissonSampledDpEvent(0.125, dp_accounting.GaussianDpEvent(noise_of(config, epsilon, 4708)))
    accountant.compose(dp_accounting.SelfComposedDpEvent(step, 240))
    assert max(spent.values()) == pytest.approx(accountant.get_epsilon(config.delta), rel=2e-3)
    plain = arm_of(config, tiny, Plan(NO_DP, NO_DP), 4708).build({RATE: 1.0})
    assert promise(config)[0].account(record_costs(plain, sizes)).after(1).epsilon(config.delta) == np.inf


def test_the_schedule_starts_high_and_ends_low_and_a_quantile_pays_for_its_count():
    config = Config()
    bounds = clipping_of(config, SCHEDULED, 2.0, 4708)
    steps = np.asarray(jax.lax.scan(
        lambda state, _: (bounds.update(jax.random.key(0), state, jnp.float32(0), jnp.float32(1)), bounds.bound(state)),
        bounds.init(), length=config.steps)[1])
    assert config.steps == 240 and steps[0] == 2.0 and steps[-1] == pytest.approx(0.2, abs=0.001) and (np.diff(steps) < 0).all()
    assert steps.mean() == pytest.approx(1.1, abs=0.01)  # about the constant clip beside which it is in the grid
    assert clipping_of(config, CONSTANT, 0.3, 4708).multiplier(2.5) == bounds.multiplier(2.5) == 2.5
    quantile = clipping_of(config, QUANTILE, 0.3, 4708)
    count = 2 * 0.05 * 0.125 * 4708 / 4
    assert quantile.multiplier(2.5) == pytest.approx((2.5**-2 - count**-2) ** -0.5) and quantile.multiplier(2.5) > 2.5
    grown = quantile.init()
    for _ in range(300):
        grown = quantile.update(jax.random.key(0), grown, jnp.float32(-1e6), jnp.float32(147.0))
    assert float(grown) == config.highest


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The study on the small images with the small model: configuration and run folder."""
    config = dataclasses.replace(SMALL, out=tmp_path_factory.mktemp("study") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dp_chest_xray, "classifier", lambda: tiny)
        dp_chest_xray.run(config, images)
    return config, load_run(config.out)


def auroc(run, arm, seed, split="test", site="all"):
    rows = run.metrics[(run.metrics["arm"] == arm) & (run.metrics["seed"] == seed) & (run.metrics["metric"] == "auroc")]
    rows = rows[(rows["split"] == split) & (rows["site"] == site) & (rows["round"] == SMALL.rounds)]
    assert len(rows) == 1
    return rows["value"].item()


@pytest.mark.slow
def test_the_claims_are_the_numbers_of_the_rows(finished):
    config, run = finished
    verdicts = {verdict.claim.claim: verdict for verdict in read_claims(run.path / "claims.json")}
    assert [*verdicts] == [claim.claim for claim in claims(config)]
    constant = arm_name(CONSTANT, 3.0)
    pairs = {"AUROC that ε 3 costs, constant clip": (NO_DP, constant), f"{NO_DP} minus {constant}": (NO_DP, constant)}
    pairs |= {f"{kind} minus constant clip, ε 3": (arm_name(kind, 3.0), constant) for kind in (QUANTILE, SCHEDULED)}
    for text, (arm, other) in pairs.items():
        values = [auroc(run, arm, seed) - auroc(run, other, seed) for seed in range(2)]
        assert verdicts[text].measured == pytest.approx(np.mean(values), abs=1e-9) and verdicts[text].seeds == 2
        assert verdicts[text].holds == verdicts[text].claim.admits(np.mean(values))
    rows = run.metrics[(run.metrics["metric"] == "epsilon_record_pld") & (run.metrics["round"] == 2)]
    by_site = rows[rows["site"].isin(SITES)]
    assert {*by_site["arm"]} == {arm_name(kind, 3.0) for kind in KINDS} and len(by_site) == 3 * 2 * 4
    largest, least = (verdicts[f"{which} ε of the ledgers over its target"] for which in ("largest", "least"))
    assert largest.measured == pytest.approx(by_site["value"].max() / 3) and largest.holds and least.holds


@pytest.mark.slow
def test_what_is_chosen_is_the_best_on_validation_images_and_tuning_sees_no_test_image(finished):
    config, run = finished
    for plan in config.arms:
        scores = {}
        for point in rate_grid.points(config.axes(plan.kind)):
            name = f"grid of {plan.name}{rate_grid.suffix(point)}"
            scores[tuple(point.items())] = np.mean([auroc(run, name, seed, "validation") for seed in (1000, 1001)])
        assert len(scores) == 2 and run.summary["arms"][plan.name]["chosen"] == dict(max(scores, key=scores.__getitem__))
    rows = run.metrics[run.metrics["metric"] == "auroc"]
    of_grid = rows["arm"].str.startswith("grid of ")
    assert rows[of_grid & (rows["split"] != "validation")]["value"].isna().all() and {*rows[of_grid]["seed"]} == {1000, 1001}
    assert rows[~of_grid & (rows["split"] == "validation")]["value"].isna().all() and {*rows[~of_grid]["seed"]} == {0, 1}
    assert not of_grid[rows["split"] == "unseen"].any()


@pytest.mark.slow
def test_clips_move_as_they_should_and_without_privacy_nothing_is_cut(finished):
    config, run = finished
    rounds = run.metrics[(run.metrics["split"] == "round") & (run.metrics["site"] == "all")]
    means = rounds.groupby(["arm", "metric", "round"])["value"].mean()
    assert (means[NO_DP, "records_clipped"] == 0).all()
    chosen = {kind: run.summary["arms"][arm_name(kind, 3.0)]["chosen"][BOUND[kind]] for kind in KINDS}
    assert means[arm_name(CONSTANT, 3.0), "record_clip"].tolist() == pytest.approx([chosen[CONSTANT]] * 2)
    falling = means[arm_name(SCHEDULED, 3.0), "record_clip"]
    first = np.mean([0.1 + 0.9 * (1 + np.cos(np.pi * t / config.steps)) / 2 for t in range(4)])  # of a round's four steps
    assert falling[1] == pytest.approx(first * chosen[SCHEDULED], rel=0.05) and falling[2] < falling[1] / 2
    assert means[arm_name(QUANTILE, 3.0), "record_clip"].nunique() == 2
    figures = {path.stem for path in (run.path / "figures").glob("*.png")}
    assert figures == {"auroc_over_epsilon", "clip_over_rounds", "auroc_per_site"}


def test_settings_that_make_no_sense_are_one_sentence():
    with pytest.raises(FlJaxError, match="grid of the same size"):
        Config(clips=(1.0,))
    with pytest.raises(FlJaxError, match="epsilons must descend"):
        Config(epsilons=(1.0, 3.0))
    with pytest.raises(FlJaxError, match="chosen must have a learning rate"):
        dataclasses.replace(Config.quick_defaults(), chosen=((0.1,),))


def test_the_full_form_claims_what_was_asked_and_the_quick_forms_own_bars_are_marked():
    full = {claim.claim: claim for claim in claims(Config())}
    cost = full["AUROC that ε 3 costs, constant clip"]
    assert [cost.admits(points / 100) for points in (1.9, 2.1, 5.9, 6.1)] == [False, True, True, False]
    for kind in (QUANTILE, SCHEDULED):
        gain = full[f"{kind} minus constant clip, ε 3"]
        assert gain.admits(0.0101) and not gain.admits(0.0099)
    ladder = {"no DP minus constant, ε 10", "constant, ε 10 minus constant, ε 3", "constant, ε 3 minus constant, ε 1"}
    assert ladder < {*full} and len(full) == 8
    assert len(Config().arms) == 12 and all(len(rate_grid.points(Config().axes(plan.kind))) == 8 for plan in Config().arms)
    quick = claims(Config.quick_defaults())
    assert [claim.quick for claim in quick] == [True, True, False, False] and not quick[1].admits(0.6)
    for plan, values in zip(Config.quick_defaults().arms, Config.quick_defaults().chosen, strict=True):
        assert all(value in axis for value, axis in zip(values, Config().axes(plan.kind).values(), strict=True))


@pytest.mark.slow
def test_the_quick_form_holds(quick_form):
    verdicts = read_claims(quick_form("dp_chest_xray", "pneumoniamnist") / "claims.json")
    assert [verdict.holds for verdict in verdicts] == [True] * 4, verdicts
