"""Data sets: uint8 images with labels, from the package, a folder or the hub."""
