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


@pytest.mark.slow
def test_stacks_and_tools_without_a_factor_get_the_one_amax_that_they_take(tmp_path):
    """A stack of experts, one of them zeros; and MLX, whose factor is 1."""
    x = RNG.standard_normal((3, 64, 4), np.float32) * np.array([1, 3, 0], np.float32)[:, None, None]
    q = ifjax.quantize(x, "nvfp4", axis=-2, amax_axes=(0,))
    path = ifjax.save_file({"experts/up": q}, tmp_path / "ours.safetensors")
    again = "or let it be quantized again: `ifjax export --common-amax`"
    with pytest.raises(ValueError, match=f"for 1 of 1 .*\n.*one factor for a stack.* 3 different amax.*{again}"):
        plan_export(path, "modelopt")
    plan = plan_export(path, "modelopt", common_amax=True)
    assert "quantized again with the common amax" in plan.report.entries[0].note
    found = exchange.load(plan.write(tmp_path / "modelopt"), axis=-2)["experts.up"]
    expected = ifjax.quantize(q.dequantize(), "nvfp4", axis=-2, amax=q.amax.max())
    assert_array_equal(found.codes, expected.codes)
    assert_array_equal(found.scales, expected.scales)
    one = ifjax.quantize(x, "nvfp4", axis=-2, amax_axes=(0,), amax=q.amax.at[0].set(q.amax[1]))
    path = ifjax.save_file({"experts/up": one}, tmp_path / "one.safetensors")
    found = exchange.load(plan_export(path, "modelopt").write(tmp_path / "zeros"), axis=-2)["experts.up"]
    assert_array_equal(found.codes, one.codes)
    assert_array_equal(exchange.import_tensors(exchange.export_tensors({"e.up": one}, "modelopt")[0], "modelopt",
                                               axis=-2)["e.up"].codes, one.codes)  # fmt: skip
    w = ifjax.quantize(x[1], "nvfp4", axis=-2)
    path = ifjax.save_file({"a/q_proj/kernel": w}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=rf"mlx nvfp4 has no factor .*quantize with amax=2688, {again}"):
        plan_export(path, "mlx")
    found = exchange.load(plan_export(path, "mlx", common_amax=True).write(tmp_path / "mlx"), axis=-2)
    expected = ifjax.quantize(w.dequantize(), "nvfp4", axis=-2, amax=2688.0)
    assert_array_equal(found["a.q_proj.weight"].codes, expected.codes)
