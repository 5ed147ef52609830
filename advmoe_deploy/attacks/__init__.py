"""Adversarial attacks: white-box, aware of routing, and black-box."""
