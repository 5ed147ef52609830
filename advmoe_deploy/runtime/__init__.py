"""Running a bundle, without torch."""
