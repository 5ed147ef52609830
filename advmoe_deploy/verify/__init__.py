"""Whether robustness survived the export."""
