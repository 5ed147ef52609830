"""Parts that run inside of NVIDIA's Triton Inference Server."""
