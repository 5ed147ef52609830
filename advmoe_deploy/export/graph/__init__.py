"""ONNX graphs: written, stitched from segments, fused into our operators."""
