"""Record-level differential privacy on Fed-Heart-Disease: FLamby's curve with its true epsilon, and what epsilon 1, 3 and 10
cost.

FLamby (Ogier du Terrail et al. 2022, arXiv 2210.04620) trains its logistic regression at four hospitals by FedAvg with the
private steps of Opacus, for labels of epsilon 50 to .1 and delta .1 to .0001. Its noise is for 15 passes, where 1,500 updates are
made; its batches are not the Poisson samples that the label takes for granted; and all hospitals draw the same noise.
experiments/flamby/opacus.py restates all of it. Here are its accuracies by the same noise, the epsilon that the labels stand for,
and what independent noise would give.

    python -m experiments.dp_fed_heart_disease
    python -m experiments.dp_fed_heart_disease --quick    # two labels, two budgets, one plan

Then the honest curve, by Poisson samples at one rate and one noise for all hospitals, calibrated for every step: with FLamby's
number of steps and learning rate, and with steps, sampling and learning rate that are chosen from a grid by validation patients,
who are a quarter of the training patients, on twenty splits. Test patients are not in the choice. Without differential privacy
the same choice of learning rate is made for FedAvg, for each hospital alone and for all patients in one place.

2 CPU cores: about 3 minutes of processor time in full, quick 1 minute of it, most of it compilation, which is kept.
Expected, published / here, as the mean over hospitals: without privacy .713 / .700; what is lost at labels of 50 to 1 is .010 to
.014 / .018 (deltas averaged), at .1 .059 / .056, and at .1 and 1e-4 .107 / .102, of which own generators would save half.
At labels of 1 and more it is not the noise but the clip that costs: without noise .035, of which dividing by 3 gives half back. A
label stands for 3 to 9 times its epsilon had batches been Poisson samples, and for 22 times and more as they are. Honest epsilons of 1
to 10 at delta .001 cost FedAvg less than 254 test patients can tell (.746, .746, .735 over all patients, .728 without) if steps
and rate are chosen for them; FLamby's steps and rate lose 6 or 7 points. At epsilon 1 hospitals alone have .751, and FedAvg with
an intercept of each hospital's own has .777.

One thing is different from FLamby: it does not seed the first initialisation, so that only means over starts can be compared, and
differences between runs of one start.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

from experiments import dp_fed_heart_disease_report as report
from experiments.common import cli, rate_grid
from experiments.common.arms import at_one_place
from experiments.common.reproduction import Reproduction
from experiments.dp_fed_heart_disease_protocol import (
    AS_MANY_STEPS,
    AS_RUN,
    BATCH,
    EPSILON,
    FEDERATED,
    INTERCEPTS,
    LOCAL,
    METRIC,
    OWN,
    POOLED,
    PUBLISHED_RATE,
    RATE,
    ROUNDS,
    UPDATES,
    Config,
    Plan,
    as_many_steps,
    at_published_rate,
    chosen,
    claims,
    labelled,
    noises,
    private,
    trained,
)
from experiments.fed_heart_disease import logistic_regression
from experiments.flamby import opacus
from experiments.flamby.data import initial_params
from experiments.flamby.study import starting_from
from fl_jax import algorithms, batches, data, gradients, privacy, sampling, sweep, training
from fl_jax.data import FederatedDataset, fed_heart_disease, no_records
from fl_jax.metrics import CLASSIFICATION
from fl_jax.norms import NormPolicy
from fl_jax.privacy import Accountant, Budget, Guarantee, Unit
from fl_jax.results import RunFolder
from fl_jax.types import FederatedAlgorithm, Model, PyTree, Sampling, Sites

CHUNK = 64  # about as many test patients as a hospital has
FIRST_TUNING_SEED = 1000  # the starts that are reported are those of seeds 42, 43, ...
REPRODUCTION = Reproduction(claims, datasets=("fed_heart_disease",))

Load = Callable[[float, int], FederatedDataset]
"""(share of the training patients for validation, seed of the split) -> the data."""
Choices = Mapping[str, "Chosen"]


class Chosen(NamedTuple):
    """What the grid gave an arm. plan: None without differential privacy. score: mean validation accuracy. edge: of the learning
    rates."""

    plan: Plan | None
    rate: float
    score: float
    edge: bool


def load(validation: float, seed: int) -> FederatedDataset:
    """Fed-Heart-Disease."""
    return fed_heart_disease(validation=validation, seed=seed)


def run(config: Config, load: Load = load) -> None:
    """Runs the study and prints its report; writes a run folder. load: the data, or what stands in for them in a test."""
    with cli.run_folder(config, "dp_fed_heart_disease") as folder:
        choices = choose(config, load)
        dataset = load(0.0, 0)
        fits = {**flamby(config, dataset), **baselines(config, dataset, choices), **within_budgets(config, dataset, choices)}
        metrics = pd.concat([fit.rows for fit in fits.values()], ignore_index=True)
        folder.compile_seconds = sum(fit.compile_seconds for fit in fits.values())
        _record(folder, config, metrics)
        ledgers = {name: fit.ledgers[0][0] for name, fit in fits.items() if fit.ledgers}
        report.conclude(folder, config, dataset, metrics, choices, ledgers)


def _record(folder: RunFolder, config: Config, metrics: pd.DataFrame) -> None:
    for arm in metrics["arm"].unique() if config.resume else ():  # a resumed run begins anew: it takes minutes
        folder.truncate_after(arm, -1)
    folder.append_metrics(metrics)


def flamby(config: Config, dataset: FederatedDataset) -> dict[str, training.Fit]:
    """FLamby's private FedAvg with the noise of each label, as it is run and with a generator at each hospital."""
    study, seeds = _study([dataset]), config.torch_seeds
    work = opacus.passes(UPDATES, BATCH)
    noise = jnp.asarray([noises(label, dataset.train.sizes) for label in config.pairs], jnp.float32)
    keys = jax.vmap(lambda k: jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), k))(jnp.asarray(seeds)))(
        jnp.arange(2 * len(config.pairs))).reshape(2, -1)
    hyper = {"noise": jnp.repeat(noise, len(seeds), axis=0), "generator": keys[1]}
    runs = _with_starts(training.Runs(keys[0], jnp.zeros(keys.shape[1], jnp.int32), hyper), study.model, seeds, dataset)

    def arm(name: str, one: bool) -> training.Arm:
        def build(hyper: PyTree) -> FederatedAlgorithm:
            key = hyper["generator"] if one else None
            return starting_from(hyper["start"], opacus.fedavg(study.model, PUBLISHED_RATE, work, hyper["noise"], key))

        return training.Arm(name, build, _everyone)

    variants = [labelled(*label) for label in config.pairs for _ in seeds]
    return training.fit(study, [arm(AS_RUN, True), arm(OWN, False)], seeds * len(config.pairs), runs, variants=variants)


