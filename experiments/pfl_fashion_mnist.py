"""Personalised algorithms beside FedAvg where clients have few classes each: Fashion-MNIST with Dir(.1), as PFLlib compares them.

Zhang et al. 2025, "PFLlib: a beginner-friendly and comprehensive personalized federated learning library and benchmark"
(arXiv 2312.04992), its practical label skew: training and test images are merged, dealt to 20 clients class by class with Dir(.1), and
split 75 to 25 at each; all clients take part in each round of one epoch in batches of 10, SGD with rate .005, a CNN of 582,026
parameters. Of 2,000 rounds the best on the test images counts. FedAvg, Ditto, FedPer, FedRep and pFedMe are in the table; beside them here
fine-tuned FedAvg, the baseline that it lacks, training alone, and centralized training of as many steps.

    python -m experiments.pfl_fashion_mnist            # a tenth of the images, 8 rounds, 3 seeds
    python -m experiments.pfl_fashion_mnist --quick    # a twentieth of the images, 4 rounds, three arms
    python -m experiments.pfl_fashion_mnist --rounds 2000 --share 1 --seeds 3 --evaluate-every 20 --lanes 10    # as published, for a GPU

The short forms have bars of their own, from other deals; the published accuracies are claims of the last form. Early a personalised
arm is further ahead of FedAvg than in the published form, since a site learns its few classes in few steps.

2 CPU cores: 40 minutes of processor time in full, half of it pFedMe's, 6 GB of memory. Expected accuracy (the mean of three deals, of which
each is .03 to .06 away): FedAvg .596, Ditto .900, FedPer .889, FedRep .893, pFedMe .852, fine-tuned FedAvg .866, training alone .902,
centralized .848; guessing a client's most frequent class .690. So early all personalised arms are 26 to 30 points above FedAvg, and none is
above training alone (Ditto -.002 [-.007, .003], FedRep -.009 [-.011, -.007]), a baseline that the table lacks. The published form was
not run: it needs a GPU.
Data: `python -m fl_jax.data prepare fashion_mnist`.
"""

import pandas as pd

from experiments import pfl_fashion_mnist_report
from experiments.common import cli, mnist
from experiments.common.reproduction import Reproduction, judged
from experiments.pfl_fashion_mnist_protocol import (
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
from experiments.pfl_fashion_mnist_report import Measured
from fl_jax import sweep, training
from fl_jax.data import stack
from fl_jax.metrics import CLASSIFICATION
from fl_jax.results.claims import not_run

NAME = "pfl_fashion_mnist"
REPRODUCTION = Reproduction(claims, datasets=("fashion_mnist",), on_gpu=ON_GPU)


def run(config: Config, images: mnist.Load = mnist.IMAGES["fashion_mnist"]) -> None:
    """Runs the study and prints its report; writes a run folder. images: Fashion-MNIST, or what stands in for it in a test."""
    with cli.run_folder(config, NAME) as folder:
        seeds, model = list(range(config.seeds)), network()
        datasets = [federation(config, images, seed) for seed in seeds]
        study = training.Study(
            model, stack(datasets), datasets[0].site_names, (), config.rounds, config.evaluate_every,
            chunk=-(-len(datasets[0].test.y) // config.clients),  # the test images of a typical client
            metrics={"accuracy": CLASSIFICATION["accuracy"]}, mesh=sweep.run_mesh())
        fits = training.fit(
            study, [arm_of(name, config, model) for name in config.arms], seeds, training.seeds_of(seeds, stacked=True),
            folder=folder, resume=config.resume)
        measured = Measured(config, datasets, pd.concat([fit.rows for fit in fits.values()], ignore_index=True))
        verdicts = judged(NAME, stated(config), measured) + not_run(NAME, unmeasured(config), NOT_PUBLISHED)
        folder.write_claims(verdicts)
        pfl_fashion_mnist_report.conclude(folder, measured, verdicts)


if __name__ == "__main__":
    cli.main(run, Config)
