"""TODO"""

import pandas as pd

from experiments import pfl_fashion_mnist_report
from experiments.common import cli, mnist
from experiments.common.reproduction import Reproduction, judged
from experiments.pfl_fashion_mnist_protocol import NOT_PUBLISHED, Config, arm_of, claims, federation, network, stated, unmeasured
from experiments.pfl_fashion_mnist_report import Measured
from fl_jax import sweep, training
from fl_jax.data import stack
from fl_jax.metrics import CLASSIFICATION
from fl_jax.results.claims import not_run

NAME = "pfl_fashion_mnist"
REPRODUCTION = Reproduction(claims, datasets=("fashion_mnist",))


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