def choose(config: Config, load: Load) -> dict[str, Chosen]:
    """What each arm is to run with, by its accuracy on the validation patients of all hospitals: a learning rate, and within a
    budget also a plan. It sees no test patient. The mean over hospitals, FLamby's metric, would give each of the smallest one's
    few validation patients six times the weight of another's, and has no clear optimum on this grid."""
    seeds = list(range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + config.tuning_seeds))
    splits = [replace(split, test=no_records(split.train, split.num_sites)) for split in (load(config.validation, seed) for seed in seeds)]
    study = _study(splits)
    axes = {RATE: config.rates}
    runs = _with_starts(rate_grid.rows(axes, training.seeds_of(seeds, stacked=True)), study.model, seeds, splits[0])
    variants, labels = rate_grid.labels(axes, seeds)
    fits = training.fit(study, _not_private(config, study.model), labels, runs, variants=variants, may_diverge=True)
    found = {}
    for arm, fit in fits.items():
        choice = rate_grid.choose(axes, rate_grid.validation_scores(axes, fit.rows, arm, METRIC, site="all"))
        found[chosen(arm)] = Chosen(None, choice.point[RATE], choice.score, bool(choice.edges))

    axes = {EPSILON: config.epsilons, RATE: config.rates}
    tried: dict[str, list[Chosen]] = {}
    for plan in config.plans:
        runs = _with_starts(rate_grid.rows(axes, training.seeds_of(seeds, stacked=True)), study.model, seeds, splits[0])
        per_budget = np.repeat([calibrated(config, plan, epsilon) for epsilon in config.epsilons], len(config.rates) * len(seeds))
        runs.hyper["noise"] = jnp.asarray(per_budget)
        variants, labels = rate_grid.labels(axes, seeds)
        arms = [_private(config, study.model, arm, plan, splits) for arm in private(config)]
        fits = training.fit(study, arms, labels, runs, variants=variants, may_diverge=True)
        for arm in private(config):
            name = _planned(arm, plan)
            scores = rate_grid.validation_scores(axes, fits[name].rows, name, METRIC, site="all")
            for epsilon, own in zip(config.epsilons, np.split(scores, len(config.epsilons)), strict=True):
                choice = rate_grid.choose({RATE: config.rates}, own)
                way = Chosen(plan, choice.point[RATE], choice.score, bool(choice.edges))
                tried.setdefault(chosen(arm, epsilon), []).append(way)
    return found | {name: max(ways, key=lambda way: way.score) for name, ways in tried.items()}


