"""Dissection of an adversarially trained mixture into its router and its experts."""
