"""Verification that robustness survived the export."""
