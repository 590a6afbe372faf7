"""Calibration: data in, FP4 weights out, block by block."""
