"""Layouts of data sets on disk, one module each; none runs code that it reads."""
