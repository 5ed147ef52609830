"""The Open Inference Protocol over HTTP: connections, routes, JSON."""
