"""Measured comparisons. Each module is a command that measures one thing and writes what it found to `results/`, with its provenance."""
