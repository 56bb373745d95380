"""What the quickstart says: what is real, the tables, a plain reading of them, privacy, and where the files are."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from experiments.common.report import Results, bullets
from fl_jax.data import FederatedDataset, describe, label_distribution
from fl_jax.privacy import CONVERSION, Accountant, PrivacyLedger, Unit, coverage
from fl_jax.results import (
    Column,
    Missing,
    RunFolder,
    Table,
    comparison_table,
    curves,
    number,
    per_site,
    signed,
    with_margin,
)
from fl_jax.statistics import Interval
from fl_jax.training import Fit

RANGE = (0.0, 1.0)
ACCOUNTANT = Accountant.PLD
DP_SGD = "DP-SGD"
MOST_SITES = 8  # columns of the table by site, and sites named in a sentence; metrics.csv has all
REFERENCES = ("local only", "centralized")
NAMES = {"auroc": "AUROC", "accuracy": "accuracy"}


def introduce(dataset: FederatedDataset, config: Any) -> None:
    """Says what is about to run and on what, before anything computes."""
    console = Console()
    console.print(Rule("fl_jax quickstart: what do these sites gain by training together?", align="left"))
    console.print(f"\n{config.seeds} seeds, {config.rounds} rounds; each seed draws split and initialisation anew"
                  f"{', and the hospitals too' if config.csv is None else ''}. Seed 0:\n")
    console.print(Text(describe(dataset) + "\n"), soft_wrap=True)


def conclude(
    folder: RunFolder, dataset: FederatedDataset, fits: Mapping[str, Fit], ledgers: Mapping[str, PrivacyLedger], config: Any, seconds: float
) -> None:
    """Prints the tables and their reading, and writes summary and figures."""
    console = Console()
    results = Results(pd.concat([fit.rows for fit in fits.values()], ignore_index=True))
    arms = list(fits)
    epsilons = {arm: ledger.epsilon(config.delta, ACCOUNTANT) for arm, ledger in ledgers.items()}
    for metric in NAMES:
        console.print(overview(results, dataset, arms, metric), "")
    for metric in NAMES:
        console.print(by_site(results, dataset, arms, metric), "")
    console.print(costs(fits, ledgers, epsilons, config), "")
    unseen = " An unseen site has the mean over the models that the sites deploy." if dataset.unseen_names else ""
    console.print(f"Test records, after round {config.rounds}; mean ± half of the 95 % interval over {config.seeds} seeds (Student t). "
                  f"Δ: difference paired by seed, * where the interval leaves out 0.{unseen}\n{policies(fits)}\n", style="dim", highlight=False)
    console.print(Rule("Reading", align="left"))
    console.print(bullets((*reading(results, dataset, arms), *privacy_reading(results, dataset, ledgers, epsilons, config))))
    troubles = [*trouble(results, arms), *undefined(results, dataset)]
    if troubles:
        console.print("", Rule("Take note", align="left"), bullets(troubles, "!"))

    shown = [arm for arm in arms if arm not in ledgers]
    places = [*(("test", site) for site in ("mean", "worst", "all", *dataset.site_names)), *(("unseen", site) for site in dataset.unseen_names)]
    folder.save_figure("auroc_over_rounds", curves(results.metrics, "auroc", "test", arms=shown, bounds=RANGE))
    folder.save_figure("accuracy_over_rounds", curves(results.metrics, "accuracy", "test", arms=shown, bounds=RANGE))
    folder.save_figure("auroc_per_site", per_site(results.metrics, "auroc", arms=shown, bounds=RANGE))
    folder.save_figure("accuracy_per_site", per_site(results.metrics, "accuracy", arms=shown, bounds=RANGE))
    folder.save_figure("labels_per_site", label_distribution(dataset))
    folder.write_summary({
        "arms": {arm: {metric: {site: results.interval(arm, split, site, metric)._asdict() for split, site in places} for metric in NAMES}
                 for arm in arms},
        "differences": {arm: {metric: {other: results.difference(arm, other, "test", "mean", metric)._asdict() for other in REFERENCES}
                              for metric in NAMES} for arm in arms if arm not in REFERENCES},
        "epsilon": {arm: {"epsilon": epsilon, "delta": config.delta, "unit": ledgers[arm].unit, "name": ledgers[arm].name,
                          "accountant": CONVERSION[ACCOUNTANT]} for arm, epsilon in epsilons.items()},
        "norms": {arm: fit.norms for arm, fit in fits.items()},
        "bytes_per_round": {arm: dict(zip(("down", "up"), fit.payload, strict=True)) for arm, fit in fits.items()},
        "notes": list(dataset.notes), "troubles": troubles, "seconds": seconds,
    })
    training = sum(fit.seconds for fit in fits.values())
    console.print(f"\n{seconds:.0f} s in all, {training:.0f} s of them training {len(fits)} arms x {config.seeds} seeds x {config.rounds} "
                  "rounds. metrics.csv, summary.json and figures are in", highlight=False)
    console.print(Text(f"{folder.path}", style="bold"), soft_wrap=True)


def overview(results: Results, dataset: FederatedDataset, arms: list[str], metric: str) -> Table:
    """One row per arm: mean over sites, worst site, unseen sites, differences."""
    rows = []
    for arm in arms:
        row: dict[str, Any] = {"arm": arm}
        row["mean"] = results.interval(arm, "test", "mean", metric)
        row["worst"] = results.interval(arm, "test", "worst", metric)
        for site in dataset.unseen_names:
            row[site] = results.interval(arm, "unseen", site, metric)
        for other in REFERENCES:
            row[other] = None if arm == other else results.difference(arm, other, "test", "mean", metric)
        rows.append(row)
    columns = [
        Column("arm", "", right=False), Column("mean", "all sites", _margin), Column("worst", "worst", _margin),
        *(Column(site, "unseen" if len(dataset.unseen_names) == 1 else f"{site} (unseen)", _margin) for site in dataset.unseen_names[:2]),
        Column("local only", "Δ local", _difference), Column("centralized", "Δ central", _difference),
    ]
    return comparison_table(rows, columns, NAMES[metric])


def by_site(results: Results, dataset: FederatedDataset, arms: list[str], metric: str) -> Table:
    """One row per arm, one column per site."""
    rows = [{"arm": arm} | {site: results.interval(arm, "test", site, metric) for site in dataset.site_names} for arm in arms]
    columns = [Column("arm", "", right=False), *(Column(site, site, _margin) for site in dataset.site_names[:MOST_SITES])]
    cut = f" (the first {MOST_SITES} of {dataset.num_sites}; metrics.csv has all)" if dataset.num_sites > MOST_SITES else ""
    return comparison_table(rows, columns, f"{NAMES[metric]} at each site{cut}")


def costs(fits: Mapping[str, Fit], ledgers: Mapping[str, PrivacyLedger], epsilons: Mapping[str, float], config: Any) -> Table:
    """One row per arm: what one site receives and sends in a round, and what a site and a record are promised."""
    rows: list[dict[str, Any]] = []
    for arm, fit in fits.items():
        down, up = (Missing("the records themselves travel") if arm == "centralized" else size / 1000 for size in fit.payload)
        row: dict[str, Any] = {"arm": arm, "down": down, "up": up}
        row |= {unit.value: Missing("nothing is promised") for unit in Unit}
        if arm in ledgers:
            row[ledgers[arm].unit] = epsilons[arm]
            if ledgers[arm].unit is Unit.CLIENT:
                row[Unit.RECORD] = Missing("promised to the site as a whole")
        rows.append(row)
    names = {ledger.unit: ledger.name for ledger in ledgers.values()}
    columns = [Column("arm", "", right=False), Column("down", "kB down", "{:.1f}".format), Column("up", "kB up", "{:.1f}".format),
               *(Column(unit, f"ε of a {names[unit]}", _epsilon) for unit in (Unit.RECORD, Unit.CLIENT))]
    return comparison_table(
        rows, columns, f"Costs of a site: traffic in a round, privacy after {config.rounds} rounds (δ {config.delta:g})")


def policies(fits: Mapping[str, Fit]) -> str:
    """What becomes of BatchNorm in each arm, in a sentence."""
    arms: dict[str, list[str]] = {}
    for arm, fit in fits.items():
        arms.setdefault(fit.norms.removeprefix("BatchNorm "), []).append(arm)
    return f"BatchNorm: {'; '.join(f'{policy} ({_listed(names)})' for policy, names in arms.items())}."


def reading(results: Results, dataset: FederatedDataset, arms: list[str]) -> list[str]:
    """Sentences that follow from the numbers, whatever these are."""
    sentences = []
    for arm in ("FedAvg", "FedBN"):
        parts = []
        for metric, name in NAMES.items():
            delta = results.difference(arm, "local only", "test", "mean", metric)
            parts.append(f"{_signed(delta)} {name}")
        sentences.append(f"{arm} against each site's own model, mean over sites: {' and '.join(parts)}.")
    deltas = {site: results.difference("FedAvg", "local only", "test", site, "accuracy") for site in dataset.site_names}
    below = [site for site, delta in deltas.items() if delta.high < 0]
    if all(math.isnan(delta.high) for delta in deltas.values()):
        sentences.append("One seed has no intervals: which of these differences are chance remains open.")
    elif below:
        sentences.append(f"FedAvg classifies worse than the site's own model at {len(below)} of {len(deltas)} sites ({_listed(below)}).")
    else:
        sentences.append("At no site does FedAvg classify measurably worse than the site's own model.")
    candidates = [arm for arm in arms if arm not in REFERENCES]
    best = max(candidates, key=lambda arm: _mean(results.interval(arm, "test", "worst", "accuracy")))
    sentences.append(f"The best accuracy at the worst site: {best}, {_shown(results.interval(best, 'test', 'worst', 'accuracy'))}.")
    for site in dataset.unseen_names:
        shown = ", ".join(f"{arm} {_shown(results.interval(arm, 'unseen', site, 'auroc'))}" for arm in ("local only", "FedAvg", "FedBN"))
        sentences.append(f"AUROC at {site}, which nobody trained on: {shown}.")
    return sentences


def privacy_reading(
    results: Results, dataset: FederatedDataset, ledgers: Mapping[str, PrivacyLedger], epsilons: Mapping[str, float], config: Any
) -> list[str]:
    """What each private arm promises and to whom, what its noise did, and what the ledger holds."""
    sentences = []
    for arm, ledger in ledgers.items():
        rows = results.metrics[(results.metrics["arm"] == arm) & (results.metrics["split"] == "round")]
        means = rows.groupby("metric")["value"].mean()
        if ledger.unit is Unit.CLIENT:
            whom = "a whole site"
            effect = (f"the noise is {means['noise_norm'] / means['signal_norm']:.1f} times as long as the mean update, "
                      f"{100 * means['clipped']:.0f} % of the updates were clipped")
        else:
            whom, effect = f"one {ledger.name}", f"{100 * means['records_clipped']:.0f} % of the gradients were clipped"
        auroc, accuracy = (_shown(results.interval(arm, "test", "mean", metric)) for metric in ("auroc", "accuracy"))
        sentences.append(f"{arm}: epsilon {_epsilon(epsilons[arm])} at delta {config.delta:g} for {whom}; AUROC {auroc}, accuracy {accuracy}; "
                         f"{effect}.")
    dp_sgd = ledgers[DP_SGD]
    entry = max(dp_sgd.entries, key=lambda entry: dp_sgd.epsilons(config.delta, ACCOUNTANT)[entry.cost.site])
    sentences.append(
        f"The ledger of {DP_SGD} at {entry.cost.site}: {entry.rounds} rounds of {entry.cost.label}. So epsilon is {_epsilon(epsilons[DP_SGD])} of "
        f"the {config.epsilon:g} that it was calibrated to; a round that would overspend is refused.")
    sentences.append(
        f"{dataset.num_sites} sites cannot hide one of them and learn much: the noise that hides a site is spread over {dataset.num_sites} "
        f"only, and {config.rounds} rounds add up.")
    of_sites, of_records = (next(ledger for ledger in ledgers.values() if ledger.unit is unit) for unit in (Unit.CLIENT, Unit.RECORD))
    sentences += dict.fromkeys([*coverage(of_records), *coverage(of_sites)])
    sentences.append(
        f"Epsilon is by {CONVERSION[ACCOUNTANT]}. BatchNorm statistics stay at the sites where a site is hidden, and {DP_SGD} has LayerNorm in place "
        "of BatchNorm, which would mix records: this alone changes accuracy.")
    return sentences


def trouble(results: Results, arms: list[str]) -> list[str]:
    """What went wrong on the way and did not stop the study."""
    sentences = []
    rounds = results.metrics[results.metrics["split"] == "round"]
    for arm in arms:
        own = rounds[rounds["arm"] == arm]
        nonfinite = own[(own["metric"] == "nonfinite")]["value"].sum()
        empty = (own[own["metric"] == "participants"]["value"] == 0).sum()
        if nonfinite:
            sentences.append(f"{arm}: {nonfinite:.0f} updates were not finite and were left out.")
        if empty:
            sentences.append(f"{arm}: in {empty} rounds nobody took part.")
    return sentences


def undefined(results: Results, dataset: FederatedDataset) -> list[str]:
    """Which sites have no value of a metric, in how many seeds, and why."""
    seeds = results.last["seed"].nunique()
    sentences = []
    for metric, name in NAMES.items():
        rows = results.last[(results.last["metric"] == metric) & results.last["value"].isna()]
        places = []
        for split, sites in (("test", dataset.site_names), ("unseen", dataset.unseen_names)):
            for site in sites:
                missing = rows[(rows["split"] == split) & (rows["site"] == site)]
                if len(missing):
                    reasons = " or ".join(missing["note"].unique())
                    places.append(f"{site} ({reasons}; {missing['seed'].nunique()} of {seeds} seeds)")
        if places:
            sentences.append(f"{name} is undefined at {_listed(places)}; the means leave these out.")
    return sentences


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_SITES} more" if len(names) > MOST_SITES else ""
    return ", ".join(names[:MOST_SITES]) + more


def _mean(value: Interval | Missing) -> float:
    return value.mean if isinstance(value, Interval) else -math.inf


def _shown(value: Interval | Missing) -> str:
    return with_margin()(value) if isinstance(value, Interval) else "undefined"


def _margin(value: Interval) -> str:
    return with_margin()(value).replace(" ", "")


def _signed(delta: Interval) -> str:
    if math.isnan(delta.mean):
        return "undefined"
    return signed()(delta.mean) + ("" if math.isnan(delta.low) else f"±{number()((delta.high - delta.low) / 2)}")


def _difference(delta: Interval) -> str:
    clear = not math.isnan(delta.low) and (delta.low > 0 or delta.high < 0)
    return _signed(delta) + ("*" if clear else " ")


def _epsilon(epsilon: float) -> str:
    return "infinite" if math.isinf(epsilon) else f"{epsilon:.3g}"
