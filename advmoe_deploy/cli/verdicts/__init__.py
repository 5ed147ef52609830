"""Verdicts in plain words, of what was measured."""
