"""V-MoE's protocol: growing radii, little room for each expert, and a dense twin."""
