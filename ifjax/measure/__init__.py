"""Errors, published figures, plots, hardware models."""
