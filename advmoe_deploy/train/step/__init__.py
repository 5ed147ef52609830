"""One training step: the learner, its method and its precision."""
