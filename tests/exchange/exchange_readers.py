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


def mlx(folder):
    """By mlx.core's own dequantize, in float32."""
    import mlx.core as mx

    settings = json.loads((folder / "config.json").read_text())["quantization"]
    tensors = mx.load(str(folder / "model.safetensors"))
    for name in tensors:
        if name.endswith(".scales"):
            module = name.removesuffix(".scales")
            how = settings.get(module, settings)
            how = {"group_size": how["group_size"], "bits": how["bits"], "mode": how["mode"]}
            value = mx.dequantize(tensors[f"{module}.weight"], tensors[name], dtype=mx.float32, **how)
            yield f"{module}.float32", np.array(value)


def write_mlx(folder):
    """Matrices as MLX quantizes and stores them, in both modes."""
    import mlx.core as mx

    tensors, config = {}, {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    for module, weight in weights():
        for mode in ("nvfp4", "mxfp4"):
            words, scales = mx.quantize(mx.array(weight.numpy()), mode=mode)
            tensors |= {f"{module}.{mode}.weight": words, f"{module}.{mode}.scales": scales}
            config[f"{module}.{mode}"] = {"group_size": 16 if mode == "nvfp4" else 32, "bits": 4, "mode": mode}
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps({"quantization": config, "quantization_config": config}))
    yield from mlx(folder)


def gguf(folder):
    """By the gguf package's own dequantize, with the factor that stands beside."""
    import gguf as package

    tensors = {t.name: t for t in package.GGUFReader(folder / "model.gguf").tensors}
    for name, t in tensors.items():
        if t.tensor_type.name in ("NVFP4", "MXFP4"):
            module = name.removesuffix(".weight")
            value = package.quants.dequantize(t.data, t.tensor_type)
            yield f"{module}.blocks", np.array(t.data)
            if f"{module}.scale" in tensors:
                factor = np.array(tensors[f"{module}.scale"].data)
                value = value * factor.reshape(-1, *[1] * (value.ndim - 1))
            yield f"{module}.float32", value.astype(np.float32).reshape(*t.data.shape[:-1], -1)
        else:
            yield name, np.array(t.data)


def write_gguf(folder):
    """Matrices as the gguf package quantizes them: MXFP4, a float type, and Q8_0, which has no format here."""
    import gguf as package

    folder.mkdir()
    writer = package.GGUFWriter(folder / "model.gguf", "llama")
    for module, weight in weights():
        for kind in ("MXFP4", "Q8_0"):
            of_kind = package.GGMLQuantizationType[kind]
            writer.add_tensor(f"{module}.{kind}.weight", package.quants.quantize(weight.numpy(), of_kind),
                              raw_dtype=of_kind)  # fmt: skip
    writer.add_tensor("norm.weight", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, t in ((t.name, t) for t in package.GGUFReader(folder / "model.gguf").tensors):
        yield f"{name.removesuffix('.weight')}.float32", package.quants.dequantize(t.data, t.tensor_type)


def gpt_oss(folder):
    """By transformers' own function for the experts of gpt-oss: bfloat16, [experts, in, out]."""
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors, config = opened(folder)
    assert config["quant_method"] == "mxfp4"
    for name in tensors:
        if name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            parts = tensors[name], tensors[f"{stem}_scales"]
            yield f"{stem}.float32", convert_moe_packed_tensors(*parts, dtype=torch.float32)


def fp8(folder):
    """FP8 weights as compressed-tensors decompresses them, by each scheme of the configuration."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    tensors, config = opened(folder)
    config = QuantizationConfig.model_validate(config)
    for scheme in config.config_groups.values():
        if scheme.weights.num_bits == 8:
            compressor = BaseCompressor.get_value_from_registry(scheme.format)
            for module, parts in modules(tensors, "weight_scale"):
                if module in scheme.targets:
                    state = {key: value.float() if key == "weight_scale" else value for key, value in parts.items()}
                    assert state["weight"].dtype == torch.float8_e4m3fn
                    yield f"{module}.float32", compressor.decompress(state, scheme)["weight"].float()


def write_fp8(folder):
    """A mixed model as compressed-tensors quantizes it: FP8 by tensor, channel and block, NVFP4, and plain bfloat16."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    tensors, groups, generator = {}, {}, torch.Generator().manual_seed(1)
    for strategy in ("tensor", "channel", "block"):
        structure = {"block_structure": [128, 128]} if strategy == "block" else {}
        args = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy=strategy, **structure)
        scheme = QuantizationScheme(targets=[f"m.{strategy}"], weights=args, format="naive-quantized")
        weight = torch.randn((200, 300), generator=generator)
        blocks = {"tensor": (200, 300), "channel": (1, 300), "block": (128, 128)}[strategy]
        padded = torch.nn.functional.pad(weight, (0, -300 % blocks[1], 0, -200 % blocks[0]))
        scale = padded.unfold(0, blocks[0], blocks[0]).unfold(1, blocks[1], blocks[1]).abs().amax((-1, -2)) / 448
        scale = scale.reshape(1) if strategy == "tensor" else scale
        compressor = BaseCompressor.get_value_from_registry("naive-quantized")
        parts = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        tensors |= {f"m.{strategy}.{key}": value for key, value in parts.items()}
        groups[f"g_{strategy}"] = scheme
    tensors["head.weight"] = torch.randn((4, 8), generator=generator).bfloat16()
    config = QuantizationConfig(config_groups=groups, format="mixed-precision", quantization_status="compressed")
    written(folder, tensors, config.model_dump(mode="json"))
    yield from fp8(folder)


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
        mlx,
        write_mlx,
        gguf,
        write_gguf,
        gpt_oss,
        fp8,
        write_fp8,
    )
}


def main(name, folder, result):
    import torch

    with torch.no_grad():
        arrays = dict(NAMED[name](Path(folder)))
    torches = {key: value for key, value in arrays.items() if isinstance(value, torch.Tensor)}
    arrays |= {key: value.float() if value.dtype == torch.bfloat16 else value for key, value in torches.items()}
    arrays |= {key: arrays[key].detach().numpy() for key in torches}
    np.savez(result, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
