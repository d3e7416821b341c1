"""A packed folder comes back in floats, complete: `ifjax dequantize` into a folder."""

import json
import os

import numpy as np
import pytest

import ifjax
from ifjax.cli import main


@pytest.fixture
def packed(tmp_path):
    folder = tmp_path / "packed"
    folder.mkdir()
    w = np.random.default_rng(0).standard_normal((4, 32), np.float32)
    params = {"a.weight": ifjax.quantize(w, "if4"), "n.weight": np.ones(3, np.float32)}
    ifjax.save_file(params, folder / "model.safetensors", max_shard_bytes=80)
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "quantization_config": {"quant_method": "y"}}))
    (folder / "tokenizer.json").write_text("{}")
    return folder, params


def test_a_folder_comes_out_complete(packed, tmp_path, capsys):
    folder, params = packed
    out = tmp_path / "floats"
    assert main(["dequantize", str(folder), str(out)]) == 0
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert json.loads((out / "config.json").read_text()) == {"model_type": "x"}
    np.testing.assert_array_equal(ifjax.load_file(out)["a.weight"], params["a.weight"].dequantize())
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main(["dequantize", str(folder), str(out)]) == 1  # it holds something
    assert main(["dequantize", str(out), str(tmp_path / "again")]) == 1  # nothing is packed
    assert "nothing packed" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_file_stays_a_file(packed, tmp_path):
    path = ifjax.convert.dequantize_file(packed[0], tmp_path / "floats.safetensors")
    assert path == tmp_path / "floats.safetensors" and list(ifjax.open_file(path)) == ["a.weight", "n.weight"]
