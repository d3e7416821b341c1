"""Files that are quantized already: no scale is taken for a weight, and FP8 is decoded where that is asked for."""

import json

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from safetensors.numpy import save_file

import ifjax
from ifjax import exchange
from ifjax.cli import main
from ifjax.convert import plan, quantize_file
from ifjax.files import FileError

F8 = np.dtype(ml_dtypes.float8_e4m3fn)
RNG = np.random.default_rng(0)


def floats(*shape, dtype=np.float32):
    return RNG.standard_normal(shape, np.float32).astype(dtype)


# Arrays of one layer, all of which have two axes or more and could be taken for weights.
FAMILIES = {
    "fp8 in blocks": {"weight": floats(256, 256, dtype=F8), "weight_scale_inv": floats(2, 2)},
    "fp8 in rows": {"weight": floats(64, 64, dtype=F8), "weight_scale": floats(64, 1)},
    "gptq": {
        "qweight": np.zeros((8, 64), np.int32), "qzeros": np.zeros((4, 8), np.int32),
        "scales": floats(4, 64, dtype=np.float16), "g_idx": np.zeros(64, np.int32),
    },
    "awq": {
        "qweight": np.zeros((64, 8), np.int32), "qzeros": np.zeros((4, 8), np.int32), "scales": floats(4, 64),
    },
    "mlx": {"weight": np.zeros((64, 8), np.uint32), "scales": floats(64, 4), "biases": floats(64, 4)},
    "compressed-tensors int4": {
        "weight_packed": np.zeros((64, 8), np.int32), "weight_scale": floats(64, 4),
        "weight_shape": np.array([64, 64]),
    },
    "quanto": {
        "weight._data": np.zeros((64, 64), np.int8), "weight._scale": floats(64, 1), "weight._shift": floats(64, 1),
    },
    "marlin": {"B": np.zeros((4, 128), np.int32), "s": floats(4, 64)},
    "vector codes": {"indices_of_vectors": np.zeros((8, 32), np.int16), "centroids.weight": floats(256, 8)},
    "flax": {"kernel/array/qvalue": np.zeros((64, 64), np.int8), "kernel/array/scale": floats(4, 64)},
    "unheard of, too": {"data": np.zeros((64, 64), np.int8), "unit": floats(64, 4)},
    "unheard of": {"w_int": np.zeros((64, 32), np.uint8), "group_scales": floats(64, 4), "group_zeros": floats(64, 4)},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_quantized_already_stays_to_the_byte(family, tmp_path):
    dot = "/" if any("/" in name for name in FAMILIES[family]) else "."
    layer = {f"layers{dot}0{dot}up{dot}{name}": array for name, array in FAMILIES[family].items()}
    save_file(layer | {"other.weight": floats(32, 64)}, tmp_path / "m.safetensors")
    report = quantize_file(tmp_path / "m.safetensors", tmp_path / "out.safetensors", "nvfp4", dtype="bfloat16")
    opened = ifjax.open_file(tmp_path / "out.safetensors")
    assert set(opened.packed) == {"other.weight"}
    for name, array in layer.items():
        assert opened[name].dtype == array.dtype and opened[name].tobytes() == array.tobytes()
    reasons = {entry.path: entry.reason or "" for entry in report.entries}
    matrices = [name for name, array in layer.items() if array.ndim > 1]
    assert all("quantized already" in reasons[name] for name in matrices), reasons


def test_masks_and_positions_beside_weights_are_no_codes(tmp_path):
    tensors = {"a.attn.mask": np.ones((64, 64), np.uint8), "a.attn.qkv": floats(64, 64),
               "b.position_ids": np.zeros((1, 64), np.int32), "b.proj": floats(64, 64),
               "c.codes": np.zeros((8, 8), np.uint8), "c.weight": floats(64, 64)}  # fmt: skip
    save_file(tensors, tmp_path / "m.safetensors")
    tasks = {task.stored.name: task.decision.weights for task in plan(tmp_path / "m.safetensors", "nvfp4").tasks}
    assert {name for name, how in tasks.items() if how is not None} == {"a.attn.qkv", "b.proj", "c.weight"}


@pytest.mark.parametrize("command", [["quantize", "out.safetensors"], ["compare", "--formats", "nvfp4"]], ids=str)
def test_a_configuration_that_says_more_than_the_file_is_refused(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file({"up.w": floats(64, 64), "up.w_of_groups": floats(64, 32)}, tmp_path / "model.safetensors")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"quantization_config": {"quant_method": "unheard of"}}))
    for source in (".", "model.safetensors"):
        assert main([command[0], source, *command[1:]]) == 1
        error = capsys.readouterr().err
        assert "says that it is quantized by 'unheard of'" in error and "remove quantization_config" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    config.write_text("{}")
    assert main([command[0], "model.safetensors", *command[1:]]) == 0


