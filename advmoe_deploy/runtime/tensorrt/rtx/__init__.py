"""What TensorRT for RTX alone has; its builder needs no GPU, and runs in tests."""
