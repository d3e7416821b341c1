"""The command line: formats, compare, quantize, inspect, verify, dequantize."""

from ifjax.cli.main import main

__all__ = ["main"]