def baselines(config: Config, dataset: FederatedDataset, choices: Choices) -> dict[str, training.Fit]:
    """FedAvg, hospitals alone and pooled training without differential privacy, at FLamby's learning rate and at the chosen
    one."""
    study, seeds = _study([dataset]), config.torch_seeds
    found: dict[str, training.Fit] = {}
    for arm in _not_private(config, study.model):
        ways = {at_published_rate(arm.name): PUBLISHED_RATE, chosen(arm.name): choices[chosen(arm.name)].rate}
        found |= _fit_ways(study, arm, seeds, dataset, {name: {RATE: jnp.float32(rate)} for name, rate in ways.items()}, None)
    return found


def within_budgets(config: Config, dataset: FederatedDataset, choices: Choices) -> dict[str, training.Fit]:
    """Each budget's arms: as many steps as FLamby at its learning rate, and as chosen; their ledgers are those of
    training.fit."""
    study, seeds = _study([dataset]), config.torch_seeds
    wanted: dict[tuple[str, Plan], dict[str, PyTree]] = {}
    for epsilon in config.epsilons:
        ways = {as_many_steps(epsilon): (FEDERATED, AS_MANY_STEPS, PUBLISHED_RATE)}
        for arm in private(config):
            name = chosen(arm, epsilon)
            plan = choices[name].plan
            assert plan is not None
            ways[name] = (arm, plan, choices[name].rate)
        for name, (arm, plan, rate) in ways.items():
            wanted.setdefault((arm, plan), {})[name] = {RATE: jnp.float32(rate), "noise": calibrated(config, plan, epsilon)}
    promise = [Guarantee(Unit.RECORD, config.delta, name="patient", accountant=Accountant.PLD)]
    found: dict[str, training.Fit] = {}
    for (arm, plan), ways in wanted.items():
        found |= _fit_ways(study, _private(config, study.model, arm, plan, [dataset]), seeds, dataset, ways, promise)
    return found


@cache
def _noise(plan: Plan, epsilon: float, delta: float) -> float:
    most = 2**10  # Poisson samples cost the same whatever the number of records, but for cut samples, which are 1e-15 of them
    work = batches.poisson(*plan, most)
    return privacy.calibrate(Budget(epsilon, delta, Accountant.PLD), ROUNDS, lambda event: work.account(event, most))


def calibrated(config: Config, plan: Plan, epsilon: float) -> np.float32:
    """The noise multiplier with which all steps of a plan stay within a budget, by PLD: rounded up to float32, as it is run
    with."""
    noise = _noise(plan, epsilon, config.delta)
    rounded = np.float32(noise)
    return rounded if float(rounded) >= noise else np.nextafter(rounded, np.float32(np.inf))


