"""What runs inside of NVIDIA's Triton Inference Server."""
