"""Lower precisions, and the accuracy gate that each has to pass."""
