"""Parts of TensorRT for RTX alone; its builder needs no GPU, and runs in tests."""
