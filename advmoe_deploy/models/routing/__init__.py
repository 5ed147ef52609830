"""Routing: router gates, routed layers, dispatch and capacity."""
