"""The kernels of the custom operators: C, and how it is compiled."""
