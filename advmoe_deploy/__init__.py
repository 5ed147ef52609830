"""Adversarially robust mixture-of-experts image classifiers, from training to production."""

__version__ = "0.1.0"
