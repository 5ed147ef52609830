"""OpenVINO engines."""
