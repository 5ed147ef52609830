"""A training run: its folder, loop, evaluation and report."""
