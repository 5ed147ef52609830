"""Partition of a model at its routing points into segments."""
