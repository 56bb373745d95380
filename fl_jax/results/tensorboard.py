"""Metrics as TensorBoard event files, for who likes to look at them there. Optional: pip install fl_jax[tensorboard]."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fl_jax.errors import FlJaxError
from fl_jax.files import disk_errors


def summary_writer() -> Any:
    """The class tensorboardX.SummaryWriter. Raises FlJaxError where it is not installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise FlJaxError("Event files need tensorboardX; install it with: pip install fl_jax[tensorboard].") from error
    return SummaryWriter


def write_event_files(metrics: pd.DataFrame, folder: str | os.PathLike[str], *, replace: bool = False) -> list[Path]:
    """Write a run's metrics (see `load_metrics`) as scalars tagged split/metric/site over rounds; returns the folders written.

    One folder of event files per arm and seed, folder/arm/seed_n, which TensorBoard shows as one curve each. Missing values are
    left out. replace: event files that are there already go; without it they are an error (TensorBoard would draw both). Raises
    FlJaxError for that, where tensorboardX is not installed, and where the folder cannot be written.
    """
    writer_class = summary_writer()
    groups = metrics[metrics["value"].notna()].groupby(["arm", "seed"], sort=False)
    targets = {group: Path(folder) / _file_name(str(group[0])) / f"seed_{group[1]}" for group in groups.groups}
    if len(set(targets.values())) < len(targets):
        raise FlJaxError("Two arms have the same name once it is a folder's; rename one of them.")
    for target in targets.values():
        before = list(target.glob("events.*"))
        if before and not replace:
            raise FlJaxError(f"{target} holds event files already; give another folder, or remove it.")
        with disk_errors(f"replace the event files in {target}"):
            for file in before:
                file.unlink()
    for group, rows in groups:
        with disk_errors(f"write event files to {targets[group]}"):
            writer = writer_class(str(targets[group]), write_to_disk=True)
            try:
                for row in rows.itertuples(index=False):
                    writer.add_scalar(f"{row.split}/{row.metric}/{row.site}", np.float64(row.value), int(row.round))
            finally:
                writer.close()
    return list(targets.values())


def _file_name(arm: str) -> str:
    """An arm's name as the name of a folder."""
    return re.sub(r"[^\w.+-]+", "_", arm).strip(".") or "_"
