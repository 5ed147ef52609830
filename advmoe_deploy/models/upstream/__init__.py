"""Importers of the papers' released checkpoints."""
