"""The tools' layouts, one file a tool. Importing a file registers its records."""

from ifjax.exchange.layouts import known_tools
from ifjax.exchange.tools import compressed_tensors, fouroversix, fp8, gguf, gpt_oss, mlx, modelopt, others

MODULES = (compressed_tensors, modelopt, gpt_oss, mlx, gguf, fouroversix, fp8, others)
TOOLS = known_tools()
