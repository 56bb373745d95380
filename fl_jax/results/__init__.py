"""What a run leaves behind: its folder, what it ran on, tables, figures and event files."""

from fl_jax.results.environment import describe_environment, now, peak_memory
from fl_jax.results.run_folder import COLUMNS, MetricRow, Run, RunFolder, frame, load_metrics, load_run

__all__ = ["COLUMNS", "MetricRow", "Run", "RunFolder", "describe_environment", "frame", "load_metrics", "load_run", "now", "peak_memory"]
