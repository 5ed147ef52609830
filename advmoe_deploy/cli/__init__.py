"""The advmoe command."""
