"""The tools' own readers on files of ours, and their files for us. Each runs in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from exchange_cases import E2M1_VALUES, tensor
from numpy.testing import assert_array_equal

import ifjax
from ifjax import exchange

READERS = Path(__file__).with_name("exchange_readers.py")


def needs(*packages):
    """Marks a test that runs these packages, apart from torch and compressed-tensors, which all of them run."""
    missing = [name for name in ("torch", "compressed_tensors", *packages) if importlib.util.find_spec(name) is None]
    reason = f"needs {', '.join(missing)}: pip install 'ifjax[exchange]'"
    return [pytest.mark.exchange, pytest.mark.skipif(bool(missing), reason=reason)]


def run(name, folder):
    """The arrays that a tool's own code makes of a folder, by name. In its own process, without jax."""
    result = folder.with_name(f"{folder.name}-{name}.npz")
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, READERS, name, folder, result]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return np.load(result)


def ulps_apart(a, b):
    """How many float32 numbers lie between, zeros of both signs being one."""
    places = [np.asarray(x, np.float32).view(np.int32).astype(np.int64) for x in (a, b)]
    ours, theirs = (np.where(p < 0, -(p & 0x7FFFFFFF), p) for p in places)
    return np.abs(ours - theirs)


def every_byte(fmt, axis, amax, headroom=1.0):
    """Each byte of codes under each scale that has a meaning, in values that are normal numbers."""
    scales = np.arange(2, 253) if fmt == "mxfp4" else np.arange(0x7F)
    q = tensor(fmt, (len(scales), 512), amax=amax, scales=scales[:, None], headroom=headroom)
    q = q.replaced(codes=jnp.asarray(np.tile(np.arange(256, dtype=np.uint8), (len(scales), 1))))
    return q if axis == -1 else q.replaced(codes=q.codes.T, scales=q.scales.T, axis=-2)


def models(kind):
    """QTensors of every kind that has this layout, and one that was really quantized."""
    if kind == "mxfp4":
        return {f"l{-axis}.weight": every_byte(kind, axis, None) for axis in (-1, -2)}
    rng, params = np.random.default_rng(0), {}
    for i, amax in enumerate(rng.lognormal(0, 6, 12).astype(np.float32)):
        fmt = ("nvfp4", "fouroversix", "nvfp4_static4")[i % 3]
        params[f"{fmt}{i}.kernel"] = every_byte(fmt, -1 - i % 2, amax, (1, 16 / 17)[i % 4 == 3])
    params["normal.kernel"] = ifjax.quantize(jnp.asarray(rng.normal(size=(64, 24)).astype(np.float32)), "nvfp4", axis=0)
    return params


def stored_way_round(q, array):
    return np.asarray(array) if q.axis == -1 else np.asarray(array).T


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize(
    "reader, tool",
    [
        pytest.param("compressed_tensors", "compressed-tensors", marks=needs()),
        pytest.param("torchao", "modelopt", marks=needs("torchao")),
        pytest.param("modelopt", "modelopt", marks=needs("modelopt", "requests")),
    ],
)
def test_the_tools_read_our_codes_and_scales_and_decode_our_values(tmp_path, reader, tool, kind):
    """Elements and scale bytes exactly, values within 2 float32 units in the last place; MXFP4 exactly."""
    params = models(kind)
    exchange.save(params, tmp_path / "model", tool)
    read = run(reader, tmp_path / "model")
    for name, q in params.items():
        module = name.rpartition(".")[0]
        codes, scales = (stored_way_round(q, a) for a in (q.unpacked_codes(), q.scales))
        if f"{module}.elements" in read:
            elements = read[f"{module}.elements"]
            assert_array_equal(elements, E2M1_VALUES[codes])
            assert_array_equal(np.signbit(elements), codes >= 8)
            assert_array_equal(read[f"{module}.scale_bytes"], scales)
        ours = stored_way_round(q, q.dequantize(jnp.float32))
        assert ulps_apart(read[f"{module}.float32"], ours).max() <= (0 if kind == "mxfp4" else 2), name
        if f"{module}.bfloat16" in read:  # the same, rounded: 2^-9, and what 2 units add to it
            np.testing.assert_allclose(read[f"{module}.bfloat16"], ours, rtol=2.0**-8)


