"""FedAvg on MNIST: the communication rounds to a target accuracy that McMahan et al. publish.

McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized data" (arXiv 1602.05629): 60,000 images at
100 clients of 600, dealt by chance or as two shards of the images sorted by digit; 10 clients a round, batches of 10, one pass over
a client's images for the 2NN and five for the CNN.

    python -m experiments.fedavg_mnist
    python -m experiments.fedavg_mnist --quick    # the 2NN with learning rates that the full form chose, two shards to 90 %

A learning rate is chosen from a grid of resolution 10^(1/3) by 5,000 of the training images, which the measured runs train on too, as in
the paper. Settings that the paper does not state: pixels in [0, 1], weights of variance 1 / inputs, biases 0, accuracy after each round.

2 CPU cores: quick 29 s, half of it compilation, which is kept for the next time; the 2NN in full about 11 minutes of
processor time; the CNN 41 s of it a round and seed, about an hour. Expected, published / here: 2NN IID 87 / 35 rounds and two shards
664 / 165, CNN IID 20 / 22, all at the learning rate .2154. At .0464 the 2NN takes 84 and 92, and 473 and 432:

    python -m experiments.fedavg_mnist --two-nn-iid.rates 0.0464 --two-nn-shards.rates 0.0464 --cnn-iid.rounds 0

Data: `python -m fl_jax.data prepare mnist`.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

from experiments import fedavg_mnist_report
from experiments.common import cli, rate_grid
from experiments.common.mnist import IMAGES, Load, classifier, stacked, to_choose, to_measure
from experiments.common.reproduction import Reproduction
from experiments.fedavg_mnist_protocol import Config, Outcome, Problem, Tried, at_least, at_most, claims, crossings, problems
from fl_jax import algorithms, batches, sampling, sweep, training
from fl_jax.core import Engine, client_mesh
from fl_jax.data import FederatedDataset
from fl_jax.metrics import CLASSIFICATION
from fl_jax.results import RunFolder, judge, select
from fl_jax.results.crossing import running_best

RATE = "learning rate"
METRICS = {"accuracy": CLASSIFICATION["accuracy"]}
CHUNK = 100  # the test images of a client
MOST_CHOOSING_MEASURES = 50
REPRODUCTION = Reproduction(claims, datasets=("mnist",))


def choose(problem: Problem, config: Config, images: Load, folder: RunFolder) -> tuple[float, dict[float, Tried], bool]:
    """The learning rate, what each of the grid gave, and whether it is at the grid's edge.

    By the mean over the last half of the rounds of the best validation accuracy so far: that of all held-out images, since a round is
    good for the whole curve and a crossing of few thousand images is noisy. Test images are not in the program.
    """
    setting = problem.setting(config)
    if len(setting.rates) == 1:
        return setting.rates[0], {}, False
    axes, seeds = {RATE: setting.rates}, list(range(config.choosing_seeds))
    federations = [to_choose(images, problem.partition, seed, config.validation) for seed in seeds]
    variants, labels = rate_grid.labels(axes, seeds)
    runs = rate_grid.rows(axes, training.seeds_of(seeds, stacked=True))
    name = f"{problem.name}, choosing"
    every = -(-setting.choosing_rounds // MOST_CHOOSING_MEASURES)
    arm, study = _study(problem, config, federations, name, setting.choosing_rounds, every, len(labels))
    rows = training.fit(study, [arm], labels, runs, variants=variants, folder=folder, resume=config.resume, may_diverge=True)[name].rows
    scores = scores_of(axes, rows, name, after=setting.choosing_rounds // 2)
    choice = rate_grid.choose(axes, scores)
    tried = {}
    for point, score in zip(rate_grid.points(axes), scores.mean(axis=1), strict=True):
        reached = crossings(rows, f"{name}{rate_grid.suffix(point)}", setting.target, "validation")
        tried[point[RATE]] = Tried(float(score), float(reached.mean()))
    return choice.point[RATE], tried, bool(choice.edges)


def scores_of(axes: rate_grid.Axes, rows: pd.DataFrame, arm: str, after: int) -> np.ndarray:
    """float64[G, S]: the mean over the rounds after round `after` of the best validation accuracy so far; NaN where a run diverged."""
    kept = select(rows, "accuracy", "validation", "all").sort_values("round")
    best = rows.assign(value=kept.groupby(["arm", "seed"])["value"].transform(running_best).combine_first(rows["value"]))
    return rate_grid.validation_scores(axes, best, arm, "accuracy", after=after)


def measure(problem: Problem, rate: float, config: Config, images: Load, folder: RunFolder) -> pd.DataFrame:
    """The metrics of all seeds, trained until each has reached the target, or for setting.rounds.

    It goes on from its own checkpoint after every setting.extend rounds, which changes no run.
    """
    setting = problem.setting(config)
    seeds = list(range(setting.seeds))
    federations = [to_measure(images, problem.partition, seed) for seed in seeds]
    runs = training.seeds_of(seeds, stacked=True)._replace(hyper={RATE: jnp.full(len(seeds), rate, jnp.float32)})
    arm, study = _study(problem, config, federations, problem.name, setting.rounds, 1, len(seeds))
    rows, resume = pd.DataFrame(), config.resume
    for rounds in range(setting.extend, setting.rounds + setting.extend, setting.extend):
        part = study._replace(rounds=min(rounds, setting.rounds))
        rows = training.fit(part, [arm], seeds, runs, folder=folder, resume=resume)[problem.name].rows
        if not np.isnan(crossings(rows, problem.name, setting.target)).any():
            break
        resume = True
    return rows


def _study(
    problem: Problem, config: Config, federations: Sequence[FederatedDataset], name: str, rounds: int, every: int, rows: int
) -> tuple[training.Arm, training.Study]:
    """FedAvg with the learning rate of each row, and the study of these federations. Devices share out the rows where these fill them,
    else the cohort of each row."""
    setting, mesh = problem.setting(config), sweep.run_mesh()
    model = classifier(problem.network(), federations[0].train.x.shape[1:])
    filled = mesh is None or rows % mesh.size == 0
    work, engine = batches.epochs(setting.epochs, config.batch_size), Engine(mesh=None if filled else client_mesh())
    arm = training.Arm(
        name, lambda hyper: algorithms.fedavg(model, optax.sgd(hyper[RATE]), work, engine=engine),
        lambda sites: sampling.fixed_size(config.cohort, sites.size.shape[0]))
    first = federations[0]
    study = training.Study(
        model, stacked(federations), first.site_names, first.unseen_names, rounds, every, chunk=CHUNK, metrics=METRICS,
        mesh=mesh if filled else None)
    return arm, study


def run(config: Config, images: Load = IMAGES["mnist"]) -> None:
    """Runs the study and prints its report; writes a run folder. images: MNIST, or what stands in for it in a test."""
    with cli.run_folder(config, "fedavg_mnist") as folder:
        outcomes = []
        for problem in problems(config):
            rate, tried, edge = choose(problem, config, images, folder)
            rows = measure(problem, rate, config, images, folder)
            outcomes.append(Outcome(problem, problem.setting(config), rate, tried, edge, rows))
        verdicts = judge("fedavg_mnist", claims(config), measured(config, outcomes))
        folder.write_claims(verdicts)
        fedavg_mnist_report.conclude(folder, outcomes, verdicts)


def measured(config: Config, outcomes: Sequence[Outcome]) -> dict[str, np.ndarray]:
    """By the text of each claim, the rounds of every seed."""
    wanted = {claim.claim for claim in claims(config)}
    texts = {text(outcome.problem, outcome.setting.target): outcome.rounds() for outcome in outcomes for text in (at_most, at_least)}
    return {text: rounds for text, rounds in texts.items() if text in wanted}


if __name__ == "__main__":
    cli.main(run, Config)
