"""The papers' model families, made of backbones and routed layers."""
