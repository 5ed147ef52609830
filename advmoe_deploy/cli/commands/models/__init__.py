"""Commands that put a model somewhere under a name."""
