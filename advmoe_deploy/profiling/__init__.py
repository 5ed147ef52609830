"""Latency of the MoE against its baselines, interleaved."""
