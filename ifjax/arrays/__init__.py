"""Quantized arrays."""
