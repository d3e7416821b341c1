"""gpt-oss, MLX, GGUF, ModelOpt's stacks, FP8 and mixtures: bytes by the published rules, refusals, round trips."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from exchange_cases import F8, assert_same, assert_same_arrays, tensor
from numpy.testing import assert_array_equal

import ifjax
from ifjax import exchange

E8 = np.dtype(ml_dtypes.float8_e8m0fnu)


def stack(fmt, shape=(3, 4, 64), axis=-1, amax=None, **settings):
    amax = np.arange(1, 1 + shape[0], dtype=np.float32) if amax is None else amax
    q = tensor(fmt, shape, axis, **settings)
    return q.replaced(amax=jnp.asarray(amax, jnp.float32)) if q.amax is not None else q


# --- gpt-oss


@pytest.mark.parametrize("axis", [-1, -2])
def test_gpt_oss_stacks(axis):
    q = stack("mxfp4", (3, 4, 64) if axis == -1 else (3, 64, 4), axis)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    arrays, config = exchange.export_tensors({name: q, f"{name}_bias": np.ones((3, 4)), "head.weight": np.ones((2, 2))},
                                             "gpt-oss")  # fmt: skip
    assert list(arrays) == [f"{name}_blocks", f"{name}_scales", f"{name}_bias", "head.weight"]
    turned = np.moveaxis(np.asarray(q.codes), axis, -1)
    assert arrays[f"{name}_blocks"].shape == (3, 4, 2, 16) and arrays[f"{name}_scales"].shape == (3, 4, 2)
    assert arrays[f"{name}_blocks"].tobytes() == np.ascontiguousarray(turned).tobytes()
    assert config == {"quant_method": "mxfp4", "modules_to_not_convert": ["head"]}
    for tool in (None, "gpt-oss", config):
        assert_same(exchange.import_tensors(arrays, tool, axis=axis)[name], q)


# --- MLX


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("shape", [(4, 64), (3, 4, 64)])
def test_mlx_words_and_scales(fmt, shape):
    q = tensor(fmt, shape, amax=2688.0)
    arrays, config = exchange.export_tensors({"up.weight": q}, "mlx")
    words = arrays["up.weight"]
    assert words.dtype == np.uint32 and words.shape == (*shape[:-1], 8)
    # The first code is in the lowest bits of a word.
    codes = np.stack([words >> 4 * i & 15 for i in range(8)], -1).reshape(shape)
    assert_array_equal(codes, q.unpacked_codes())
    assert arrays["up.scales"].dtype == np.uint8
    assert_array_equal(arrays["up.scales"], q.scales)
    assert config == {"group_size": q.fmt.block, "bits": 4, "mode": fmt}
    for tool in (None, "mlx", config):
        assert_same(exchange.import_tensors(arrays, tool)["up.weight"], q)


def test_mlx_has_no_factor():
    with pytest.raises(ValueError, match=r"up\.weight: mlx nvfp4 has no factor .* quantize with amax=2688"):
        exchange.export_tensors({"up.weight": tensor("nvfp4")}, "mlx")
    q = ifjax.quantize(jnp.ones((4, 32)), "nvfp4", amax=2688.0)
    back = exchange.import_tensors(exchange.export_tensor(q, "mlx"))["weight"]
    assert_array_equal(back.dequantize(), q.dequantize())


def test_mlx_layers_of_two_modes(tmp_path):
    params = {"a.weight": tensor("mxfp4"), "b.weight": tensor("nvfp4", amax=2688.0), "n.weight": np.ones(3)}
    exchange.save(params, tmp_path / "m", "mlx", config={"model_type": "llama"})
    import json

    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    assert config["quantization"]["b"] == {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    back = exchange.load(tmp_path / "m")
    for name, q in params.items():
        assert_same(back[name], q)


def test_mlx_affine_and_mxfp8_are_not_read():
    affine = {"w.weight": np.zeros((4, 8), np.uint32), "w.scales": np.ones((4, 1), np.float16)}
    affine["w.biases"] = affine["w.scales"]
    with pytest.raises(ValueError, match="scales is F16, and nvfp4 has U8"):
        exchange.import_tensors(affine, "mlx")
    with pytest.raises(ValueError, match="do not make blocks of"):
        exchange.import_tensors({"weight": np.zeros((4, 16), np.uint32), "scales": np.ones((4, 2), np.uint8)}, "mlx")


# --- GGUF


def gguf_values(array, scales, half):
    """As the file defines it, in float64: rows of (scales, groups of bytes: first half low, second half high)."""
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    blocks = array.reshape(-1, scales * (1 + half))
    d = blocks[:, :scales]
    d = d.view(F8).astype(np.float64) if scales == 4 else d.view(E8).astype(np.float64)
    groups = blocks[:, scales:].reshape(-1, scales, half)
    codes = np.concatenate([groups & 15, groups >> 4], -1)
    return (values[codes] * d[..., None]).reshape(*array.shape[:-1], -1)


@pytest.mark.parametrize("shape", [(4, 128), (3, 4, 128)])
@pytest.mark.parametrize("fmt, scales, half", [("nvfp4", 4, 8), ("mxfp4", 1, 16)])
def test_gguf_rows_of_blocks(fmt, scales, half, shape):
    q = stack(fmt, shape) if len(shape) > 2 else tensor(fmt, shape)
    arrays = exchange.export_tensor(q, "gguf")
    packed = arrays["weight"]
    assert packed.dtype == np.uint8 and packed.shape == (*shape[:-1], 128 // 64 * 36 if fmt == "nvfp4" else 4 * 17)
    values = gguf_values(packed, scales, half)
    if fmt == "nvfp4":
        factors = np.asarray(q.amax).reshape(-1) / np.float32(2688)
        assert_array_equal(arrays["scale"], factors)
        values = values * factors.reshape(-1, 1, 1) if len(shape) > 2 else values * factors
    np.testing.assert_allclose(values, q.dequantize(), rtol=2.0**-22)


def test_gguf_refuses_rows_that_do_not_fit():
    with pytest.raises(ValueError, match="GGUF's NVFP4 blocks have 64 values, and rows have 80"):
        exchange.export_tensor(tensor("nvfp4", (4, 80)), "gguf")
    for fmt in ("if4", "if3", "nvint4"):
        described = jax.eval_shape(lambda x, fmt=fmt: ifjax.quantize(x, fmt), jax.ShapeDtypeStruct((4, 64), "float32"))
        with pytest.raises(ValueError, match=f"{fmt} "):
            exchange.export_tensor(described, "gguf")


# --- ModelOpt's stacks


def test_modelopt_stacks_lie_turned_around():
    name = "model.layers.0.feed_forward.experts.gate_up_proj"
    q = stack("nvfp4", (3, 64, 4), -2, amax=2.5)
    arrays, config = exchange.export_tensors({name: q}, "modelopt")
    assert {n: a.shape for n, a in arrays.items()} == {
        name: (3, 32, 4), f"{name}_weight_scale": (3, 4, 4), f"{name}_weight_scale_2": ()
    }  # fmt: skip
    assert_array_equal(arrays[name], q.codes)  # as they lie here, too
    assert_array_equal(arrays[f"{name}_weight_scale"].view(np.uint8), q.scales)
    assert_same(exchange.import_tensors(arrays, config, axis=-2)[name], q)


def test_modelopt_stacks_have_one_factor():
    q = stack("nvfp4")
    with pytest.raises(ValueError, match="one factor for a stack, and this one has 3 different amax: quantize"):
        exchange.export_tensors({"experts.up": q}, "modelopt")
    with pytest.raises(ValueError, match=r"'up\.weight' must not end with"):
        exchange.export_tensors({"up.weight": stack("nvfp4", amax=1.0)}, "modelopt")


# --- FP8


RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(200, 300)).astype(F8)


@pytest.mark.parametrize(
    "tool, names, scale, expected",
    [
        ("fp8", "weight_scale_inv", RNG.random((2, 3), np.float32), lambda s: s.repeat(128, 0).repeat(128, 1)),
        ("fp8", "weight_scale_inv", RNG.random((4, 5), np.float32), lambda s: s.repeat(64, 0).repeat(64, 1)),
        ("fp8", "weight_scale_inv", RNG.random((2, 3), np.float32).astype(ml_dtypes.bfloat16),
         lambda s: s.astype(np.float32).repeat(128, 0).repeat(128, 1)),
        ("fp8", "scale", RNG.integers(120, 134, (2, 3), np.uint8).view(E8),
         lambda s: s.astype(np.float32).repeat(128, 0).repeat(128, 1)),
        ("compressed-tensors", "weight_scale", RNG.random((200, 1), np.float32), lambda s: s),
        ("compressed-tensors", "weight_scale", RNG.random(200, np.float32), lambda s: s[:, None]),
        ("compressed-tensors", "weight_scale", RNG.random(1, np.float32), lambda s: s),
        ("modelopt", "weight_scale", np.float32(0.37), lambda s: s),
        ("compressed-tensors", "weight_scale", RNG.integers(120, 134, (200, 10), np.uint8),
         lambda s: s.view(E8).astype(np.float32).repeat(32, 1)),
    ],
)  # fmt: skip
def test_fp8_is_kept_or_decoded(tool, names, scale, expected):
    arrays = {"up.weight": WEIGHT, f"up.{names}": scale, "up.bias": np.ones(3)}
    kept = exchange.import_tensors(arrays, tool)
    assert_same_arrays(kept, {name: np.asarray(a) for name, a in arrays.items()})
    decoded = exchange.import_tensors(arrays, tool, decode=True)
    assert list(decoded) == ["up.weight", "up.bias"]
    factors = np.broadcast_to(expected(np.asarray(scale)), np.broadcast_shapes(WEIGHT.shape, (1, 1))) if (
        np.ndim(expected(np.asarray(scale))) < 2) else expected(np.asarray(scale))[:200, :300]  # fmt: skip
    assert_array_equal(decoded["up.weight"], WEIGHT.astype(np.float32) * factors)
    turned = exchange.import_tensors(arrays, tool, decode=True, axis=-2, dtype=jnp.bfloat16)["up.weight"]
    assert_array_equal(turned, decoded["up.weight"].T.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("scale", [(3,), (3, 1), (3, 1, 1), (3, 2, 3), (3, 200, 1), (1,), ()])
def test_fp8_stacks(scale):
    weight, factors = RNG.normal(size=(3, 200, 300)).astype(F8), RNG.random(scale, np.float32)
    arrays = {"e.weight": weight, "e.weight_scale_inv": factors}
    decoded = exchange.import_tensors(arrays, "fp8", decode=True)["e.weight"]
    full = np.asarray(factors).reshape(scale + (1,) * (3 - len(scale))) if np.size(factors) > 1 else factors
    if scale == (3, 2, 3):
        full = full.repeat(128, 1).repeat(128, 2)[:, :200, :300]
    assert_array_equal(decoded, weight.astype(np.float32) * full)


def test_rows_of_fp8_are_those_of_the_whole():
    from ifjax.exchange.floats import read_fp8

    weight, factors = RNG.normal(size=(3, 200, 300)).astype(F8), RNG.random((3, 2, 3), np.float32)
    floats = read_fp8(None, weight, factors)
    whole = floats.rows(0, 600)
    for first, last in ((0, 1), (127, 129), (199, 201), (300, 600)):
        assert_array_equal(floats.rows(first, last), whole[first:last])


@pytest.mark.parametrize("shape", [(9, 3), (2, 3, 1), (0, 3)])
def test_fp8_scales_of_no_blocks_are_refused(shape):
    with pytest.raises(ValueError, match="do not make factors of rows or blocks"):
        exchange.import_tensors({"weight": WEIGHT, "weight_scale_inv": np.ones(shape, np.float32)}, "fp8")


# --- mixtures


def mixture(tool):
    scale = np.float32(0.5) if tool == "modelopt" else RNG.random((200, 1), np.float32)
    return {"a.weight": tensor("nvfp4"), "f.weight": WEIGHT, "f.weight_scale": np.asarray(scale),
            "c.weight": np.ones((2, 3), ml_dtypes.bfloat16)}  # fmt: skip


@pytest.mark.parametrize("tool", ["compressed-tensors", "modelopt"])
def test_nvfp4_beside_fp8_beside_bfloat16(tool):
    params = mixture(tool)
    arrays, config = exchange.export_tensors(params, tool)
    groups = config["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["a"], ["f"]]
    assert config["ignore"] == ["c"]
    if tool == "modelopt":
        assert config["quant_algo"] == "MIXED_PRECISION"
        assert {n: s["quant_algo"] for n, s in config["quantized_layers"].items()} == {"a": "W4A16_NVFP4", "f": "FP8"}
    else:
        assert config["format"] == "mixed-precision"
        assert [g["format"] for g in groups.values()] == ["nvfp4-pack-quantized", "naive-quantized"]
        assert groups["group_1"]["weights"]["strategy"] == "channel"
    kept = exchange.import_tensors(arrays, config)
    assert_same(kept["a.weight"], params["a.weight"].replaced(amax=kept["a.weight"].amax))
    assert kept["f.weight"].dtype == F8 and kept["f.weight_scale"].dtype == np.float32
    decoded = exchange.import_tensors(arrays, config, decode=True)
    assert_array_equal(decoded["f.weight"], WEIGHT.astype(np.float32) * params["f.weight_scale"])
    assert "f.weight_scale" not in decoded and decoded["c.weight"].dtype == ml_dtypes.bfloat16


def test_nvfp4_beside_mxfp4():
    params = {"a.weight": tensor("nvfp4"), "b.weight": tensor("mxfp4")}
    arrays, config = exchange.export_tensors(params, "compressed-tensors")
    assert config["format"] == "mixed-precision"
    back = exchange.import_tensors(arrays, config)
    assert [back[name].fmt.name for name in params] == ["nvfp4", "mxfp4"]


# --- bytes that tools disagree on


@pytest.mark.parametrize("tool", ["compressed-tensors", "modelopt"])
def test_nan_over_a_block_of_zeros_is_zero(tool):
    """0 / 0 of the tool that wrote it; over other values NaN is refused."""
    q = tensor("nvfp4", (2, 32), scales=[[0x38, 0x7F], [0x38, 0x38]])
    codes = np.array(q.codes)
    codes[0, 8:] = [0x00, 0x80, 0x08, 0x88, 0, 0, 0, 0]
    good = q.replaced(codes=jnp.asarray(codes), scales=jnp.full((2, 2), 0x38, jnp.uint8))
    arrays = exchange.export_tensor(good, tool)
    arrays["weight_scale"] = np.array([[0x38, 0x7F], [0x38, 0x38]], np.uint8).view(F8)
    (back,) = exchange.import_tensors(arrays, tool).values()
    assert_array_equal(back.scales, [[0x38, 0], [0x38, 0x38]])
    assert not np.asarray(back.dequantize())[0, 16:].any()
    arrays[next(iter(arrays))] = np.asarray(q.codes)
    with pytest.raises(ValueError, match="1 of 4 block scales are NaN"):
        exchange.import_tensors(arrays, tool)


def test_every_weight_of_two_axes_or_more_is_ignored():
    plain = {"conv.weight": np.ones((2, 3, 5)), "patch.weight": np.ones((2, 3, 4, 4)), "n.weight": np.ones(3)}
    plain |= {"emb.embedding": np.ones((2, 2)), "a.bias": np.ones(3)}
    _, config = exchange.export_tensors({"up.weight": tensor("nvfp4")} | plain, "compressed-tensors")
    assert config["ignore"] == ["conv", "emb", "patch"]


# --- layers that servers multiply as one


def test_fused_layers_of_several_amax_are_told():
    params = {f"l.self_attn.{n}_proj.weight": tensor("nvfp4", amax=a) for n, a in (("q", 1.0), ("k", 2.0), ("v", 3.0))}
    with pytest.warns(UserWarning, match=r"q_proj.weight, l\.self_attn\.k_proj.*have different amax"):
        exchange.export_tensors(params, "modelopt")
    one = exchange.common_amax(params)
    assert [float(q.amax) for q in one.values()] == [3.0] * 3
    exchange.export_tensors(one, "modelopt")  # without a warning
    assert_same(one["l.self_attn.v_proj.weight"], params["l.self_attn.v_proj.weight"])


def test_a_common_amax_costs_at_most_a_rounding_of_the_scales():
    rng = np.random.default_rng(0)
    weights = {"gate_proj.weight": rng.normal(size=(8, 64)), "up_proj.weight": 3 * rng.normal(size=(8, 64))}
    params = {name: ifjax.quantize(jnp.asarray(w, jnp.float32), "nvfp4") for name, w in weights.items()}
    for names in (None, [list(params)]):
        one = exchange.common_amax(params | {"b.bias": np.ones(3)}, names)
        assert one["b.bias"].shape == (3,)
        for name, q in params.items():
            error = np.abs(np.asarray(one[name].dequantize()) - np.asarray(q.dequantize())).max()
            assert error <= np.abs(weights[name]).max() * 0.3


@pytest.mark.parametrize(
    "names, groups",
    [
        (["a.q_proj.weight", "a.v_proj.weight", "b.k_proj.weight", "a.o_proj.weight"],
         [("a.q_proj.weight", "a.v_proj.weight")]),
        (["0.query.kernel", "0.key.kernel"], [("0.query.kernel", "0.key.kernel")]),
        (["m/gate_proj/kernel", "m/up_proj/kernel"], [("m/gate_proj/kernel", "m/up_proj/kernel")]),
        (["experts.0.w1.weight", "experts.0.w2.weight", "experts.0.w3.weight", "experts.1.w1.weight"],
         [("experts.0.w1.weight", "experts.0.w3.weight")]),
        (["experts.gate_proj", "experts.up_proj"], [("experts.gate_proj", "experts.up_proj")]),
        (["q_proj.weight", "q_proj.bias", "x", ""], []),
    ],
)  # fmt: skip
def test_which_layers_are_fused(names, groups):
    assert exchange.fused_groups(names) == groups


def test_common_amax_refuses_what_it_cannot_join():
    params = {"a": tensor("nvfp4"), "b": tensor("fouroversix"), "c": np.ones(3)}
    with pytest.raises(ValueError, match="several formats"):
        exchange.common_amax(params, [["a", "b"]])
    with pytest.raises(ValueError, match=r"\['c'\] are no QTensors"):
        exchange.common_amax(params, [["a", "c"]])
