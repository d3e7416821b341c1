"""The tools' own code on files of ours, and files of theirs for us: python exchange_readers.py NAME FOLDER RESULT.

A reader takes a folder with model.safetensors and config.json and gives arrays by name, which go to RESULT (.npz). A
writer makes such a folder and gives what it decodes to. Nothing here encodes or decodes anything by itself, and jax is
not imported.
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
            names = [key for key in tensors if key.startswith(module + ".")]
            yield module, {key.rpartition(".")[2]: tensors[key] for key in names}


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
        settings = {"args": scheme.weights, "global_scale": parts.get("weight_global_scale")}
        yield f"{module}.elements", codes
        yield f"{module}.scale_bytes", parts["weight_scale"].view(torch.uint8)
        yield f"{module}.float32", dequantize(codes, scale, dtype=torch.float32, **settings)
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


def transformers(folder):
    """The weights of a whole model, once its first call has decompressed them."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    yield "logits", model(torch.arange(8)[None]).logits
    yield from model.state_dict().items()


def weights():
    import torch

    generator = torch.Generator().manual_seed(0)
    for i, shape in enumerate([(24, 128), (1, 32), (130, 64)]):
        yield f"layers.{i}", torch.randn(shape, generator=generator) * 10.0 ** (i - 1)
    yield "zeros", torch.zeros(4, 32)


def written(folder, tensors, config):
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))


def write_compressed_tensors(folder, preset):
    """A model as compressed-tensors quantizes and stores it."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme = preset_name_to_scheme(preset, ["Linear"])
    algorithm = infer_module_format(torch.nn.Linear, scheme)
    compressor, tensors = BaseCompressor.get_value_from_registry(algorithm), {}
    for module, weight in weights():
        blocks = weight.unflatten(-1, (-1, scheme.weights.group_size))
        factor = generate_gparam(weight.min(), weight.max()) if scheme.weights.strategy == "tensor_group" else None
        scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale=factor)
        parts = {"weight": weight, "weight_scale": scale} | ({} if factor is None else {"weight_global_scale": factor})
        tensors |= {f"{module}.{part}": value for part, value in compressor.compress(parts, scheme).items()}
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=algorithm.value, quantization_status="compressed"
    )
    written(folder, tensors, config.model_dump(mode="json"))
    yield from compressed_tensors(folder)


def write_nvfp4(folder):
    yield from write_compressed_tensors(folder, "NVFP4A16")


def write_mxfp4(folder):
    yield from write_compressed_tensors(folder, "MXFP4A16")


def write_modelopt(folder):
    """Matrices as ModelOpt quantizes them, with the configuration that its export makes."""
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    tensors = {}
    for module, weight in weights():
        if weight.any():
            q, scale, factor = NVFP4QTensor.quantize(weight, 16)
            parts = {"weight": q._quantized_data, "weight_scale": scale, "weight_scale_2": factor}
            tensors |= {f"{module}.{part}": value for part, value in parts.items()}
    quantization = {"quant_algo": "W4A16_NVFP4", "group_size": 16, "exclude_modules": []}
    written(folder, tensors, convert_hf_quant_config_format({"quantization": quantization}))
    yield from modelopt(folder)


NAMED = {
    f.__name__: f
    for f in (
        compressed_tensors,
        torchao,
        modelopt,
        converter,
        transformers,
        write_nvfp4,
        write_mxfp4,
        write_modelopt,
    )
}


def main(name, folder, result):
    import torch

    with torch.no_grad():
        arrays = dict(NAMED[name](Path(folder)))
    arrays = {key: value.float() if value.dtype == torch.bfloat16 else value for key, value in arrays.items()}
    np.savez(result, **{key: value.detach().numpy() for key, value in arrays.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
