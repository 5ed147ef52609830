"""Pages that run a model in the browser."""
