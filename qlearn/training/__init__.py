"""Learning under quantization, and the recipe that made the bundled model."""
