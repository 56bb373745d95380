"""The study of FedProx's synthetic federations: which runs it makes, what a round of them does, and what its claims measure."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from experiments import fedprox_report, fedprox_synthetic
from fl_jax import data
from fl_jax.errors import FlJaxError
from fl_jax.results import load_run, read_claims

pytestmark = pytest.mark.usefixtures("one_device")

DEVICES, LARGEST, RATE = 4, 60, 0.01
ONE = fedprox_report.synthetic(1.0)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The study on four small devices, all of them in each round, with one full-batch step a round: its configuration and its folder."""
    config = fedprox_synthetic.Config(
        seeds=2, heterogeneity=(1.0,), stragglers=(0.0, 0.5, 0.9), rounds=3, cohort=DEVICES, epochs=2, batch_size=LARGEST, evaluate_every=1,
        learning_rate=RATE, out=tmp_path_factory.mktemp("study") / "run")
    with pytest.MonkeyPatch.context() as patch:
        small = {"num_sites": DEVICES, "largest": LARGEST}
        patch.setattr(fedprox_synthetic, "fedprox_synthetic", lambda seed, alpha, beta: data.fedprox_synthetic(seed, alpha, beta, **small))
        patch.setattr(fedprox_synthetic, "fedprox_iid", lambda seed: data.fedprox_iid(seed, **small))
        fedprox_synthetic.run(config)
        drawn = {(draw.name, draw.seed): draw.dataset for draw in fedprox_synthetic.draws(config)}
    return config, load_run(config.out), drawn


def values(run, arm, metric, split):
    """float64[seeds, rounds] of an arm's records pooled."""
    rows = run.metrics
    rows = rows[(rows["arm"] == arm) & (rows["metric"] == metric) & (rows["split"] == split) & (rows["site"] == "all")]
    return rows.pivot(index="seed", columns="round", values="value").to_numpy()


@pytest.mark.slow
def test_every_method_share_and_federation_is_in_the_rows(study):
    config, run, _ = study
    kept = {f"{share} stragglers, mu {mu}" for share in ("0%", "50%", "90%") for mu in (0, 1)}
    arms = {f"{arm}, {name}" for name in (ONE, "Synthetic-IID") for arm in (*kept, *(f"{s} stragglers dropped, mu 0" for s in ("50%", "90%")))}
    assert {*run.metrics["arm"]} == arms
    for arm in arms:
        assert values(run, arm, "loss", "validation").shape == values(run, arm, "accuracy", "test").shape == (config.seeds, config.rounds)


@pytest.mark.slow
@pytest.mark.parametrize("name", [ONE, fedprox_report.IID])
def test_devices_descend_and_are_averaged_by_their_records(study, name):
    """Against NumPy: two full-batch steps at every device, the second of which feels the proximal term; then the mean."""
    config, run, drawn = study
    start = fedprox_synthetic._model().init(jax.random.split(jax.random.key(1))[0]).params
    for mu in (0, 1):
        weights, (train, test) = (np.asarray(start["kernel"], float), np.asarray(start["bias"], float)), (drawn[name, 1].train, drawn[name, 1].test)
        for _ in range(config.rounds):
            ends = []
            for k in range(DEVICES):
                x, y = (np.asarray(leaf)[train.offsets[k]:train.offsets[k + 1]] for leaf in (train.x, train.y))
                w, b = weights
                for _ in range(config.epochs):
                    slope = (softmax(x @ w + b, axis=1) - np.eye(10)[y]) / len(x)
                    w, b = w - RATE * (x.T @ slope + mu * (w - weights[0])), b - RATE * (slope.sum(0) + mu * (b - weights[1]))
                ends.append((w, b))
            weights = tuple(np.average([end[i] for end in ends], axis=0, weights=train.sizes) for i in range(2))
        loss = -log_softmax(train.x @ weights[0] + weights[1], axis=1)[np.arange(len(train.y)), train.y].mean()
        hits = np.mean(np.argmax(test.x @ weights[0] + weights[1], axis=1) == test.y)
        assert values(run, f"0% stragglers, mu {mu}, {name}", "loss", "validation")[1, -1] == pytest.approx(loss, abs=1e-5)
        assert values(run, f"0% stragglers, mu {mu}, {name}", "accuracy", "test")[1, -1] == pytest.approx(hits, abs=1e-6)


@pytest.mark.slow
def test_stragglers_are_dropped_by_fedavg_and_kept_by_fedprox_in_the_same_cohorts(study):
    config, run, _ = study
    rows = run.metrics[run.metrics["split"] == "round"]

    def of(arm, metric):
        return rows[(rows["arm"] == f"{arm}, mu 0, {ONE}") & (rows["metric"] == metric)].sort_values(["seed", "round"])["value"].to_numpy()

    assert (of("50% stragglers dropped", "participants") == 2).all() and (of("90% stragglers dropped", "participants") == 0).all()
    assert (of("50% stragglers", "participants") == DEVICES).all()
    full = DEVICES * config.epochs  # one step an epoch; a straggler does one epoch of two
    assert (of("0% stragglers", "steps") == full).all() and (of("50% stragglers", "steps") == full - 2).all()


@pytest.mark.slow
def test_claims_measure_what_they_say(study):
    config, run, _ = study
    verdicts = {verdict.claim.claim: verdict for verdict in read_claims(run.path / "claims.json")}
    assert list(verdicts) == [claim.claim for claim in fedprox_report.claims(config)] and len(verdicts) == 7
    measured = {name: verdict.measured for name, verdict in verdicts.items()}
    loss = values(run, f"0% stragglers, mu 1, {ONE}", "loss", "validation")
    assert measured[f"{ONE}: training loss of FedProx, mu 1"] == pytest.approx(loss.mean())
    dropped, kept, calm = (values(run, f"{arm}, {ONE}", "accuracy", "test").mean(1) for arm in (
        "90% stragglers dropped, mu 0", "90% stragglers, mu 1", "0% stragglers, mu 1"))
    assert measured[f"{ONE}, 90 % stragglers: accuracy of FedAvg"] == pytest.approx(dropped.mean())
    assert measured[f"{ONE}: accuracy of FedProx, mu 1, with 90 % stragglers minus without"] == pytest.approx((kept - calm).mean())
    assert measured[f"{ONE}, 90 % stragglers: share of data seeds on which FedProx, mu 1, is ahead"] == (kept > dropped).mean()
    assert {path.stem for path in (run.path / "figures").glob("*.png")} == {"training_loss", "test_accuracy"}


@pytest.mark.parametrize("change, count", [({}, 7), ({"iid": False}, 6), ({"stragglers": (0.0,)}, 3), ({"mu": (0.0,)}, 0), ({"heterogeneity": (0.5,)}, 1)])
def test_only_what_a_configuration_runs_is_claimed(change, count):
    assert len(fedprox_report.claims(dataclasses.replace(fedprox_synthetic.Config(), **change))) == count


@pytest.mark.parametrize("change, words", [
    ({"mu": (-1.0,)}, "mu must be different numbers from 0"), ({"mu": ()}, "at least one"), ({"stragglers": (0.5, 1.5)}, "from 0 to 1"),
    ({"stragglers": (0.5, 0.5)}, "different"), ({"seeds": 0}, "seeds must be 1 or more"), ({"heterogeneity": (), "iid": False}, "no federation"),
])
def test_mistakes_are_named(change, words):
    with pytest.raises(FlJaxError, match=words):
        fedprox_synthetic.Config(**change)
