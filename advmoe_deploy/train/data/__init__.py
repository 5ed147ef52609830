"""Batches: the data loader, its random numbers, the learning-rate schedule."""
