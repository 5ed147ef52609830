"""Hugging Face hub: the one part that knows its client."""
