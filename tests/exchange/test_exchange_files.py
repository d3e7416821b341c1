"""Checkpoints in other tools' layouts, written and read."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from exchange_cases import TOOLS, assert_same, assert_same_arrays, tensor
from numpy.testing import assert_array_equal

from ifjax import exchange


def a_model():
    return {
        "up.kernel": tensor("nvfp4", (64, 6), -2),
        "up.bias": np.arange(6, dtype=ml_dtypes.bfloat16),
        "steps": np.array(7, np.int64),
        "empty": np.zeros((0, 3), np.float32),
    }


@pytest.mark.parametrize("target", ["model", "model.safetensors"])
@pytest.mark.parametrize("tool", TOOLS)
def test_files_and_folders_come_back(tmp_path, tool, target):
    model, path = a_model(), tmp_path / target
    exchange.save(model, path, tool)
    assert os.listdir(tmp_path) == [target]
    back = exchange.load(path, axis=-2)
    assert_array_equal(back["up.weight"].codes, model["up.kernel"].codes)
    assert_same_arrays(
        {name: array for name, array in back.items() if name != "up.weight"},
        {name: array for name, array in model.items() if name != "up.kernel"},
    )
    arrays, config = exchange.export_tensors(model, tool)
    from safetensors import safe_open

    file = path if path.is_file() else path / "model.safetensors"
    with safe_open(file, framework="numpy") as opened:
        assert set(opened.keys()) == arrays.keys()
        assert opened.metadata()["format"] == "pt"
        if path.is_file():
            assert json.loads(opened.metadata()["quantization_config"]) == config
    if path.is_dir():
        assert json.loads((path / "config.json").read_text()) == {"quantization_config": config}
        assert sorted(os.listdir(path)) == ["config.json", "model.safetensors"]


def test_the_models_own_configuration_is_kept(tmp_path):
    exchange.save(a_model(), tmp_path / "m", "modelopt", config={"model_type": "llama", "quantization_config": 0})
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["quantization_config"]["quant_method"] == "modelopt"


def test_nothing_is_overwritten_and_nothing_is_left_behind(tmp_path, monkeypatch):
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "keep").write_text("me")
    with pytest.raises(FileExistsError, match="new folder"):
        exchange.save(a_model(), folder, "modelopt")
    with pytest.raises(ValueError, match="name a folder"):
        exchange.save(a_model(), tmp_path / "m.safetensors", "modelopt", config={})
    with pytest.raises(ValueError, match="cannot hold"):
        exchange.save(a_model() | {"odd": np.zeros(3, ml_dtypes.float4_e2m1fn)}, tmp_path / "m", "modelopt")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    for target in ("m", "m.safetensors"):
        with pytest.raises(OSError, match="no"):
            exchange.save(a_model(), tmp_path / target, "modelopt")
    assert os.listdir(tmp_path) == ["full"] and os.listdir(folder) == ["keep"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "m").mkdir()
    exchange.save(a_model(), tmp_path / "m", "modelopt")
    assert "up.weight" in exchange.load(tmp_path / "m")


def test_shards_are_read_as_one(tmp_path):
    from safetensors.numpy import save_file

    arrays, _ = exchange.export_tensors({"up.weight": tensor("mxfp4")}, "modelopt")
    files = {name: f"model-0000{i + 1}-of-00002.safetensors" for i, name in enumerate(arrays)}
    for name, file in files.items():
        save_file({name: arrays[name]}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "MXFP4", "group_size": 32}})
    )
    assert_same(exchange.load(tmp_path)["up.weight"], tensor("mxfp4"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        exchange.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ValueError, match="'awq'"):
        exchange.load(tmp_path)
    assert_same(exchange.load(tmp_path, "modelopt")["up.weight"], tensor("mxfp4"))


def test_a_bare_file_has_to_decide_by_its_names(tmp_path):
    from safetensors.numpy import save_file

    save_file({"a.weight": np.zeros((4, 4), np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="cannot be decided"):
        exchange.load(tmp_path / "x.safetensors")
    assert list(exchange.load(tmp_path / "x.safetensors", "modelopt")) == ["a.weight"]
