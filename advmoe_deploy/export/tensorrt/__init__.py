"""TensorRT: the graphs of a plan, and the engines built from them."""
