"""FedBN under feature shifts: who has which images, what the arms do with BatchNorm, what is claimed, a small run."""

import dataclasses

import flax.linen as nn
import numpy as np
import pytest

from experiments import fedbn_feature_shift
from experiments.common import mnist
from experiments.fedbn_feature_shift_protocol import (
    ARMS,
    DOMAINS,
    FEDAVG,
    FEDBN,
    FEDPROX,
    RECALIBRATED,
    SILOBN,
    SINGLE,
    UNSEEN,
    Config,
    arm_of,
    claims,
    federation,
    network,
)
from fl_jax import models, norms
from fl_jax.data import Source
from fl_jax.errors import FlJaxError
from fl_jax.results import claims_table, load_run, read_claims

pytestmark = pytest.mark.usefixtures("one_device")

SMALL = Config(records=40, rounds=6, evaluate_every=3, batch_size=10, rate=0.1, width=2, seeds=2, arms=(SINGLE, FEDAVG, RECALIBRATED, FEDBN))


def images(split):
    """Ten classes, each with a bright pair of rows; every image is told by its last two pixels."""
    first, count = {"train": (0, 300), "test": (300, 120)}[split]
    y = np.random.default_rng(first).permutation(np.arange(count) % 10).astype(np.int32)
    x = np.zeros((count, 28, 28, 1), np.uint8)
    for i, label in enumerate(y):
        x[i, 2 * label:2 * label + 3] = 200
    number = first + np.arange(count)
    x[:, 27, 26, 0], x[:, 27, 27, 0] = number // 200, number % 200
    return Source("rows", x, y, tuple("0123456789"), (), ())


class Dense(nn.Module):
    """A network with BatchNorm that compiles in no time."""

    @nn.compact
    def __call__(self, x, *, train: bool):
        x = nn.Dense(16)(x.reshape(x.shape[0], -1))
        return nn.Dense(10)(nn.relu(models.batch_norm(train)(x)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = dataclasses.replace(SMALL, out=tmp_path_factory.mktemp("shift") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fedbn_feature_shift, "network", lambda config: mnist.classifier(Dense(), pixels=mnist.centred_pixels))
        fedbn_feature_shift.run(config, images)
    return config, load_run(config.out)


def test_a_domain_has_its_own_images_shifted_alike_in_training_and_test():
    dataset, again = federation(SMALL, images, 0), federation(SMALL, images, 0)
    assert dataset.site_names == tuple(DOMAINS) and dataset.unseen_names == (UNSEEN,)
    assert dataset.train.sizes.tolist() == [40] * 5 and dataset.test.sizes.tolist() == [20] * 5
    assert dataset.unseen.sizes.tolist() == [60] and dataset.support == (40,)
    np.testing.assert_array_equal(dataset.train.x, again.train.x)
    for records in (dataset.train, dataset.test):
        of = {name: records.x[a:b].astype(int) for name, a, b in zip(DOMAINS, records.offsets[:-1], records.offsets[1:], strict=True)}
        assert np.median(of["inverted"]) == 255 and np.ptp(of["low contrast"]) <= 52
        assert len(np.unique(of["colour cast"][:, 20, 0, 0])) > 10 and of["noisy"][:, 23].std() > 30
        assert np.abs(np.diff(of["blurred"], axis=1)).max() < 60 <= np.abs(np.diff(dataset.unseen.x.astype(int), axis=1)).max()
    numbers = dataset.unseen.x[:, 27, 26, 0].astype(int) * 200 + dataset.unseen.x[:, 27, 27, 0]
    inverted = 255 - dataset.train.x[:40].astype(int)
    assert not {*numbers} & {*(inverted[:, 27, 26, 0] * 200 + inverted[:, 27, 27, 0])}  # no image is at two sites


def test_arms_differ_in_what_they_do_with_batchnorm(monkeypatch):
    model = network(Config(width=2))
    assert norms.named(model, norms.LOCAL.name) == norms.LOCAL.name  # the network has some
    policies = {name: arm_of(name, SMALL, model).build(()).norms for name in ARMS}
    assert policies[FEDAVG] == policies[FEDPROX] == norms.AVERAGED.name and policies[RECALIBRATED] == norms.RECALIBRATED.name
    assert policies[SILOBN] == norms.LOCAL_STATISTICS.name and policies[FEDBN] == norms.LOCAL.name


def test_claims_are_of_every_domain_against_fedavg_and_alone():
    full, quick = claims(Config()), claims(Config.quick_defaults())
    for site in DOMAINS:
        assert {f"{FEDBN} minus {FEDAVG}, {site}", f"{FEDBN} minus {SINGLE}, {site}"} <= {claim.claim for claim in full}
        assert any(site in claim.claim for claim in quick)
    assert all(claim.quick for claim in quick) and not any(claim.quick for claim in full)
    assert not any(claim.admits(-0.05) for claim in (*full, *quick) if claim.expected)


@pytest.mark.slow
def test_what_is_written_is_what_the_rows_say(finished):
    config, run = finished
    rows = run.metrics[(run.metrics["metric"] == "accuracy") & (run.metrics["round"] == 6)]
    last = rows.groupby(["arm", "split", "site"])["value"].mean()
    for verdict in read_claims(config.out / "claims.json"):
        name, site = verdict.claim.claim.removeprefix(f"{FEDBN} minus ").split(", ")
        site = "mean" if site == "mean of the domains" else site
        assert verdict.measured == pytest.approx(last[FEDBN, "test", site] - last[name, "test", site])
    assert run.summary["accuracy"][FEDBN][UNSEEN] == pytest.approx(
        rows[(rows["arm"] == FEDBN) & (rows["split"] == "unseen") & (rows["site"] == UNSEEN)].sort_values("seed")["value"].to_list())
    assert {left["BatchNorm"] for left in run.arms.values()} == {
        norms.AVERAGED.name, norms.RECALIBRATED.name, norms.LOCAL.name, run.arms[SINGLE]["BatchNorm"]}
    assert {path.stem for path in (run.path / "figures").glob("*.png")} == {"domains", "accuracy_per_domain", "accuracy_over_rounds"}
    assert not any("nan" in sentence for sentence in run.summary["reading"])


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"arms": (FEDAVG, FEDBN)}, "SingleSet, FedAvg and FedBN among them"), ({"arms": (SINGLE, FEDAVG, FEDBN, FEDBN)}, "each once"),
    ({"arms": (SINGLE, FEDAVG, FEDBN, "FedBM")}, "arms must be some of"), ({"width": 0}, "width must be 1 or more")])
def test_mistakes_are_one_sentence(changes, sentence):
    with pytest.raises(FlJaxError, match=sentence):
        dataclasses.replace(SMALL, **changes)


@pytest.mark.slow
def test_the_quick_form_holds(quick_form):
    verdicts = read_claims(quick_form("fedbn_feature_shift", "mnist") / "claims.json")
    assert verdicts and all(verdict.holds for verdict in verdicts if verdict.claim.expected), claims_table(verdicts).text(120)