def test_a_rule_that_names_scales_changes_nothing(tmp_path):
    save_file({"up.weight": floats(64, 64, dtype=F8), "up.weight_scale": floats(64, 64)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="quantized already"):
        plan(tmp_path / "m.safetensors", ifjax.Rule("up/weight_scale", "nvfp4"))


@pytest.mark.parametrize("axis", [-1, -2])
def test_fp8_is_decoded_on_the_way_in(axis, tmp_path):
    layer = {"a.up.weight": floats(130, 272, dtype=F8), "a.up.weight_scale_inv": np.abs(floats(2, 3))}
    kept = {"a.norm.weight": floats(8), "lm_head.weight": floats(16, 32, dtype=F8),
            "lm_head.weight_scale_inv": np.abs(floats(1, 1))}  # fmt: skip
    save_file(layer | kept, tmp_path / "m.safetensors")
    report = quantize_file(tmp_path / "m.safetensors", tmp_path / "out.safetensors", "nvfp4", axis=axis, tool="fp8")
    opened = ifjax.open_file(tmp_path / "out.safetensors")
    assert set(opened) == {"a.up.weight", *kept}
    whole = exchange.import_tensors(layer, "fp8", decode=True)["a.up.weight"]
    expected = ifjax.quantize(whole, "nvfp4", axis=axis)
    assert_array_equal(opened["a.up.weight"].codes, expected.codes)
    assert_array_equal(opened["a.up.weight"].scales, expected.scales)
    assert opened["a.up.weight"].dtype == ml_dtypes.bfloat16
    for name, array in kept.items():
        assert opened[name].tobytes() == array.tobytes()
    entries = {entry.path: entry for entry in report.entries}
    assert entries["a.up.weight"].note == "decoded from fp8 weight_scale_inv"
    assert entries["a.up.weight"].bytes_before == 130 * 272 + 24


def test_fp8_from_the_command_line(tmp_path, capsys):
    layer = {"up.weight": floats(64, 64, dtype=F8), "up.weight_scale_inv": np.ones((1, 1), np.float32)}
    save_file(layer, tmp_path / "m.safetensors")
    out = str(tmp_path / "out.safetensors")
    assert main(["quantize", str(tmp_path / "m.safetensors"), out, "--source", "fp8", "--no-errors"]) == 0
    assert list(ifjax.open_file(out).packed) == ["up.weight"]
    assert main(["quantize", out.replace("out", "m"), out, "--source", "modelopt", "--force"]) == 1
    assert "weight_scale is missing beside it" in capsys.readouterr().err


def test_compare_takes_a_folder_and_measures_no_scales(tmp_path, capsys):
    layer = {f"up.{name}": array for name, array in FAMILIES["fp8 in blocks"].items()}
    save_file(layer, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"other.weight": floats(32, 64)}, tmp_path / "model-00002-of-00002.safetensors")
    files = dict.fromkeys(layer, "model-00001-of-00002.safetensors")
    files["other.weight"] = "model-00002-of-00002.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert main(["compare", str(tmp_path), "--formats", "nvfp4", "--json"]) == 0
    tensors = {t["name"]: t for t in json.loads(capsys.readouterr().out)["tensors"]}
    assert {name for name, t in tensors.items() if t["status"] == "quantized"} == {"other.weight"}
    assert "quantized already" in tensors["up.weight_scale_inv"]["reason"]


def test_every_command_reads_an_index_by_one_reader(tmp_path, capsys):
    """An entry that no shard holds is told by all of them, and a name that no rule is matched with, too."""
    save_file({"a.weight": floats(32, 64)}, tmp_path / "shard.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": "shard.safetensors", "b.weight": "shard.safetensors"}}))
    out = str(tmp_path / "out.safetensors")
    for command in (["compare", "--formats", "nvfp4"], ["inspect"], ["verify"], ["quantize", out], ["dequantize", out],
                    ["import", out], ["export", out, "--to", "modelopt"]):  # fmt: skip
        name, *rest = command
        assert main([name, str(index), *rest]) == 1
        assert "m.safetensors.index.json and its file shard.safetensors do not agree: the file lacks 'b.weight'" in (
            capsys.readouterr().err)  # fmt: skip
    with pytest.raises(FileError, match=r"lacks 'b\.weight'"):
        exchange.load(index)
    save_file({"n" * 3000 + ".weight": floats(32, 64)}, tmp_path / "long.safetensors")
    for command in (["compare", "--formats", "nvfp4"], ["quantize", out]):
        assert main([command[0], str(tmp_path / "long.safetensors"), *command[1:]]) == 1
        error = capsys.readouterr().err
        assert "a path of 3000 characters is matched by no rule" in error and len(error) < 500


def test_tensors_without_elements_are_kept_however_long_their_shape_is(tmp_path, capsys):
    """numpy has no array of such a shape, and an empty stack of experts is an ordinary tensor."""
    from ifjax.files.names import NameRule

    shapes = {"empty.weight": [0, 64, 64], "absurd.weight": [0, 2**62, 2**62], "w.weight": [32, 32]}
    header = {n: {"dtype": "F32", "shape": s, "data_offsets": [0, 4096 * (n == "w.weight")]} for n, s in shapes.items()}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4096))
    out = str(tmp_path / "out.safetensors")
    for command, code in ((["inspect"], 0), (["compare", "--formats", "nvfp4"], 0), (["quantize", out], 0)):
        assert main([command[0], str(path), *command[1:]]) == code, capsys.readouterr().err
    opened = ifjax.open_file(out)
    assert set(opened.packed) == {"w.weight"} and opened.entries["absurd.weight"].shape == (0, 2**62, 2**62)
    import jax

    like = {"a": jax.ShapeDtypeStruct((0, 2**62, 2**62), np.float32)}
    with pytest.raises(FileError, match=r"'absurd\.weight' cannot be of shape"):
        ifjax.load_file(path, like=like, names=[NameRule(r"absurd\.weight", "a"), NameRule(".*", None)])
