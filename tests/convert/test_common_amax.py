"""One factor for layers that servers multiply as one, from the command line."""

import warnings

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import ifjax
from ifjax import exchange
from ifjax.cli import main
from ifjax.convert import plan_export

RNG = np.random.default_rng(0)


def test_export_quantizes_fused_layers_again_with_one_amax(tmp_path, capsys):
    w = {name: RNG.standard_normal((4, 64), np.float32) * (1 + i) for i, name in enumerate("qkvo")}
    params = {f"a.{name}_proj.weight": ifjax.quantize(x, "nvfp4") for name, x in w.items()}
    path = ifjax.save_file({name.replace(".", "/"): q for name, q in params.items()}, tmp_path / "ours.safetensors")
    with pytest.warns(UserWarning, match=r"a\.k_proj\.weight, .* have different amax"):
        plan_export(path, "modelopt")
    assert main(["export", str(path), str(tmp_path / "theirs"), "--to", "modelopt", "--common-amax"]) == 0
    assert "different amax" not in capsys.readouterr().err
    found, expected = exchange.load(tmp_path / "theirs"), exchange.common_amax(params)
    for name, q in expected.items():
        assert_array_equal(found[name].codes, q.codes)
        assert_array_equal(found[name].scales, q.scales)
    factors = {name: float(found[name].amax) for name in found}
    assert len({factors[f"a.{name}_proj.weight"] for name in "qkv"}) == 1
    assert factors["a.o_proj.weight"] != factors["a.q_proj.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = plan_export(path, "modelopt", common_amax=True).report
    notes = {entry.path: entry.note for entry in report.entries}
    assert "quantized again with the common amax" in notes["a/q_proj/weight"]
    assert notes["a/o_proj/weight"] == "as modelopt NVFP4"
    with pytest.raises(ValueError, match="do one after the other"):
        plan_export(path, "modelopt", common_amax=True, recast="nvfp4")
    mixed = params | {"a.k_proj.weight": ifjax.quantize(w["k"], "fouroversix")}
    path = ifjax.save_file(mixed, tmp_path / "mixed.safetensors")
    with pytest.raises(ValueError, match="are of several formats, which no one amax serves"):
        plan_export(path, "modelopt", common_amax=True)
