"""Checks of an exported model against the model it came from."""