def _fit_ways(
    study: training.Study, arm: training.Arm, seeds: Sequence[int], dataset: FederatedDataset, ways: Mapping[str, PyTree],
    promise: Sequence[Guarantee] | None,
) -> dict[str, training.Fit]:
    """An arm with several hyper-parameters, all seeds of each as rows of one program; by the name that each is given."""
    count, of_seeds = len(seeds), training.seeds_of(seeds, stacked=False)
    names = next(iter(ways.values()))
    hyper = {name: jnp.repeat(jnp.stack([jnp.asarray(way[name]) for way in ways.values()]), count) for name in names}
    runs = training.Runs(jnp.tile(of_seeds.key, len(ways)), jnp.zeros(len(ways) * count, jnp.int32), hyper)
    runs = _with_starts(runs, study.model, seeds, dataset)
    variants = [f", {name}" for name in ways for _ in seeds]
    privacy = {arm.name: promise} if promise else None
    whole = training.fit(study, [arm], list(seeds) * len(ways), runs, variants=variants, privacy=privacy)[arm.name]
    found = {}
    for k, name in enumerate(ways):
        rows = whole.rows[whole.rows["arm"] == f"{arm.name}, {name}"].assign(arm=name)
        found[name] = whole._replace(
            rows=rows, ledgers=whole.ledgers[k * count:(k + 1) * count], compile_seconds=whole.compile_seconds / len(ways))
    return found


def _study(datasets: Sequence[FederatedDataset]) -> training.Study:
    first = datasets[0]
    return training.Study(
        logistic_regression(first.train.x.shape[1]), data.stack(datasets), first.site_names, first.unseen_names, ROUNDS, ROUNDS,
        chunk=CHUNK, metrics={METRIC: CLASSIFICATION[METRIC]}, mesh=sweep.run_mesh())


def _with_starts(runs: training.Runs, model: Model, seeds: Sequence[int], dataset: FederatedDataset) -> training.Runs:
    """The runs with PyTorch's initialisation of their seed, in a row of which all seeds follow one another."""
    times = runs.key.shape[0] // len(seeds)
    starts = jax.tree.map(
        lambda leaf: jnp.tile(leaf, (times,) + (1,) * (leaf.ndim - 1)), initial_params(model, seeds, dataset.train.x.shape[1]))
    return runs._replace(hyper={**runs.hyper, "start": starts})


def _everyone(sites: Sites) -> Sampling:
    del sites
    return sampling.everyone()


def _not_private(config: Config, model: Model) -> list[training.Arm]:
    """The hospitals together, each alone, and all patients in one place, with FLamby's updates; the learning rate is a
    hyper-parameter."""
    work = batches.updates(UPDATES, BATCH)

    def arm(name: str, build: Callable[..., FederatedAlgorithm]) -> training.Arm:
        return training.Arm(
            name, lambda hyper: starting_from(hyper["start"], build(model, optax.sgd(hyper[RATE]), work)), _everyone)

    pooled = at_one_place(
        POOLED, lambda hyper: starting_from(
            hyper["start"], algorithms.centralized(model, optax.sgd(hyper[RATE]), algorithms.pooled_batches(work))), work)
    return [*(arm(name, build) for name, build in _algorithms(config).items()), pooled]


def _algorithms(config: Config) -> dict[str, Callable[..., FederatedAlgorithm]]:
    """How the hospitals train, together or alone, by name."""
    own = NormPolicy("intercepts stay", lambda path, module: path[-1] == "bias")
    ways: dict[str, Callable[..., FederatedAlgorithm]] = {
        FEDERATED: algorithms.fedavg, INTERCEPTS: partial(algorithms.fedavg, norms=own), LOCAL: algorithms.local_only}
    return {name: ways[name] for name in trained(config)}


def _planned(arm: str, plan: Plan) -> str:
    return f"{arm}, {plan.name}"


def _private(config: Config, model: Model, name: str, plan: Plan, datasets: Sequence[FederatedDataset]) -> training.Arm:
    """The hospitals, together or alone, with private steps on Poisson samples; learning rate and noise are hyper-parameters."""
    work = batches.poisson(*plan, max(int(dataset.train.sizes.max()) for dataset in datasets))
    algorithm = _algorithms(config)[name]

    def build(hyper: PyTree) -> FederatedAlgorithm:
        gradient = gradients.private(model, opacus.CLIP, hyper["noise"])
        return starting_from(hyper["start"], algorithm(model, optax.sgd(hyper[RATE]), work, gradient=gradient))

    return training.Arm(_planned(name, plan), build, _everyone)


if __name__ == "__main__":
    cli.main(run, Config)
