"""TensorRT: building, loading and running the engines of a plan."""
