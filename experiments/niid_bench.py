"""FedAvg, SCAFFOLD, FedProx and FedNova under label skew, as NIID-Bench compares them: ten silos of MNIST or Fashion-MNIST.

Li et al. 2022, "Federated learning on non-IID data silos: an experimental study" (arXiv 2102.02079), Table III, whose numbers here are
those of Flower's reproduction: 10 clients, all of them in each of 50 rounds, 10 epochs a round in batches of 64, SGD with rate .01,
momentum .9 and weight decay 1e-5, a CNN of 44,426 parameters; the best of all rounds on the test images counts. As in the published code
SCAFFOLD's correction is added behind the momentum, and FedNova normalises with it. Beside them, which the table lacks: training alone and
centralized training of as many steps.

    python -m experiments.niid_bench            # Fashion-MNIST, Dir(.5), a quarter of the images, 5 rounds, 3 seeds
    python -m experiments.niid_bench --quick    # MNIST, a fortieth of the images, 4 rounds, three arms
    python -m experiments.niid_bench --images pneumoniamnist --partition case_mix    # any images, any partition
    python -m experiments.niid_bench --table --rounds 50 --share 1 --seeds 3 --lanes 10    # the four published rows, for a GPU

The short forms have bars of their own, from images held back from the training images of other deals; the published accuracies are claims
of the last form.

2 CPU cores: 35 minutes of processor time in full. Expected, Fashion-MNIST with Dir(.5), of a test accuracy of .88 that is published for all
after 50 rounds of all images: FedAvg .803 ± .065, SCAFFOLD .822, FedProx .799, FedNova .810, training alone .570, centralized .871.
SCAFFOLD is ahead of the other three in each of three seeds (+.019 [-.015, .053] against FedAvg), FedProx in none ahead of FedAvg; published
differences are .001 to .004 after 50 rounds. The published form was not run: it needs a GPU.
Data: `python -m fl_jax.data prepare fashion_mnist mnist`.
"""

import functools

import pandas as pd

from experiments import niid_bench_report
from experiments.common import cli, mnist
from experiments.common.reproduction import Reproduction, judged
from experiments.niid_bench_protocol import (
    IMAGES,
    NOT_PUBLISHED,
    ON_GPU,
    Config,
    arm_of,
    claims,
    federation,
    network,
    stated,
    unmeasured,
)
from experiments.niid_bench_report import Measured
from fl_jax import sweep, training
from fl_jax.metrics import CLASSIFICATION
from fl_jax.results.claims import not_run

NAME = "niid_bench"
REPRODUCTION = Reproduction(claims, datasets=("fashion_mnist", "mnist"), on_gpu=ON_GPU)
CHUNK = 500


def run(config: Config) -> None:
    """Runs the study and prints its report; writes a run folder."""
    with cli.run_folder(config, NAME) as folder:
        seeds, datasets, rows = list(range(config.seeds)), {}, []
        for cell in config.cells:
            images = functools.cache(IMAGES[cell.images])  # each split is read once, not once a seed
            dealt = [federation(config, cell, seed, images) for seed in seeds]
            model = network(dealt[0].num_classes)
            study = training.Study(
                model, mnist.stacked(dealt), dealt[0].site_names, (), config.rounds, config.evaluate_every, chunk=CHUNK,
                metrics={"accuracy": CLASSIFICATION["accuracy"]}, mesh=sweep.run_mesh())
            fits = training.fit(
                study, [arm_of(name, config, model, cell) for name in config.arms], seeds, training.seeds_of(seeds, stacked=True),
                folder=folder, resume=config.resume)
            datasets[cell] = dealt
            rows += [fit.rows for fit in fits.values()]
        measured = Measured(config, datasets, pd.concat(rows, ignore_index=True))
        verdicts = judged(NAME, stated(config), measured) + not_run(NAME, unmeasured(config), NOT_PUBLISHED)
        folder.write_claims(verdicts)
        niid_bench_report.conclude(folder, measured, verdicts)


if __name__ == "__main__":
    cli.main(run, Config)
