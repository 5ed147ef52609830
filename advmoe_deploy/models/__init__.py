"""Networks: routing, MoE layers and the backbones built from them (torch)."""

import numpy as np
import torch

for _dtype in (np.float32, np.float64):
    np.finfo(_dtype)  # kept by numpy, of which 1.26 would warn afterwards
# Denormal weights, which decay leaves behind, cost up to 80 times the time. Threads inherit this
# from the one that starts them: it has to be set before PyTorch computes on several for once.
torch.set_flush_denormal(True)
