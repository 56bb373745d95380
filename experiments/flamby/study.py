"""A study of FLamby's protocol (protocol.py): its own arms, the same with matched budgets, and each site left out in
turn."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

from experiments.common import cli
from experiments.common.arms import at_one_place
from experiments.flamby import report
from experiments.flamby.data import Variant, initial_params, stacked, variants_of_epochs, variants_of_rounds
from experiments.flamby.protocol import FIRST_SEED, NOT_PASSED_ON, Config, Protocol, centralized, local_only
from fl_jax import algorithms, batches, sampling, sweep, training
from fl_jax.data import FederatedDataset
from fl_jax.types import FederatedAlgorithm, Model, PyTree, Sampling, Sites

MOMENTS = {"b1": 0.9, "tau": 1e-8}
B2 = 0.999
LEFT_OUT = "left out"
CHUNK = 64  # about as many test records as a site has


def run(protocol: Protocol, config: Config) -> None:
    """Runs the study and prints its report; writes a run folder. It takes about a minute: a resumed one begins anew."""
    dataset = protocol.load(())
    with cli.run_folder(config, protocol.name) as folder:
        model = protocol.model(dataset.train.x.shape[1])
        rounds = variants_of_rounds(protocol.load, config.leave_out)
        epochs = variants_of_epochs(rounds, protocol.load_pooled, dataset.site_names)
        fits = train(protocol, model, rounds, federated_arms(protocol, model, config), dataset, config, config.rounds)
        fits += train(protocol, model, epochs, [epochs_arm(protocol, model, config)], dataset, config, 1)
        metrics = pd.concat([fit.rows for fit in fits], ignore_index=True)
        folder.compile_seconds = sum(fit.compile_seconds for fit in fits)
        for arm in metrics["arm"].unique() if config.resume else ():
            folder.truncate_after(arm, -1)
        folder.append_metrics(metrics)
        report.conclude(folder, protocol, config, dataset, metrics)


def federated_arms(protocol: Protocol, model: Model, config: Config) -> list[training.Arm]:
    """FLamby's strategies; with config.matched also what they are measured against, with their budgets and learning rates."""
    work, rates = batches.updates(config.updates, protocol.batch_size), protocol.rates

    def everyone(sites: Sites) -> Sampling:
        del sites
        return sampling.everyone()

    def arm(name: str, build: Callable[[], FederatedAlgorithm]) -> training.Arm:
        return training.Arm(name, lambda initial: starting_from(initial, build()), everyone)

    def adaptive(build: Callable[..., FederatedAlgorithm], rates: tuple[float, float], **moments: float) -> FederatedAlgorithm:
        return build(model, optax.sgd(rates[0]), work, server_learning_rate=rates[1], **MOMENTS, **moments)

    def first_sites_own() -> FederatedAlgorithm:
        # FLamby's Cyclic trains a model of each site in turn, hands none of them on, and tests the first site's.
        turns = algorithms.in_turn(algorithms.local_only(model, optax.sgd(rates.cyclic), work))
        return turns._replace(
            model=lambda state, id: turns.model(state, jnp.zeros_like(id)),
            deploy=lambda key, state, id, sites: turns.deploy(key, state, jnp.zeros_like(id), sites))

    def centralized_arm(rate: float) -> training.Arm:
        return at_one_place(
            centralized(rate), lambda initial: starting_from(
                initial, algorithms.centralized(model, optax.sgd(rate), algorithms.pooled_batches(work))), work)

    arms = [
        arm("FedAvg", lambda: algorithms.fedavg(model, optax.sgd(rates.fedavg), work)),
        arm("FedProx", lambda: algorithms.fedprox(model, optax.sgd(rates.fedprox), work, rates.mu)),
        arm("FedAdam", lambda: adaptive(algorithms.fedadam, rates.fedadam, b2=B2)),
        arm("FedYogi", lambda: adaptive(algorithms.fedyogi, rates.fedyogi, b2=B2)),
        arm("FedAdagrad", lambda: adaptive(algorithms.fedadagrad, rates.fedadagrad)),
        arm("cyclic", lambda: algorithms.cyclic(model, optax.sgd(rates.cyclic), work)),
        arm(NOT_PASSED_ON, first_sites_own),
    ]
    for rate in sorted(set(rates.of_sites().values())) if config.matched else ():
        arms += [arm(local_only(rate), partial(algorithms.local_only, model, optax.sgd(rate), work)), centralized_arm(rate)]
    return arms


def epochs_arm(protocol: Protocol, model: Model, config: Config) -> training.Arm:
    """Adam for a number of epochs, in one round: of FedAvg, where all records are at one site."""
    work, optimizer = batches.epochs(config.epochs, protocol.batch_size), optax.adam(protocol.rates.adam)
    return training.Arm(
        "Adam", lambda initial: starting_from(initial, algorithms.fedavg(model, optimizer, work)), lambda _: sampling.everyone())


def train(
    protocol: Protocol, model: Model, variants: Sequence[Variant], arms: Sequence[training.Arm], dataset: FederatedDataset,
    config: Config, rounds: int,
) -> list[training.Fit]:
    """Trains the arms for every seed and variant as the rows of one program.

    Of a variant without a site only split "unseen" is kept, under that site's name: its records, all for testing, with the model
    of those who trained.
    """
    seeds, count = config.torch_seeds, len(variants)
    study = training.Study(
        model, stacked([variant.splits for variant in variants]), dataset.site_names, (LEFT_OUT,), rounds, config.evaluate_every,
        chunk=CHUNK, metrics=protocol.metrics, mesh=sweep.run_mesh())
    initial = initial_params(model, seeds, dataset.train.x.shape[1])
    keys = training.seeds_of(seeds, stacked=False).key
    key, initial = jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), (keys, initial))
    runs = training.Runs(key, jnp.tile(jnp.arange(count, dtype=jnp.int32), len(seeds)), initial)
    fits = training.fit(study, arms, range(len(seeds) * count), runs)
    return [fit._replace(rows=_named(fit.rows, variants)) for fit in fits.values()]


def _named(rows: pd.DataFrame, variants: Sequence[Variant]) -> pd.DataFrame:
    """Rows of runs as rows of seeds and variants."""
    seed, variant = np.divmod(rows["seed"].to_numpy(), len(variants))
    left_out, arm = (np.asarray([getattr(v, field) for v in variants], object)[variant] for field in ("left_out", "arm"))
    rows = rows.assign(
        seed=FIRST_SEED + seed, arm=np.where(arm != "", arm, rows["arm"]), site=np.where(left_out != "", left_out, rows["site"]))
    # models of one site each: nothing to give to an unseen one
    alone = rows["arm"].str.startswith(("local only", NOT_PASSED_ON))
    kept = np.where(left_out == "", rows["split"].isin(("test", "round")), (rows["split"] == "unseen") & ~alone)
    return rows[kept]


def starting_from(params: PyTree, algorithm: FederatedAlgorithm) -> FederatedAlgorithm:
    """The algorithm with these initial parameters, whatever the model's own are."""
    return algorithm._replace(init=lambda variables, num_clients: algorithm.init(variables._replace(params=params), num_clients))
