"""Manifests for KServe on Kubernetes."""
