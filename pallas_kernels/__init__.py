"""Pallas kernels for block-scaled formats. Kernels know tiles and memory; the number format is a record argument.

decoding     the record that describes a 4-bit format to the matmul kernels
gpu_matmul   products with packed weights on Hopper GPUs, through Mosaic GPU
tpu_matmul   products with packed weights on TPUs
gpu_blocks   encoding and decoding of blocks on NVIDIA GPUs, through Triton
tpu_blocks   encoding and decoding of blocks on TPUs
tiles        tile choices for GPUs, from a file that `autotune` writes
varying      the types of kernels' results inside jax.shard_map

The package imports jax only, never ifjax.
"""
