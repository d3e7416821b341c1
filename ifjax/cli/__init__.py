"""The command line: formats, compare, quantize, inspect, verify, dequantize, import, export, doctor."""

from ifjax.cli.main import main

__all__ = ["main"]
