"""Serving online by Ray Serve: router and experts as deployments that scale each on its own."""
