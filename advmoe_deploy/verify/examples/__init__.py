"""Adversarial examples of a verification, kept in a file and replayed."""
