"""A model cut at its routing points into segments."""
