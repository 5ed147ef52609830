"""Analyses of several runs beside each other: ``analyze --dissect`` and ``analyze --alpha``."""
