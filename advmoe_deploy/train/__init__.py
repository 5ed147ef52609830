"""Adversarial training: recipes, the loop, resume."""
