"""ONNX Runtime: engines, our operators and their kernels."""
