"""Pallas kernels that know tiles and memory, and no number format: what a code means is a function they are handed.

Imports jax only, never ifjax. Empty for now: the kernels arrive with the packed matmul.
"""
