"""FedBN beside FedAvg and SingleSet where sites differ in what their images look like: MNIST under five feature shifts.

Li et al. 2021, "FedBN: Federated learning on non-IID features via local batch normalization" (arXiv 2102.07623), section 5, with its
settings: five sites of 743 training images each, SGD with rate .01, batches of 32, one epoch a round, 100 rounds, nothing tuned. The
paper's sites have different data sets; here they have different MNIST images that each measures in its own way: inverted, of low
contrast, blurred, with a colour cast (an offset of each image's own), noisy. SingleSet is training alone. Beside them FedProx, FedAvg with
statistics recalibrated at each site, SiloBN and centralized training of as many steps; and a sixth site that takes no part, whose images
are as published, with as many of its own to adapt by.

    python -m experiments.fedbn_feature_shift            # 5 seeds
    python -m experiments.fedbn_feature_shift --quick    # 3 seeds, fewer images and rounds, a smaller network, three arms

The network is NormedCNN, small enough for two cores, where the paper's has three convolutions of 64, 64 and 128 channels and dense layers of
2,048 and 512. Test images: a site has a sixth of the official test set, shifted as its training images.

2 CPU cores: 30 minutes of processor time in full, a quarter of it compilation. Expected accuracy, mean of the five domains / inverted / unseen site:
SingleSet .866 / .899 / .842, FedAvg .651 / .270 / .903, FedProx .652 / .271 / .903, FedAvg recalibrated .913 / .898 / .940,
SiloBN .910 / .896 / .939, FedBN .913 / .898 / .938, centralized .900 / .889 / .934. FedBN is ahead of FedAvg on every domain, by .02 (colour
cast) to .63 (inverted), and of SingleSet on four of five; on inverted images it is not yet after 100 rounds (-.001 [-.013, .012]),
and is after 200 (--rounds 200: +.007 [-.006, .020]). What it wins is the statistics: with those alone of the site (SiloBN), or measured anew
before use, FedAvg has as much (-.002, .001). FedProx, here as there, does not help.
Data: `python -m fl_jax.data prepare mnist`.
"""

import pandas as pd

from experiments import fedbn_feature_shift_report
from experiments.common import cli, mnist
from experiments.common.report import Results
from experiments.common.reproduction import Reproduction, judged
from experiments.fedbn_feature_shift_protocol import CHUNK, Config, arm_of, claims, federation, network, stated
from fl_jax import sweep, training
from fl_jax.data import stack
from fl_jax.metrics import CLASSIFICATION

NAME = "fedbn_feature_shift"
REPRODUCTION = Reproduction(claims, datasets=("mnist",))


def run(config: Config, images: mnist.Load = mnist.IMAGES["mnist"]) -> None:
    """Runs the study and prints its report; writes a run folder. images: MNIST, or what stands in for it in a test."""
    with cli.run_folder(config, NAME) as folder:
        seeds, model = list(range(config.seeds)), network(config)
        datasets = [federation(config, images, seed) for seed in seeds]
        study = training.Study(
            model, stack(datasets), datasets[0].site_names, datasets[0].unseen_names, config.rounds, config.evaluate_every, chunk=CHUNK,
            metrics={"accuracy": CLASSIFICATION["accuracy"]}, mesh=sweep.run_mesh())
        fits = training.fit(
            study, [arm_of(name, config, model) for name in config.arms], seeds, training.seeds_of(seeds, stacked=True), folder=folder,
            resume=config.resume)
        metrics = pd.concat([fit.rows for fit in fits.values()], ignore_index=True)
        verdicts = judged(NAME, stated(config), Results(metrics))
        folder.write_claims(verdicts)
        fedbn_feature_shift_report.conclude(folder, config, datasets[0], {name: fit.norms for name, fit in fits.items()}, metrics, verdicts)


if __name__ == "__main__":
    cli.main(run, Config)
