"""What fedbn_feature_shift says: accuracy by domain, gains paired by seed, a reading, figures of the domains and of the accuracies."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.rule import Rule

from experiments.common.report import Results, bullets, say_where
from experiments.fedbn_feature_shift_protocol import CENTRAL, DOMAINS, FEDAVG, FEDBN, SINGLE, UNSEEN, Config
from fl_jax.data import FederatedDataset
from fl_jax.results import (
    Column,
    RunFolder,
    Table,
    Verdict,
    claims_table,
    comparison_table,
    curves,
    per_site,
    signed,
    with_bounds,
    with_margin,
)

METRIC = "accuracy"
_difference = with_bounds(signed())


def conclude(
    folder: RunFolder, config: Config, dataset: FederatedDataset, policies: dict[str, str], metrics: pd.DataFrame, verdicts: Sequence[Verdict]
) -> None:
    """Prints tables and their reading; writes summary and figures. policies: what each arm does with BatchNorm."""
    console, found = Console(), Results(metrics)
    sentences = list(reading(config, found))
    console.print("", overview(config, found, policies), "", gains(config, found), "")
    console.print(Rule("Reading", align="left"), bullets(sentences), "", claims_table(verdicts, "Claims"))
    folder.save_figure("domains", domains_figure(dataset))
    folder.save_figure("accuracy_per_domain", per_site(metrics, METRIC, "test", config.arms, bounds=(0, 1)))
    folder.save_figure("accuracy_over_rounds", curves(metrics, METRIC, "test", "mean", config.arms, bounds=(0, 1)))
    folder.write_summary({
        "network": f"NormedCNN, width {config.width}", "policies": policies, "reading": sentences,
        "accuracy": {arm: {site: found.values(arm, split, site, METRIC).tolist() for split, site in _places()} for arm in config.arms}})
    say_where(console, folder, f"{config.seeds} seeds")


def _places() -> list[tuple[str, str]]:
    return [*(("test", site) for site in (*DOMAINS, "mean", "worst")), ("unseen", UNSEEN)]


def overview(config: Config, found: Results, policies: dict[str, str]) -> Table:
    """One row an arm: what it does with BatchNorm, the accuracy on each domain, their mean, the worst, and the unseen site's."""
    rows: list[dict[str, Any]] = [
        {"arm": arm, "norms": policies[arm].removeprefix("BatchNorm ")} | {site: found.interval(arm, split, site, METRIC) for split, site in _places()}
        for arm in config.arms]
    columns = [Column("arm", "", right=False), Column("norms", "BatchNorm", right=False),
               *(Column(site, f"{site} (unseen)" if split == "unseen" else site, with_margin()) for split, site in _places())]
    title = (f"Test accuracy after {config.rounds} rounds, {config.records} images a client, NormedCNN of width {config.width}, {config.seeds} seeds; "
             "± half of the 95 % interval")
    return comparison_table(rows, columns, title)


def gains(config: Config, found: Results) -> Table:
    """One row an arm: what FedBN has more, on each domain."""
    rows: list[dict[str, Any]] = [
        {"arm": arm} | {site: found.difference(FEDBN, arm, split, site, METRIC) for split, site in _places()}
        for arm in config.arms if arm != FEDBN]
    columns = [Column("arm", "", right=False), *(Column(site, site, _difference) for _, site in _places())]
    return comparison_table(rows, columns, f"{FEDBN} minus the arm, paired by seed, with the 95 % interval")


def reading(config: Config, found: Results) -> Iterator[str]:
    """Sentences that follow from the numbers, whatever these are."""
    for other in (FEDAVG, SINGLE):
        ahead = [site for site in DOMAINS if found.difference(FEDBN, other, "test", site, METRIC).low > 0]
        yield (f"{FEDBN} is clearly ahead of {other} on {len(ahead)} of {len(DOMAINS)} domains{': ' + ', '.join(ahead) if ahead else ''}; on the mean of "
               f"all by {_difference(found.difference(FEDBN, other, 'test', 'mean', METRIC))}.")
    rest = [arm for arm in config.arms if arm not in (FEDBN, FEDAVG, SINGLE, CENTRAL)]
    if rest:
        parts = [f"{arm} {_difference(found.difference(arm, FEDAVG, 'test', 'mean', METRIC))}" for arm in rest]
        yield f"Against {FEDAVG}, mean of the domains: {', '.join(parts)}."
    scores = {arm: float(np.nanmean(found.values(arm, "unseen", UNSEEN, METRIC))) for arm in config.arms}
    best = max(scores, key=scores.__getitem__)
    yield (f"At the unseen site, whose images have no shift, {best} is best ({scores[best]:.3f}; {FEDAVG} {scores[FEDAVG]:.3f}, {FEDBN} "
           f"{scores[FEDBN]:.3f} after a round of its own on {config.records} images).")


def domains_figure(dataset: FederatedDataset, count: int = 8) -> Figure:
    """The first training images of each domain, a row each; the unseen site last."""
    names = (*dataset.site_names, *dataset.unseen_names)
    figure = Figure(figsize=(0.75 * count + 1.3, 0.78 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), count, squeeze=False)
    for i, name in enumerate(names):
        records, at = (dataset.train, i) if i < dataset.num_sites else (dataset.unseen, i - dataset.num_sites)
        for j, axes in enumerate(panels[i]):
            axes.imshow(records.x[records.offsets[at] + j, :, :, 0], cmap="gray", vmin=0, vmax=255)
            axes.set_xticks([])
            axes.set_yticks([])
        panels[i, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    return figure
