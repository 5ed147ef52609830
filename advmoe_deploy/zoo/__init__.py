"""Models that are at hand by name: packaged ones, the user's own, those of the Hugging Face hub."""
