"""Quantized training."""