@pytest.mark.parametrize("converter", [pytest.param("converter", marks=needs())])
def test_modelopts_names_convert_to_our_compressed_tensors(tmp_path, converter):
    """By compressed-tensors' own converter, whose 1 / weight_scale_2 is rounded once more than K / amax."""
    params = models("nvfp4")
    exchange.save(params, tmp_path / "model", "modelopt")
    converted = run(converter, tmp_path / "model")
    arrays, _ = exchange.export_tensors(params, "compressed-tensors")
    assert set(converted.files) == arrays.keys()
    for name, array in arrays.items():
        if name.endswith("weight_global_scale"):
            assert ulps_apart(converted[name], array).max() <= 2
        else:
            assert_array_equal(converted[name], array.view(np.uint8))


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 32,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
LINEARS = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (64, 64), "self_attn.v_proj": (64, 64),
    "self_attn.o_proj": (64, 64), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96),
}  # fmt: skip


@pytest.mark.parametrize("fmt", [pytest.param(name, marks=needs("transformers")) for name in ("fouroversix", "mxfp4")])
def test_transformers_loads_a_whole_model_of_ours(tmp_path, fmt):
    """By config.json alone: which layers are quantized, how, and what is left as it is."""
    rng = np.random.default_rng(0)
    dense = {"model.embed_tokens.weight": (32, 64), "lm_head.weight": (32, 64)}
    params = {name: rng.normal(size=shape).astype(ml_dtypes.bfloat16) for name, shape in dense.items()}
    for name in ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"):
        params[f"{name}.weight"] = np.ones(64, ml_dtypes.bfloat16)
    for i, (name, shape) in enumerate(LINEARS.items()):
        amax = 0.1 + (i > 2) + (i > 5)  # one for each of the groups that servers multiply as one
        params[f"model.layers.0.{name}.weight"] = tensor(fmt, shape, amax=amax, seed=i)
    exchange.save(params, tmp_path / "model", "compressed-tensors", config=LLAMA)
    read = run("transformers", tmp_path / "model")
    assert params.keys() <= set(read.files) and np.isfinite(read["logits"]).all()
    for name, value in params.items():
        if isinstance(value, ifjax.QTensor):
            # Rounded to bfloat16 from what differs in the last bits of float32: nowhere by more than one of its steps.
            np.testing.assert_allclose(read[name], value.dequantize(), rtol=0 if fmt == "mxfp4" else 2.0**-8)
        else:
            assert_array_equal(read[name], value.astype(np.float32))


@pytest.mark.parametrize(
    "writer",
    [
        pytest.param("write_nvfp4", marks=needs()),
        pytest.param("write_mxfp4", marks=needs()),
        pytest.param("write_modelopt", marks=needs("modelopt", "requests")),
    ],
)
def test_what_the_tools_write_comes_in(tmp_path, writer):
    """Their bytes, the values that they decode, and the same bytes out again but for the last bit of some factors."""
    folder = tmp_path / "theirs"
    read = run(writer, folder)
    model = exchange.load(folder)
    assert len(model) >= 3 and all(isinstance(q, ifjax.QTensor) for q in model.values())
    for name, q in model.items():
        theirs = read[f"{name.removesuffix('.weight')}.float32"]
        assert ulps_apart(q.dequantize(), theirs).max() <= (0 if writer == "write_mxfp4" else 2), name
    tool = "modelopt" if writer == "write_modelopt" else "compressed-tensors"
    again, config = exchange.export_tensors(model, tool)
    from safetensors import deserialize

    stored = dict(deserialize((folder / "model.safetensors").read_bytes()))
    assert stored.keys() == again.keys()
    for name, array in again.items():
        data = np.frombuffer(bytes(stored[name]["data"]), array.dtype).reshape(stored[name]["shape"])
        assert data.shape == array.shape
        if name.endswith("weight_global_scale"):  # torch multiplies by 1 / amax: not all of that is some K / amax
            assert ulps_apart(data, array).max() <= 1
        else:
            assert data.tobytes() == array.tobytes(), name
    assert_within(config, json.loads((folder / "config.json").read_text())["quantization_config"])


def assert_within(ours, theirs):
    """Every field of ours is in theirs, with the same value."""
    for name, value in ours.items():
        if isinstance(value, dict):
            assert_within(value, theirs[name])
        else:
            assert theirs[name] == value, name


# --- MLX, GGUF, gpt-oss, FP8


def all_bytes(fmt):
    """Each byte of codes under each scale byte that a tool and we agree on."""
    return every_byte(fmt, -1, 2688.0 if fmt == "nvfp4" else None)


def stacked(*qs):
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *qs)


@pytest.mark.parametrize("name", [pytest.param("mlx", marks=needs("mlx"))])
def test_mlx_decodes_our_values(tmp_path, name):
    params = {f"{fmt}.weight": all_bytes(fmt) for fmt in ("nvfp4", "mxfp4")}
    params["stack.weight"] = stacked(*(tensor("nvfp4", amax=2688.0, seed=i) for i in range(3)))
    exchange.save(params, tmp_path / "model", "mlx")
    read = run(name, tmp_path / "model")
    for name, q in params.items():
        theirs, ours = read[f"{name.removesuffix('.weight')}.float32"], np.asarray(q.dequantize())
        assert_array_equal(theirs, ours)


