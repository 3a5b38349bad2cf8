"""Measured comparisons: each module is a command that measures one thing and writes it to results/."""
