"""Published data sets, a file each: where the raw files are, how they are verified and read, and the protocols of the literature."""
