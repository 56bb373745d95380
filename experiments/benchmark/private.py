"""What record-level privacy costs: rounds of FedAvg with gradients.private, in units of the same rounds with gradients.plain."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.benchmark.measure import SLICE_SECONDS, Rounds
from experiments.benchmark.workloads import generate
from fl_jax import core, gradients
from fl_jax.core import Engine

SETTINGS = {False: [("W1", 10), ("W1", 100), ("W2", 20), ("W2", 60)], True: [("W4", 10)]}
"""--quick or not -> (workload, batch size)."""
CLIP, NOISE_MULTIPLIER = 1.0, 1.0  # neither changes the time


def measure_private(
    settings: list[tuple[str, int]], rounds: int, lanes: int, pairs: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """A row for each setting with "private_over_plain" and the same without noise, medians over pairs measured in turn.

    rounds: at most so many are timed at once. lanes: sites side by side on each device. say: takes a sentence of progress.
    """
    engine = Engine(lanes, core.client_mesh())
    rows = [_row(name, batch, engine, rounds, pairs, say) for name, batch in settings]
    return {"private": rows, "lanes": lanes, "devices": jax.device_count()}


def _row(name: str, batch: int, engine: Engine, rounds: int, pairs: int, say: Callable[[str], None]) -> dict[str, Any]:
    say(f"compiling and timing {name} with batches of {batch}")
    work = generate(name, rounds)
    work = work._replace(workload=work.workload._replace(batch_size=batch))
    forms = {
        "plain": Rounds(work, engine),
        "private": Rounds(work, engine, gradients.private(work.model, CLIP, NOISE_MULTIPLIER)),
        "without noise": Rounds(work, engine, gradients.private(work.model, CLIP, 0.0)),
    }
    starts = {form: each.start() for form, each in forms.items()}
    for form, each in forms.items():
        each.run(starts[form], 0, 1)
    _, _, once = forms["plain"].run(starts["plain"], 0, 1)
    part = min(rounds, max(1, round(SLICE_SECONDS / once)))
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    steps = {}
    for _ in range(pairs):
        for form, each in forms.items():
            _, totals, elapsed = each.run(starts[form], 0, part)
            seconds[form].append(elapsed)
            steps[form] = totals["steps"]
    ratios = np.divide(seconds["private"], seconds["plain"])
    return {
        "workload": name,
        "batch": batch,
        "private_over_plain": float(np.median(ratios)),
        "private_over_plain_without_noise": float(np.median(np.divide(seconds["without noise"], seconds["plain"]))),
        "ratios": ratios.tolist(),
        "plain_s": float(np.median(seconds["plain"])),
        "steps": steps["plain"],
        "private_steps": steps["private"],
    }
