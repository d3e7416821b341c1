"""ifjax plan: rules within the budget, which ifjax quantize takes."""

import json

import jax
import pytest
from safetensors.numpy import save_file
from samples import normal

from ifjax import cli, load_rules


def checkpoint(folder):
    shapes = {f"layers.{i}.mlp.{name}.weight": (32, 64) for i in range(2) for name in ("up", "down")}
    tensors = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    tensors["layers.0.mlp.up.weight"] = tensors["layers.0.mlp.up.weight"] ** 3  # loses more
    tensors["norm.weight"] = jax.numpy.ones(64)
    save_file({name: jax.numpy.asarray(a).__array__() for name, a in tensors.items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


def test_a_plan_is_what_quantize_does(tmp_path, capsys):
    model, rules, out = checkpoint(tmp_path), tmp_path / "rules.json", tmp_path / "packed.safetensors"
    budget = 4.3 + (8.25 - 4.25) / 4  # one of four tensors in the finer format
    arguments = ["--budget", str(budget), "--formats", "mxfp4,mxfp6_e2m3", "--out", str(rules)]
    assert cli.main(["plan", str(model), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "bits a value; wrote" in printed
    assert {rule.weight_fmt for rule in load_rules(rules)} == {"mxfp4", "mxfp6_e2m3", None}
    assert cli.main(["quantize", str(model), str(out), "--rules", str(rules), "--json"]) == 0
    entries = {e["path"]: e for e in json.loads(capsys.readouterr().out)["entries"]}
    packed = [e for e in entries.values() if e["fmt"] is not None]
    assert len(packed) == 4 and sum(e["bits_per_value"] for e in packed) / 4 <= budget
    for name, e in entries.items():
        line = next((line for line in printed.splitlines() if line.split()[:1] == [name]), None)
        assert line is None or e["fmt"] in line.split()


def test_refusals(tmp_path, capsys):
    model = checkpoint(tmp_path)
    for arguments, text in [
        (["--budget", "3", "--formats", "mxfp4,mxfp6_e2m3"], "what the cheapest"),
        (["--budget", "5", "--formats", "mxfp4"], "two at least"),
    ]:
        assert cli.main(["plan", str(model), *arguments, "--out", str(tmp_path / "r.json")]) == 2
        assert text in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["plan", str(model), "--out", "x.json"])
