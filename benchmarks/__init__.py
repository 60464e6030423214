"""One registry, one runner, one append-only ``results.csv``: ``python -m benchmarks run NAME``."""
