"""Packed checkpoints from and to other tools' layouts, file by file: the bytes of memory, whole or not at all."""

import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from exchange_cases import F8, assert_same, changed, tensor
from numpy.testing import assert_array_equal
from test_layouts import stack
from test_readers import needs

import ifjax
from ifjax import exchange
from ifjax.cli import main
from ifjax.convert import plan_export, plan_import
from ifjax.files import FileError

RNG = np.random.default_rng(0)
PLAIN = {"n.weight": np.ones(3, ml_dtypes.bfloat16), "e.weight": np.zeros((0, 3), np.float32)}
CASES = {
    "compressed-tensors nvfp4": (
        "compressed-tensors", {"a.weight": tensor("nvfp4"), "b.weight": tensor("nvfp4", seed=1)}),
    "compressed-tensors mixed": ("compressed-tensors", {"a.weight": tensor("nvfp4"), "b.weight": tensor("mxfp4")}),
    "modelopt": ("modelopt", {"a.weight": tensor("fouroversix"), "b.kernel": tensor("nvfp4", (64, 6), -2)}),
    "modelopt stack": ("modelopt", {"experts.up": stack("nvfp4", amax=2.5)}),
    "gpt-oss": ("gpt-oss", {"experts.up": stack("mxfp4"), "experts.down": stack("mxfp4", (3, 64, 4), -2)}),
    "mlx": ("mlx", {"a.weight": tensor("nvfp4", amax=2688.0), "e.weight_": np.ones(2), "s.weight": stack("mxfp4")}),
}  # fmt: skip


def stored(path):
    from safetensors import deserialize

    return {name: (a["dtype"], a["shape"], bytes(a["data"])) for name, a in deserialize(path.read_bytes())}


@pytest.mark.parametrize("case", CASES)
def test_files_have_the_bytes_of_memory_both_ways(case, tmp_path):
    tool, params = CASES[case]
    ours = ifjax.save_file({name.replace(".", "/"): value for name, value in (params | PLAIN).items()},
                           tmp_path / "ours.safetensors")  # fmt: skip
    exchange.save(params | PLAIN, tmp_path / "expected", tool)
    work = plan_export(ours, tool)
    theirs = work.write(tmp_path / "theirs")
    assert sorted(os.listdir(theirs)) == ["config.json", "model.safetensors"]
    assert stored(theirs / "model.safetensors") == stored(tmp_path / "expected" / "model.safetensors")
    assert (theirs / "config.json").read_text() == (tmp_path / "expected" / "config.json").read_text()
    assert {e.path: e.bytes_after for e in work.report.entries if e.fmt}.keys() == {
        n.replace(".", "/") for n, q in params.items() if isinstance(q, ifjax.QTensor)}  # fmt: skip
    for axis in (-1, -2):
        expected = exchange.load(theirs, axis=axis)
        back = plan_import(theirs, axis=axis, dtype="float32").write(tmp_path / f"back{axis}.safetensors")
        opened = ifjax.open_file(back)
        assert set(opened) == set(expected)
        for name, value in expected.items():
            if isinstance(value, ifjax.QTensor):
                found = opened[name]
                assert_same(found, value.replaced(amax=value.amax))
            else:
                assert opened[name].dtype == value.dtype and opened[name].tobytes() == value.tobytes()
    # And out again, with the same bytes.
    again = plan_export(tmp_path / "back-1.safetensors", tool).write(tmp_path / "again")
    assert stored(again / "model.safetensors") == stored(theirs / "model.safetensors")
    # A file by itself says in its metadata what it is.
    alone = plan_export(ours, tool).write(tmp_path / "alone.safetensors")
    assert exchange.load(alone).keys() == exchange.load(theirs).keys()


