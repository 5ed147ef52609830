"""Training objectives and their loss terms."""
