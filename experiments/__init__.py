"""Studies, one a file: what was measured, how to run it (`python -m experiments.NAME --help`) and what to expect."""
