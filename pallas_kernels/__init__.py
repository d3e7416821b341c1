"""Pallas kernels that know tiles and memory, and no number format: what a code means is a record they are handed.

decoding     that record
gpu_matmul   packed weights on Hopper GPUs, through Mosaic GPU
tpu_matmul   packed weights on TPUs
tiles        tile choices for GPUs, from a file that `autotune` writes

Imports jax only, never ifjax.
"""
