"""Targets of an export from a bundle: a module for each format, with its options and its work."""
