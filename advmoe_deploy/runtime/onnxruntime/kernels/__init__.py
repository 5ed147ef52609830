"""Kernels of the custom operators, in C, and their compilation."""
