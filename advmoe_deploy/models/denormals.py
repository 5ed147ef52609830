"""Denormal weights: their number, and their replacement by zeros."""

import torch
from torch import nn

# Of the bits of a float32: a denormal has no exponent, and a fraction.
_EXPONENT, _FRACTION = 0x7F800000, 0x007FFFFF


def zero_denormals(model: nn.Module) -> int:
    """Set float32 values that are denormal to 0, as engines take them, and return how many."""
    found = 0
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dtype == torch.float32:
                bits = tensor.detach().view(torch.int32)
                # Compared as numbers they are zeros already.
                denormal = ((bits & _EXPONENT) == 0) & ((bits & _FRACTION) != 0)
                found += int(denormal.sum())
                tensor.masked_fill_(denormal, 0)
    return found
