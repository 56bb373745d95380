"""What experiments.speed measures: workloads, the floor that no engine passes, and how both are timed."""
