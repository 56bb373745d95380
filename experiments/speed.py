"""How fast federated rounds are, beside the same gradient steps without federation.

    python -m experiments.speed --workload W1 --rounds 20              a report
    python -m experiments.speed --workload W1 --rounds 20 --json       one line, a JSON object
    python -m experiments.speed --workload W4 --seeds 5                also five seeds in one program, in units of a single run
    python -m experiments.speed --private                              what DP-SGD at the sites costs, in units of plain rounds

Workloads: W1 2NN, 100 clients x 600 records, 10 a round, batch 10, lr .1. W2 EMNIST CNN, 340 clients of log-normal sizes, 10 a round,
batch 20, lr .05. W3 CIFAR-10 CNN with dropout, 1,000 clients x 50, 50 a round, batch 10, lr .1, unweighted. W4 logistic regression on
Synthetic(1, 1), 30 devices of 50 to 5,000 records, 10 a round, 20 epochs, batch 10, lr .01. Records are generated, or those of --data.

floor_ratio is the floor's time over ours for the same number of SGD steps of the same batch size: the median over pairs measured in
turn. The floor (experiments.benchmark.floor) is one jitted loop without anything federated, on one device, in the fastest form of several.
It may be above 1: the floor's one chain of steps cannot use what lanes and devices use. Expected on 2 cores: W1 1.3, W2 .85, W3 .75,
W4 1.1, a minute each. Times mean something on a machine that does nothing else.

--private (experiments.benchmark.private): the 2NN with batches of 10 and 100 and W2's CNN with 20 and 60, with noise and without it, when
a private step should cost 1.0 to 1.2 plain ones. The noise of a step takes about 3 ns a parameter on a CPU, whatever the batch: expected
with it 4.3, 1.6, 1.3 and 1.2.
"""

import contextlib
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any, Literal, Self

from experiments.common import cli
from experiments.common.config import at_least_one
from fl_jax.errors import FlJaxError

Auto = Literal["auto"]


@dataclasses.dataclass(frozen=True)
class Config(cli.Common):
    """Measures the speed of federated rounds against a floor: the same gradient steps in one jitted loop. Writes a run folder only
    where --out names one."""

    workload: Literal["W1", "W2", "W3", "W4"] = "W1"
    """what is trained: see the head of experiments/speed.py"""
    rounds: int = 20
    """rounds that are timed"""
    warmup: int = 1
    """rounds before them, timed apart together with the compilation"""
    data: Path | None = None
    """an .npz file that prescribes records, cohorts and initial parameters; generated where it is not given"""
    lanes: Auto | int = "auto"
    """sites side by side on a device; "auto" measures"""
    pairs: int = 5
    """pairs of measurements, ours and the floor's"""
    seeds: int = 1
    """above 1: times also so many seeds in one program"""
    private: bool = False
    """measures what private gradients cost instead, on W1 and W2 (--quick: W4)"""
    json: bool = False
    """print one line, a JSON object"""

    def __post_init__(self) -> None:
        at_least_one(self, "rounds", "warmup", "pairs", "seeds")
        if self.lanes != "auto" and self.lanes < 1:
            raise FlJaxError(f"lanes must be auto, or 1 or more, and is {self.lanes}.")
        if self.private and (self.data is not None or self.seeds > 1):
            raise FlJaxError("--private measures generated records and one seed; leave --data and --seeds out.")
        if self.resume:
            raise FlJaxError("A measurement of speed cannot be resumed; start it anew.")
        if self.tensorboard:
            raise FlJaxError("A measurement of speed has no metrics over rounds for TensorBoard; leave --tensorboard out.")

    @classmethod
    def quick_defaults(cls) -> Self:
        return cls(quick=True, workload="W4", rounds=2)


def run(config: Config) -> None:
    """Measures, prints, and writes the run folder where there is one."""
    from experiments.benchmark.measure import measure  # jax, which --help does without
    from experiments.benchmark.private import SETTINGS, measure_private

    to_stderr = _say if sys.stderr.isatty() else _quiet
    with contextlib.nullcontext() if config.out is None else cli.run_folder(config, "speed") as folder:
        if config.private:
            lanes = 2 if config.lanes == "auto" else config.lanes
            measured = measure_private(SETTINGS[config.quick], config.rounds, lanes, config.pairs, to_stderr)
            print(json.dumps(measured) if config.json else private_report(measured))
        else:
            measured = measure(config.workload, config.rounds, config.warmup, config.data, config.lanes, config.pairs, config.seeds, to_stderr)
            print(json.dumps({name: _number(value) for name, value in measured.items()}) if config.json else report(measured))
        if folder is not None:
            folder.write_summary(measured)


def report(measured: dict[str, Any]) -> str:
    """What was measured, in words."""
    m = measured
    low, high = min(m["floor_ratios"]), max(m["floor_ratios"])
    lines = {
        "speed": f"{m['examples_per_s']:,.0f} examples/s, {m['rounds_per_s']:.3g} rounds/s",
        "": f"{m['rounds']} rounds of {m['examples']:,} examples in {m['seconds_steady']:.2f} s",
        "over the floor": f"{m['floor_ratio']:.2f} ({low:.2f} to {high:.2f} in {len(m['floor_ratios'])} pairs)",
        "floor": f"{m['floor_examples_per_s']:,.0f} examples/s ({m['floor_form']})",
        "shape": f"{m['devices']} devices x {m['lanes']} lanes, {100 * m['wasted_steps']:.1f} % of the lanes' steps without work",
        "before": f"{m['seconds_first']:.1f} s for the first {m['warmup']} rounds with compilation, {m['seconds_tuning']:.1f} s to choose lanes",
        "memory": f"{m['peak_rss_mb']:,.0f} MiB at most",
        "training": f"mean cross-entropy {m['final_train_loss']:.4f} after {m['warmup'] + m['rounds']} rounds",
    }
    if "seeds" in m:
        lines["seeds"] = f"{m['seeds']} in one program take {m['seeds_ratio']:.2f} single runs"
    return "\n".join([f"{m['workload']}: {m['title']}", *(f"  {label:<15} {text}" for label, text in lines.items())])


def private_report(measured: dict[str, Any]) -> str:
    """What private gradients cost, in words."""
    lines = [f"private steps in units of plain ones, {measured['devices']} devices x {measured['lanes']} lanes"]
    for row in measured["private"]:
        spread = f"({min(row['ratios']):.2f} to {max(row['ratios']):.2f} in {len(row['ratios'])} pairs)"
        name = f"{row['workload']}, batch {row['batch']}"
        lines.append(f"  {name:<15} private_over_plain {row['private_over_plain']:.2f} {spread}, without noise "
                     f"{row['private_over_plain_without_noise']:.2f}; a plain step {1e3 * row['plain_s'] / row['steps']:.3g} ms")
    return "\n".join(lines)


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def _quiet(sentence: str) -> None:
    del sentence


if __name__ == "__main__":
    cli.main(run, Config)
