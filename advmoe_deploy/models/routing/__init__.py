"""Routing: gates, routed layers, dispatch and capacity."""
