"""What a run leaves behind: its folder, what it ran on, tables, figures and event files."""

from fl_jax.results.claims import CLAIMS, Claim, Direction, Verdict, claims_table, judge, read_claims
from fl_jax.results.environment import describe_environment, now, peak_memory
from fl_jax.results.figures import curves, per_site
from fl_jax.results.run_folder import COLUMNS, MetricRow, Run, RunFolder, frame, load_metrics, load_run
from fl_jax.results.seeds import last_round, over_seeds, select
from fl_jax.results.tables import Column, Missing, Table, comparison_table, number, signed, with_bounds, with_margin
from fl_jax.results.tensorboard import write_event_files

__all__ = [
    "CLAIMS",
    "COLUMNS",
    "Claim",
    "Column",
    "Direction",
    "MetricRow",
    "Missing",
    "Run",
    "RunFolder",
    "Table",
    "Verdict",
    "claims_table",
    "comparison_table",
    "curves",
    "describe_environment",
    "frame",
    "judge",
    "last_round",
    "load_metrics",
    "load_run",
    "now",
    "number",
    "over_seeds",
    "peak_memory",
    "per_site",
    "read_claims",
    "select",
    "signed",
    "with_bounds",
    "with_margin",
    "write_event_files",
]
