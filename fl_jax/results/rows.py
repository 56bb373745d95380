"""Device metrics as rows of metrics.csv: what a round reports, and what an evaluation finds at each site."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fl_jax.data.federated import OVER_SITES
from fl_jax.evaluation import SiteMetrics, UnseenMetrics
from fl_jax.metrics import why_undefined
from fl_jax.results.run_folder import MetricRow
from fl_jax.types import RoundMetrics


class Label(NamedTuple):
    """What the rows of a run are called."""

    arm: str
    seed: int


def evaluation_rows(
    labels: Sequence[Label], round: int, split: str, names: Sequence[str], metrics: SiteMetrics | UnseenMetrics
) -> Iterator[MetricRow]:
    """One row per run, site and metric, then pooled ("all"), mean, worst and spread ("std") over sites; with why one is missing.

    metrics: of all runs, every leaf with a leading axis of them. names: of the N sites.
    """
    counts = {name: np.asarray(value) for name, value in metrics.counts.items()}
    for s, (arm, seed) in enumerate(labels):
        for name, values in metrics.site.items():
            for i, (site, value) in enumerate(zip(names, np.asarray(values)[s].tolist(), strict=True)):
                reason = why_undefined(value, {key: int(count[s, i]) for key, count in counts.items()})
                yield MetricRow(arm, seed, round, split, site, name, value, reason)
        if isinstance(metrics, SiteMetrics):
            overall: tuple[Mapping[str, Any], ...] = (metrics.pooled, metrics.mean, metrics.worst, metrics.std)
            for site, measured in zip(OVER_SITES, overall, strict=True):
                for name, value in measured.items():
                    number = float(value[s])
                    reason = "undefined at every site" if np.isnan(number) else ""
                    yield MetricRow(arm, seed, round, split, site, name, number, reason)


def round_rows(
    labels: Sequence[Label], first_round: int, metrics: RoundMetrics, payload: tuple[int, int]
) -> Iterator[MetricRow]:
    """One row per run, round and metric of split "round": the server's metrics, the sites' own, such as the training loss, as means over
    the records that they trained on, bytes down and up.

    metrics: every leaf [S, T, ...], of rounds first_round, first_round + 1, ... payload: bytes (down, up) of one client.
    """
    participated = np.asarray(metrics.clients["participated"])
    weight = participated * np.asarray(metrics.clients.get("records", participated))
    server = {name: np.asarray(value) for name, value in metrics.server.items()}
    total = weight.sum(-1)
    for name in sorted(metrics.clients.keys() - server.keys() - {"participated", "records"}):
        values = np.where(participated > 0, np.asarray(metrics.clients[name], np.float64), 0)  # of a run that diverges, float32 overflows
        server[name] = np.where(total > 0, (values * weight).sum(-1) / np.maximum(total, 1), np.nan)
    server["bytes_down"], server["bytes_up"] = (server["participants"] * size for size in payload)
    for s, (arm, seed) in enumerate(labels):
        for t in range(total.shape[1]):
            for name, values in server.items():
                value = float(values[s, t])
                reason = "nobody took part" if np.isnan(value) and total[s, t] == 0 else ""
                yield MetricRow(arm, seed, first_round + t, "round", "all", name, value, reason)
