"""Sealed folders: they hold what is listed, and what is loaded is what was hashed."""
