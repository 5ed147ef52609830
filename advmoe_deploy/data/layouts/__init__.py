"""The layouts that data sets have on disk, one module each; none runs code that it reads."""
