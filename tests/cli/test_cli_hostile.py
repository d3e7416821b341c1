"""What a terminal would obey is written out, whatever it comes from; files that change are told."""

import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from ifjax import cli
from ifjax.measure import errors

EVIL = "l.\x1b[31mred\x1b]0;title\x07.\u202e\x9b2J\u200b\n.weight"
WEIGHT = np.random.default_rng(0).standard_normal((32, 64), np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evil\x1b[31m")
    save_file({EVIL: WEIGHT, "b.bias\x1b[2J": WEIGHT[0], "c.weight": WEIGHT}, folder / "m\x1b[32m.safetensors")
    return folder


def harmless(text):
    return all(c.isprintable() for c in text.replace("\n", ""))


def test_no_command_prints_what_a_terminal_obeys(folder, capsys):
    model, packed, plain = (str(folder / f"{name}\x1b[32m.safetensors") for name in "mop")
    commands = [
        ["quantize", model, packed, "--fmt", "mxfp4"], ["inspect", packed], ["inspect", model], ["verify", packed],
        ["verify", packed, "--against", model], ["verify", packed, "--against", model, "--min-sqnr", "90"],
        ["dequantize", packed, plain], ["compare", model, "--formats", "mxfp4"],
        ["compare", model, "--formats", "mxfp4", "--all"], ["compare", str(folder / "none.safetensors")],
        ["compare", model, "--formats", "mxfp4", "--json"],
        ["plan", model, "--formats", "mxfp4,mxfp6_e2m3", "--budget", "5", "--out", str(folder / "r.json")],
        ["export", packed, str(folder / "out"), "--to", "compressed-tensors"], ["import", packed, plain, "--force"],
        ["quantize", model, packed, "extra\x1b[31m"], ["\x1b[31m"], ["formats", "--\x1b[31m"],
    ]  # fmt: skip
    for command in commands:
        try:
            cli.main(command)
        except SystemExit as left:
            assert left.code == 2
        out, err = capsys.readouterr()
        assert out + err and harmless(out) and harmless(err), command


def test_compare_tells_a_file_that_is_replaced_meanwhile(tmp_path, capsys, monkeypatch):
    path, other = tmp_path / "m.safetensors", tmp_path / "other.safetensors"
    save_file({"a.weight": WEIGHT, "b.weight": WEIGHT}, path)
    save_file({"b.weight": 3 * WEIGHT, "a.weight": WEIGHT.T.copy()}, other)
    read = errors.read_tensor

    def replaced_then_read(path, entry):
        if other.exists():
            os.replace(other, path)
        return read(path, entry)

    monkeypatch.setattr(errors, "read_tensor", replaced_then_read)
    assert cli.main(["compare", str(path), "--formats", "mxfp4"]) == 1
    assert "changed since it was opened" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [(["compare", "--formats", "mxfp4", "--axis", "7"], 1, "has no axis 7"),
     (["compare", "--formats", "mxfp4", "--axis", "9" * 30], 1, "has no axis 9"),
     (["plan", "--budget", "nan", "--out", "r.json"], 2, "a number of bits"),
     (["plan", "--budget", "inf", "--out", "r.json"], 2, "a number of bits"),
     (["plan", "--budget", "5", "--out", "r.txt"], 1, ".yaml, .yml or .json")],
)  # fmt: skip
def test_numbers_and_names_that_cannot_be_are_a_sentence(command, code, message, folder, capsys):
    model = str(folder / "m\x1b[32m.safetensors")
    assert cli.main([command[0], model, *command[1:]]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("way", ["folder", "index", "file"])
def test_compare_takes_folders_and_indices(way, tmp_path, capsys):
    import ifjax

    tensors = {"a.weight": WEIGHT, "b.weight": 2 * WEIGHT}
    ifjax.save_file(tensors, tmp_path / "model.safetensors", max_shard_bytes=None if way == "file" else 9000)
    names = {"folder": ".", "index": "model.safetensors.index.json", "file": "model.safetensors"}
    assert cli.main(["compare", str(tmp_path / names[way]), "--formats", "mxfp4"]) == 0
    assert "Total of 2 tensors" in capsys.readouterr().out
