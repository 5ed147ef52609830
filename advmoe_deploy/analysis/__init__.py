"""What a model does with its routes, and what can be proved about it."""
