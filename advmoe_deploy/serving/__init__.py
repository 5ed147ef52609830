"""Serving a bundle: batch inference and the Open Inference Protocol."""
