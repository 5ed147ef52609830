"""Networks: routing, MoE layers and the backbones built from them (torch)."""
