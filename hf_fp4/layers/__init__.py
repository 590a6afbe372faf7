"""Quantized layers, and which modules of a model they replace."""
