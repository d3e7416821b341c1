"""The tools' own code on files of ours, and files of theirs for us: python exchange_readers.py READER FOLDER RESULT.

Each reader takes a folder with model.safetensors and config.json and gives arrays by name, which go to RESULT (.npz).
Nothing here decodes anything by itself, and jax is not imported.
"""

import json
import sys
from pathlib import Path

import numpy as np


def opened(folder):
    """(torch tensors by name, quantization_config)"""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return load_file(folder / "model.safetensors"), config


def modules(tensors, suffix):
    """For each layer with an array of that name, its arrays by their names below it."""
    for name in sorted(tensors):
        if name.endswith("." + suffix):
            module = name.removesuffix("." + suffix)
            yield module, {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(module + ".")}


def compressed_tensors(folder):
    """As the library decompresses a layer (bfloat16), and by the same functions in float32."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    tensors, config = opened(folder)
    config = QuantizationConfig.model_validate(config)
    (scheme,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config.format)
    assert compressor.can_compress(torch.nn.Linear, scheme)
    for module, parts in modules(tensors, "weight_packed"):
        assert set(compressor.compression_param_names(scheme)) <= parts.keys()
        rows, half = parts["weight_packed"].shape
        codes = unpack_fp4_from_uint8(parts["weight_packed"], rows, 2 * half, torch.float32)
        scale = compressor._decompress_scale(parts["weight_scale"], torch.float32)
        factor = parts.get("weight_global_scale")
        yield f"{module}.elements", codes
        yield f"{module}.scale_bytes", parts["weight_scale"].view(torch.uint8)
        yield f"{module}.float32", dequantize(codes, scale, args=scheme.weights, global_scale=factor, dtype=torch.float32)
        yield f"{module}.bfloat16", compressor.decompress(parts, scheme)["weight"]


def torchao(folder):
    """NVFP4Tensor and MXTensor made of ModelOpt's arrays, whose conventions they have."""
    import torch
    from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, unpack_uint4
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    from torchao.quantization.quantize_.common import KernelPreference

    tensors, _ = opened(folder)
    for module, parts in modules(tensors, "weight_scale"):
        packed, scale = parts["weight"], parts["weight_scale"]
        if scale.dtype == torch.float8_e4m3fn:
            tensor = NVFP4Tensor(packed, scale, 16, torch.float32, per_tensor_scale=parts["weight_scale_2"])
        else:
            scale = scale.view(torch.float8_e8m0fnu)
            tensor = MXTensor(
                packed, scale, torch.float4_e2m1fn_x2, 32, torch.float32, KernelPreference.EMULATED, None, False
            )
        yield f"{module}.elements", f4_unpacked_to_f32(unpack_uint4(packed))
        yield f"{module}.scale_bytes", tensor.scale.view(torch.uint8)
        yield f"{module}.float32", tensor.dequantize(torch.float32)


def modelopt(folder):
    """ModelOpt's NVFP4QTensor and MXFP4QTensor."""
    import torch
    from modelopt.torch.quantization.qtensor import MXFP4QTensor, NVFP4QTensor

    tensors, _ = opened(folder)
    for module, parts in modules(tensors, "weight_scale"):
        packed, scale = parts["weight"], parts["weight_scale"]
        shape = torch.Size((packed.shape[0], 2 * packed.shape[1]))
        if scale.dtype == torch.float8_e4m3fn:
            settings = {"scale": scale, "double_scale": parts["weight_scale_2"], "block_sizes": {-1: 16}}
            value = NVFP4QTensor(shape, torch.float32, packed).dequantize(torch.float32, **settings)
        else:
            settings = {"scale": scale, "block_sizes": {-1: 32}}
            value = MXFP4QTensor(shape, torch.float32, packed).dequantize(torch.float32, **settings)
        yield f"{module}.float32", value


def converter(folder):
    """What compressed-tensors makes of ModelOpt's names."""
    import torch
    from compressed_tensors.entrypoints.convert.converters import ModelOptNvfp4Converter

    tensors, config = opened(folder)
    for name, array in ModelOptNvfp4Converter(targets=[r"re:.*"], ignore=config["ignore"]).process(tensors).items():
        yield name, array.view(torch.uint8) if array.dtype == torch.float8_e4m3fn else array


READERS = {f.__name__: f for f in (compressed_tensors, torchao, modelopt, converter)}


def main(reader, folder, result):
    import torch

    with torch.no_grad():
        arrays = {name: value.detach().float() if value.dtype == torch.bfloat16 else value.detach()
                  for name, value in READERS[reader](Path(folder))}  # fmt: skip
    np.savez(result, **{name: value.numpy() for name, value in arrays.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
