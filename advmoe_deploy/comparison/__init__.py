"""All engines and precisions of a bundle beside each other: size, accuracy, time."""
