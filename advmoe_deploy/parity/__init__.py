"""Parity: when the answers of two engines count as the same."""
