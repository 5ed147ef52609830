"""What ``export`` makes of a bundle: a module for each format, with its options and its work."""
