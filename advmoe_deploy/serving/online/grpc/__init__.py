"""gRPC service of the Open Inference Protocol."""