def test_fp8_is_kept_or_decoded(tmp_path):
    weight, factors = RNG.normal(size=(200, 300)).astype(F8), RNG.random((2, 3), np.float32)
    stack_, scale = RNG.normal(size=(3, 40, 30)).astype(F8), RNG.random((3, 1, 1), np.float32)
    params = {"a.weight": weight, "a.weight_scale_inv": factors, "s.weight": stack_, "s.weight_scale_inv": scale}
    (tmp_path / "theirs").mkdir()
    from safetensors.numpy import save_file

    save_file(params | PLAIN, tmp_path / "theirs" / "model.safetensors")
    config = {"model_type": "x", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    kept = ifjax.open_file(plan_import(tmp_path / "theirs").write(tmp_path / "kept.safetensors"))
    assert set(kept) == (params | PLAIN).keys() and kept["a.weight"].tobytes() == weight.tobytes()
    for axis, dtype in ((-1, "float32"), (-2, "bfloat16")):
        work = plan_import(tmp_path / "theirs", decode=True, axis=axis, dtype=dtype)
        path = work.write(tmp_path / f"{axis}.safetensors")
        opened = ifjax.open_file(path)
        expected = exchange.load(tmp_path / "theirs", decode=True, axis=axis, dtype=dtype)
        assert set(opened) == set(expected)
        for name, value in expected.items():
            assert_array_equal(opened[name], value)
        (entry,) = (e for e in work.report.entries if e.path == "a.weight")
        assert entry.reason == f"decoded from fp8 weight_scale_inv to {dtype}"


@pytest.mark.parametrize("shape", [(4, 64), (3, 4, 64)])
def test_recast_by_files(shape, tmp_path):
    scales = np.array([[120, 121], [122, 123], [124, 125], [126, 127]])
    q = tensor("mxfp4", shape, scales=scales)
    tool, name = ("compressed-tensors", "a.weight") if len(shape) == 2 else ("gpt-oss", "a.experts")
    exchange.save({name: q}, tmp_path / "theirs", tool)
    work = plan_import(tmp_path / "theirs", recast="nvfp4", dtype="float32")
    assert "recast from mxfp4" in work.report.entries[0].note
    new = ifjax.load_file(work.write(tmp_path / "ours.safetensors"))[name]
    assert (new.fmt.name, new.shape) == ("nvfp4", shape)
    assert_array_equal(new.dequantize(), q.dequantize())
    # And on the way out.
    ours = plan_import(tmp_path / "theirs", dtype="float32").write(tmp_path / "mx.safetensors")
    out = plan_export(ours, "modelopt", recast="nvfp4").write(tmp_path / "modelopt")
    (back,) = exchange.load(out).values()
    assert_array_equal(back.dequantize(), q.dequantize())
    far = tensor("mxfp4", (2, 64), scales=[[100, 150], [150, 150]])
    exchange.save({"a.weight": far}, tmp_path / "far", "modelopt")
    with pytest.raises(ValueError, match=r"a\.weight: 1 of 4 blocks have a scale more than 2\^17 below"):
        plan_import(tmp_path / "far", recast="nvfp4").write(tmp_path / "far.safetensors")
    assert not (tmp_path / "far.safetensors").exists()


def test_a_folder_comes_out_complete(tmp_path):
    """Shards and their index, the configuration, the tokenizer; no weights of other kinds, nor what describes them."""
    params = {f"layers.{i}.up.weight": tensor("nvfp4", seed=i) for i in range(4)}
    arrays, config = exchange.export_tensors(params, "modelopt")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    from safetensors.numpy import save_file

    files = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(arrays)}
    for file in set(files.values()):
        save_file({name: arrays[name] for name in arrays if files[name] == file}, theirs / file)
    (theirs / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (theirs / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    (theirs / "hf_quant_config.json").write_text("{}")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md", "pytorch_model.bin"):
        (theirs / name).write_text(f'{{"of": "{name}"}}')
    (theirs / "original").mkdir()
    ours = plan_import(theirs).write(tmp_path / "ours", max_shard_bytes=500)
    kept = ["README.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    found = sorted(os.listdir(ours))
    assert [name for name in found if "safetensors" not in name] == kept
    assert "model.safetensors.index.json" in found and len(found) > len(kept) + 2
    assert json.loads((ours / "config.json").read_text()) == {"model_type": "llama"}
    assert (ours / "tokenizer.json").read_text() == (theirs / "tokenizer.json").read_text()
    out = plan_export(ours, "compressed-tensors").write(tmp_path / "out")
    assert sorted(os.listdir(out)) == sorted([*kept, "model.safetensors"])
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama" and config["quantization_config"]["format"] == "nvfp4-pack-quantized"
    for name, q in exchange.load(out).items():
        assert_array_equal(q.codes, params[name].codes)


def test_factors_of_inputs_go_along(tmp_path):
    arrays, config = exchange.export_tensors({"a.weight": tensor("nvfp4")}, "modelopt", input_amax={"a": 2.0})
    assert config["quant_algo"] == "NVFP4"
    exchange.save({"a.weight": tensor("nvfp4")}, tmp_path / "theirs", "modelopt", input_amax={"a": 2.0})
    ours = plan_import(tmp_path / "theirs").write(tmp_path / "ours.safetensors")
    out = plan_export(ours, "modelopt").write(tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["quantization_config"] == config
    assert stored(out / "model.safetensors") == stored(tmp_path / "theirs" / "model.safetensors")
    assert set(arrays) == set(stored(out / "model.safetensors"))


# --- refusals


def described(fmt, shape=(4, 64), **settings):
    return tensor(fmt, shape, **settings)


def test_what_a_tool_cannot_hold_is_named_and_nothing_is_written(tmp_path):
    fmts = {"a/kernel": "nvfp4", "b/kernel": "if4", "c/w": "nvfp4", "d/kernel": "nvint4"}
    params = {name: tensor(fmt) for name, fmt in fmts.items()}
    ours = ifjax.save_file(params, tmp_path / "ours.safetensors")
    message = r"no layout for 3 of 4 packed tensors.*\n  b/kernel: if4 marks.*\n  c/w: 'c\.w' is"
    with pytest.raises(ValueError, match=message):
        plan_export(ours, "modelopt")
    work = plan_export(ours, "modelopt", refused="floats")
    refused = {e.path: e for e in work.report.entries if not e.expected}
    assert set(refused) == {"b/kernel", "c/w", "d/kernel"} and "refused, decoded" in refused["b/kernel"].reason
    out = work.write(tmp_path / "out")
    back = exchange.load(out)
    assert_array_equal(back["b.kernel"], params["b/kernel"].dequantize())
    assert isinstance(back["a.weight"], ifjax.QTensor)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["ignore"] == ["b", "d"]


@pytest.mark.parametrize(
    "params, tool, message",
    [
        ({"a/kernel": tensor("nvfp4", (6, 40))}, "modelopt", "must be a multiple of 16"),
        ({"a/kernel": stack("nvfp4")}, "compressed-tensors", "export stacked layers one by one"),
        ({"a/up": tensor("nvfp4", (2, 6, 64), amax=np.ones((2, 6), np.float32))}, "modelopt", "layouts have one for a"),
        ({"a/up": stack("nvfp4")}, "modelopt", "a/up: modelopt NVFP4 stack has one factor for a stack"),
        ({"a/kernel": tensor("nvfp4", scales=0x7F)}, "modelopt", "a/kernel: 24 of 24 block scales are NaN"),
        ({"a/kernel": tensor("nvfp4", amax=3.0)}, "mlx", "a/kernel: mlx nvfp4 has no factor"),
        ({"a/bias": np.ones(3)}, "modelopt", "holds nothing packed: `ifjax quantize` packs it first"),
    ],
)
def test_what_would_be_read_otherwise_leaves_nothing(params, tool, message, tmp_path):
    ours = ifjax.save_file(params, tmp_path / "ours.safetensors")
    with pytest.raises(ValueError, match=message):
        plan_export(ours, tool).write(tmp_path / "out")
    assert os.listdir(tmp_path) == ["ours.safetensors"]


def test_targets_of_other_kinds_are_refused(tmp_path):
    exchange.save({"a.weight": tensor("nvfp4")}, tmp_path / "theirs", "modelopt")
    work = plan_import(tmp_path / "theirs")
    targets = {"x.gguf": "must end in .safetensors, or be a folder", "x.bin": "must end in .safetensors"}
    for name, message in targets.items():
        with pytest.raises(FileError, match=message):
            work.write(tmp_path / name)
    with pytest.raises(FileExistsError, match="holds something"):
        work.write(tmp_path / "theirs")
    assert os.listdir(tmp_path) == ["theirs"]


@pytest.mark.parametrize("change, message", [
    ({"a.weight_scale": None}, "weight_scale is missing beside it"),
    ({"a.weight_global_scale": np.zeros(1, np.float32)}, "finite and > 0"),
    ({"a.weight_zero_point": np.zeros(3)}, "changes what its layer's weight means"),
])  # fmt: skip
def test_broken_sources_leave_nothing(change, message, tmp_path):
    from safetensors.numpy import save_file

    arrays, config = exchange.export_tensors({"a.weight": tensor("nvfp4")}, "compressed-tensors")
    save_file(changed(arrays, **change), tmp_path / "m.safetensors", {"quantization_config": json.dumps(config)})
    with pytest.raises(ValueError, match=message):
        plan_import(tmp_path / "m.safetensors").write(tmp_path / "out")
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_progress_counts_what_is_read(tmp_path):
    exchange.save({"a.weight": tensor("nvfp4"), "b.bias": np.ones(3)}, tmp_path / "theirs", "modelopt")
    work, told = plan_import(tmp_path / "theirs"), []
    work.write(tmp_path / "ours.safetensors", tick=lambda name, count: told.append((name, count)))
    assert {name for name, _ in told} == {"a.weight", "b.bias"}
    assert work.nbytes - 4 <= sum(count for _, count in told) <= work.nbytes


def test_one_matrix_of_a_stack_is_in_memory(tmp_path, monkeypatch):
    """Each read is of one matrix: a stack of any length takes no more memory."""
    from ifjax.exchange.containers import Source

    q = stack("mxfp4", (16, 4, 64))
    exchange.save({"a.experts": q}, tmp_path / "theirs", "gpt-oss")
    longest, read = [], Source.part

    def part(self, name, batch, i):
        array = read(self, name, batch, i)
        longest.append(array.nbytes)
        return array

    monkeypatch.setattr(Source, "part", part)
    ours = plan_import(tmp_path / "theirs").write(tmp_path / "ours.safetensors")
    assert max(longest) == 4 * 32
    assert_array_equal(jax.device_get(ifjax.load_file(ours)["a.experts"].codes), q.codes)
    assert jnp.asarray(q.codes).shape == (16, 4, 32)


@pytest.mark.parametrize("tool", ["mlx", pytest.param("gguf", marks=needs("gguf"))])
def test_stacks_and_renamed_tensors_by_files(tool, tmp_path, capsys):
    """Names that a tool's models have, given on the way out and taken away on the way in; an amax for each expert."""
    fmt = "mxfp4" if tool == "mlx" else "nvfp4"
    params = {"l.0.experts.up": stack(fmt, amax=[1.0, 2.0, 4.0]), "l.0.up.weight": tensor(fmt)}
    params["n.weight"] = np.ones(3, np.float32)
    ours = ifjax.save_file({name.replace(".", "/"): value for name, value in params.items()},
                           tmp_path / "ours.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match=r"l/0/experts/up: 'l\.0\.experts\.up' is a QTensor, so its name must end"):
        plan_export(ours, tool)
    names = ["--rename", r"l\.(\d)\.experts\.up", r"blk.\1.up_exps.weight", "--rename", r"n\.(.*)", r"norm.\1"]
    assert main(["export", str(ours), str(tmp_path / "theirs"), "--to", tool, *names]) == 0
    found = exchange.load(tmp_path / "theirs")
    assert set(found) == {"blk.0.up_exps.weight", "l.0.up.weight", "norm.weight"}
    assert_same(found["blk.0.up_exps.weight"], params["l.0.experts.up"])
    names = ["--rename", r"blk\.(\d)\.up_exps\.weight", r"l.\1.experts.up", "--dtype", "float32"]
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "back"), *names]) == 0
    back = ifjax.open_file(tmp_path / "back")
    assert set(back) == {"l.0.experts.up", "l.0.up.weight", "norm.weight"}
    assert_same(back["l.0.experts.up"], params["l.0.experts.up"])
    capsys.readouterr()
    for rename, message in (
        ([(r"l\..*", "a.weight")], "'l.0.experts.up' and 'l.0.up.weight' would become 'a.weight'"),
        ([("x", "y")], "'x' matches no name"),
        ([("(", "y")], "is not a regular expression"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_export(ours, tool, rename=rename)
