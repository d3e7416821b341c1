"""Exact division, packing, rotation."""
