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


def test_a_plan_of_many_layers_is_rules_that_quantize_takes(tmp_path, capsys):
    """One rule for each tensor: in one expression the paths of 200 layers would be too long for any rule."""
    w = jax.random.normal(jax.random.key(0), (16, 32)).__array__()
    names = [f"model.layers.{i}.self_attn.{kind}_proj.weight" for i in range(30) for kind in ("q", "gate_up")]
    save_file({name: w * (i + 1) for i, name in enumerate(names)}, tmp_path / "m.safetensors")
    arguments = ["--budget", "4.7", "--formats", "mxfp4,mxfp6_e2m3", "--out", str(tmp_path / "r.json")]
    assert cli.main(["plan", str(tmp_path / "m.safetensors"), *arguments]) == 0
    rules = load_rules(tmp_path / "r.json")
    assert len(rules) == 61
    to = [str(tmp_path / "m.safetensors"), str(tmp_path / "o.safetensors"), "--dry-run", "--json"]
    capsys.readouterr()
    assert cli.main(["quantize", *to, "--rules", str(tmp_path / "r.json")]) == 0
    formats = {e["path"]: e["fmt"] for e in json.loads(capsys.readouterr().out)["entries"]}
    assert len(formats) == 60 and set(formats.values()) == {"mxfp4", "mxfp6_e2m3"}


def test_a_plan_into_a_folder_that_is_not_there_fails_before_it_measures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ifjax.cli.plan.measured", None)  # would raise something else
    arguments = ["--budget", "4.7", "--out", str(tmp_path / "none" / "r.json")]
    assert cli.main(["plan", str(checkpoint(tmp_path)), *arguments]) == 1
    assert "is not a folder" in capsys.readouterr().err
