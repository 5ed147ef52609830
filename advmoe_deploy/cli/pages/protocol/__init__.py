"""Plots of V-MoE's protocol."""