@pytest.mark.parametrize("writer", [pytest.param("write_mlx", marks=needs("mlx"))])
def test_what_mlx_writes_comes_in_and_goes_out(tmp_path, writer):
    read = run(writer, tmp_path / "theirs")
    model = exchange.load(tmp_path / "theirs")
    for name, q in model.items():
        assert_array_equal(read[f"{name.removesuffix('.weight')}.float32"], q.dequantize())
    exchange.save(model, tmp_path / "ours", "mlx")
    assert stored_bytes(tmp_path / "ours") == stored_bytes(tmp_path / "theirs")


def stored_bytes(folder):
    from safetensors import deserialize

    return {name: (a["dtype"], a["shape"], bytes(a["data"]))
            for name, a in deserialize((folder / "model.safetensors").read_bytes())}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param("gguf", marks=needs("gguf"))])
def test_gguf_decodes_our_values(tmp_path, name):
    """Every code under every scale byte; with a factor, within a unit in the last place."""
    params = {f"{fmt}.weight": all_bytes(fmt) for fmt in ("nvfp4", "mxfp4")}
    params["factor.weight"] = every_byte("fouroversix", -1, 0.37)
    params["stack.weight"] = stacked(*(tensor("nvfp4", amax=0.1 + i, seed=i) for i in range(3)))
    plain = {"half.weight": np.ones((2, 3), np.float16), "brain.weight": np.ones((2, 3), ml_dtypes.bfloat16)}
    exchange.save(params | plain, tmp_path / "model", "gguf")
    assert os.listdir(tmp_path / "model") == ["model.gguf"]
    read = run(name, tmp_path / "model")
    for name, q in params.items():
        ours = np.asarray(q.dequantize())
        apart = ulps_apart(read[f"{name.removesuffix('.weight')}.float32"], ours).max()
        assert apart <= (0 if name in ("nvfp4.weight", "mxfp4.weight") else 2), name
    back = exchange.load(tmp_path / "model")
    for name, q in params.items():
        assert_array_equal(back[name].codes, q.codes)
        assert_array_equal(back[name].scales, q.scales)
    for name, array in plain.items():
        assert back[name].dtype == array.dtype and back[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("writer", [pytest.param("write_gguf", marks=needs("gguf"))])
def test_what_gguf_writes_comes_in(tmp_path, writer):
    """The block types that we have no format for are refused, or decoded where that is asked for."""
    read = run(writer, tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"Q8_0\.weight is Q8_0, which has no format here: decode=True"):
        exchange.load(tmp_path / "theirs")
    model = exchange.load(tmp_path / "theirs", decode=True)
    assert isinstance(model["layers.0.MXFP4.weight"], ifjax.QTensor)
    for name, q in model.items():
        ours = q.dequantize() if isinstance(q, ifjax.QTensor) else q
        assert_array_equal(read[f"{name.removesuffix('.weight')}.float32"], ours)


@pytest.mark.parametrize("name", [pytest.param("gpt_oss", marks=needs("transformers"))])
def test_transformers_decodes_our_expert_stacks(tmp_path, name):
    q = stacked(*(all_bytes("mxfp4") for _ in range(2)))
    exchange.save({"experts.down_proj": q}, tmp_path / "model", "gpt-oss")
    read = run(name, tmp_path / "model")["experts.down_proj.float32"]
    assert_array_equal(read, np.asarray(q.dequantize()).swapaxes(-1, -2))


@pytest.mark.parametrize("writer", [pytest.param("write_fp8", marks=needs())])
def test_a_mixed_model_of_compressed_tensors_comes_in_and_goes_out(tmp_path, writer):
    """FP8 by tensor, by row and by block decodes to their values; kept, it goes out with the same bytes and words."""
    read = run(writer, tmp_path / "theirs")
    decoded = exchange.load(tmp_path / "theirs", decode=True)
    assert len(read.files) == 3
    for name in read.files:
        assert_array_equal(decoded[name.removesuffix(".float32") + ".weight"], read[name])
    kept = exchange.load(tmp_path / "theirs")
    exchange.save(kept | {"more.weight": tensor("nvfp4")}, tmp_path / "ours", "compressed-tensors")
    ours, theirs = stored_bytes(tmp_path / "ours"), stored_bytes(tmp_path / "theirs")
    assert {name: ours[name] for name in theirs} == theirs
    again = run("fp8", tmp_path / "ours")
    for name in read.files:
        assert_array_equal(again[name], read[name])
