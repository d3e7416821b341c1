"""quantize, inspect, verify and dequantize on the command line: results, exit codes, and what they leave behind."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from test_checkpoint import LAYOUT_1, file_limit

import ifjax
from ifjax import cli
from ifjax.cli.convert import _rules
from ifjax.cli.main import _parser
from ifjax.cli.terminal import progress_bar
from ifjax.files import pieces as _pieces

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """One small program for each format; no cell of a table is broken."""
    monkeypatch.setattr(_pieces, "PIECE", 512)
    monkeypatch.setenv("COLUMNS", "160")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def source(tmp_path):
    tensors = {
        "embed.weight": normal(64, 32), "layers.0.w.weight": normal(32, 64),
        "layers.1.w.weight": normal(32, 64, seed=1), "norm.weight": normal(64), "ids": np.arange(8),
    }  # fmt: skip
    return ifjax.save_file(tensors, tmp_path / "model.safetensors")


@pytest.fixture
def target(tmp_path):
    return tmp_path / "packed.safetensors"


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def run_json(capsys, *arguments, code=0):
    capsys.readouterr()
    assert run(*arguments, "--json") == code
    printed = capsys.readouterr()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(printed.out, parse_constant=refuse)


def fails(capsys, *arguments):
    capsys.readouterr()
    assert run(*arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ifjax: error: "), err
    return err


# --- results ---------------------------------------------------------------------------------------------------------


def test_there_and_back(capsys, source, target, tmp_path):
    assert run("quantize", source, target, "--fmt", "mxfp4") == 0
    out, err = capsys.readouterr()
    assert "2 of 5 parameters are quantized" in out and "layers.0.w.weight" in out and "embed" in out
    assert f"wrote {target}" in err and "MB/s" in err
    packed = ifjax.open_file(target)
    assert set(packed.packed) == {"layers.0.w.weight", "layers.1.w.weight"}

    assert run("inspect", target) == 0
    out, err = capsys.readouterr()
    assert "packed checkpoint, layout 2, 1 file" in out and "2 of 5 parameters are quantized" in out and err == ""
    assert run("verify", target) == 0
    assert "5 of 5 tensors are as they should be (7 checksums)" in capsys.readouterr().out
    assert run("verify", target, "--against", source, "--min-sqnr", 15) == 0
    out, _ = capsys.readouterr()
    assert "18.7" in out or "18.6" in out  # the format's SQNR on normal numbers, dB

    back = tmp_path / "back.safetensors"
    assert run("dequantize", target, back, "--dtype", "bfloat16") == 0
    file = ifjax.open_file(back)
    for name in packed.packed:
        assert file[name].dtype == "bfloat16"
        np.testing.assert_array_equal(file[name], np.asarray(packed[name].dequantize("bfloat16")))
    np.testing.assert_array_equal(file["norm.weight"], normal(64))
    assert run("inspect", back) == 0
    assert "nothing packed" in capsys.readouterr().out


def test_json_of_every_command(capsys, source, target, tmp_path):
    result = run_json(capsys, "quantize", source, target, "--fmt", "mxfp4", "--report", tmp_path / "report.json")
    assert (result["source"], result["target"], result["dry_run"]) == (str(source), str(target), False)
    assert result["totals"]["quantized"] == 2 and result["mb_per_s"] > 0
    entry = next(e for e in result["entries"] if e["path"] == "layers.0.w.weight")
    assert (entry["fmt"], entry["bits_per_value"], entry["bytes_after"]) == ("mxfp4", 4.25, 32 * 64 * 4.25 / 8)
    assert 18 < entry["sqnr_db"] < 19.5
    assert json.loads((tmp_path / "report.json").read_text())["entries"] == result["entries"]

    result = run_json(capsys, "inspect", target)
    assert (result["layout"], result["files"], result["bytes"]) == (2, [target.name], target.stat().st_size)
    assert result["formats"]["mxfp4"]["block"] == 32 and result["totals"]["quantized"] == 2

    result = run_json(capsys, "verify", target, "--against", source)
    assert result["ok"] and result["checksums"] == 7
    tensors = {t["name"]: t for t in result["tensors"]}
    assert tensors["layers.0.w.weight"]["sqnr_db"] == pytest.approx(entry["sqnr_db"], abs=1e-3)
    assert tensors["ids"]["sqnr_db"] is None
    result = run_json(capsys, "verify", target, "--against", source, "--min-sqnr", 30, code=1)
    assert not result["ok"] and "below 30" in result["tensors"][2]["fault"]

    result = run_json(capsys, "dequantize", target, tmp_path / "back.safetensors")
    assert result["dequantized"] == ["layers.0.w.weight", "layers.1.w.weight"]


def test_files_of_layout_1_are_inspected_verified_and_dequantized(capsys, tmp_path):
    for path in (LAYOUT_1 / "one.safetensors", LAYOUT_1 / "shards"):
        result = run_json(capsys, "inspect", path)
        assert result["layout"] == 1
        assert ifjax.Format.from_dict(result["formats"]["if4"]) == ifjax.FORMATS["if4"]
        assert run("inspect", path) == 0
        assert "packed checkpoint, layout 1, " in capsys.readouterr().out
        assert run_json(capsys, "verify", path)["ok"]
    result = run_json(capsys, "dequantize", LAYOUT_1 / "shards", tmp_path / "back.safetensors")
    assert result["dequantized"] == ["fouroversix", "if4", "mxfp4", "stacked"]
    result = run_json(capsys, "inspect", tmp_path / "back.safetensors")
    assert result["layout"] == 2 and result["totals"]["quantized"] == 0


def test_a_dry_run_tells_the_sizes_and_writes_nothing(capsys, source, target, tmp_path):
    before = sorted(tmp_path.iterdir())
    command = ["quantize", source, target, "--fmt", "mxfp4"]
    planned = run_json(capsys, *command, "--dry-run", "--report", tmp_path / "r.json")
    assert planned["dry_run"] and sorted(tmp_path.iterdir()) == before
    done = run_json(capsys, *command)
    assert planned["totals"] == done["totals"]
    assert run("quantize", source, tmp_path / "none" / "x.safetensors", "--fmt", "mxfp4", "--dry-run") == 0
    assert "would write" in capsys.readouterr().err


def test_options_reach_the_work(source, target, tmp_path):
    assert run("quantize", source, target, "--fmt", "mxfp4", "--embeddings", "--axis", -2, "--dtype", "bfloat16") == 0
    file = ifjax.open_file(target)
    assert len(file.packed) == 3 and {p.blocking.axis for p in file.packed.values()} == {-2}
    assert file["norm.weight"].dtype == "bfloat16" and file["embed.weight"].dtype == "bfloat16"

    rules = tmp_path / "rules.json"
    ifjax.save_rules([ifjax.Rule("layers/0/w", None), ifjax.Rule("layers/.*", "mxfp4")], rules)
    assert run("quantize", source, target, "--rules", rules, "--force", "--no-errors") == 0
    assert set(ifjax.open_file(target).packed) == {"layers.1.w.weight"}

    options = _parser().parse_args(["quantize", "a", "b", "--search", "fast"])
    assert [(rule.weight_fmt, rule.search) for rule in _rules(options)][-1] == ("if4", "fast")


def test_shards_and_folders(capsys, source, tmp_path):
    folder = tmp_path / "sharded"
    folder.mkdir()
    out = folder / "model.safetensors"
    assert run("quantize", source, out, "--fmt", "mxfp4", "--shard-size", "4kB") == 0
    assert not out.exists() and (folder / "model.safetensors.index.json").exists()
    for name in (folder, out, folder / "model.safetensors.index.json"):
        result = run_json(capsys, "inspect", name)
        assert len(result["files"]) > 1 and result["totals"]["quantized"] == 2
    assert run("verify", folder, "--against", source) == 0
    assert "model.safetensors.index.json exists already" in fails(capsys, "quantize", source, out, "--fmt", "mxfp4")
    assert run("dequantize", folder, tmp_path / "back.safetensors") == 0


def test_pipes(source, target):
    def ifjax_run(*arguments, stdin=None):
        command = [sys.executable, "-m", "ifjax", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, input=stdin, capture_output=True)

    assert run("quantize", source, target, "--fmt", "mxfp4") == 0
    ran = ifjax_run("dequantize", "-", "-", stdin=target.read_bytes())
    assert ran.returncode == 0, ran.stderr
    target.with_name("back.safetensors").write_bytes(ran.stdout)
    np.testing.assert_array_equal(ifjax.open_file(target.with_name("back.safetensors"))["norm.weight"], normal(64))
    ran = ifjax_run("inspect", "-", stdin=b"rubbish")
    assert ran.returncode == 1 and ran.stdout == b"" and b"is not a whole safetensors file" in ran.stderr


def test_progress_tells_the_rate(source, target, monkeypatch):
    shown = Console(force_terminal=True, width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    progress = progress_bar(rate=True)
    progress.disable, progress.live.console = False, shown
    task = progress.add_task("layers.0.w", total=4e6)
    progress.update(task, advance=1e6)
    time.sleep(0.01)
    progress.update(task, advance=1e6)
    shown.print(progress.get_renderable())
    text = shown.export_text()
    shown.file.close()
    assert "layers.0.w" in text and "/s" in text


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["quantize", "inspect", "verify", "dequantize"])
def test_help_has_examples(capsys, command):
    with pytest.raises(SystemExit) as left:
        run(command, "--help")
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert f"  ifjax {command} " in out.split("examples:")[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["quantize", "a"], "OUT"), (["quantize", "a", "b", "--fmt", "nvfp5"], "did you mean nvfp"),
        (["quantize", "a", "b", "--axis", "0"], "invalid choice"),
        (["quantize", "a", "b", "--dtype", "int8"], "invalid choice"),
        (["quantize", "a", "b", "--fmt", "if4", "--rules", "r.json"], "not allowed with"),
        (["quantize", "a", "b", "--shard-size", "5XB"], "must be a size such as 500MB"),
        (["quantize", "a", "b", "--shard-size", "0"], "must be a size such as 500MB"),
        (["dequantize", "a"], "OUT"), (["verify"], "FILE"), (["verify", "a", "--min-sqnr", "x"], "number of decibels"),
    ],
)  # fmt: skip
def test_wrong_usage_exits_with_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as left:
        run(*arguments)
    out, err = capsys.readouterr()
    assert (left.value.code, out) == (2, "") and message in err


def test_bad_input_is_a_sentence_and_leaves_nothing(capsys, source, target, tmp_path):
    before = sorted(tmp_path.iterdir())
    rules = tmp_path.parent / f"{tmp_path.name}-rules.json"
    ifjax.save_rules([ifjax.Rule("nothing/like/it")], rules)
    for arguments, message in (
        (["quantize", tmp_path / "none.safetensors", target], "No such file"),
        (["quantize", source, tmp_path / "none" / "x.safetensors"], "create it first"),
        (["quantize", source, tmp_path / "x.bin"], "OUT must end in .safetensors"),
        (["quantize", source, source], "is IN: name another"),
        (["quantize", source, source, "--force"], "is IN: name another"),
        (["quantize", source, target, "--rules", rules], "matches nothing"),
        (["quantize", source, target, "--rules", tmp_path / "no.json"], "No such file"),
        (["dequantize", source, target], "nothing to dequantize"),
        (["inspect", tmp_path / "none"], "No such file"),
    ):
        assert message in fails(capsys, *arguments), arguments
        assert sorted(tmp_path.iterdir()) == before, arguments


def test_options_that_do_not_go_together_exit_with_2(capsys, source, target, tmp_path):
    rules = tmp_path / "rules.json"
    ifjax.save_rules([ifjax.Rule(".*")], rules)
    for arguments, message in (
        (["quantize", source, target, "--rules", rules, "--embeddings"], "leave out --embeddings"),
        (["quantize", source, "-", "--json"], "both ask for stdout"),
        (["dequantize", source, "-", "--json"], "both ask for stdout"),
        (["quantize", source, "-", "--shard-size", "1GB"], "leave out --shard-size"),
        (["verify", source, "--min-sqnr", 3], "give --against"),
    ):
        assert run(*arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and message in err and err.count("\n") == 1
    assert not target.exists()


def test_out_is_replaced_only_by_force(capsys, source, target):
    target.write_bytes(b"precious")
    assert "exists already: name another file, or replace it by --force" in fails(capsys, "quantize", source, target)
    assert "exists already" in fails(capsys, "dequantize", source, target)
    assert target.read_bytes() == b"precious"
    assert run("quantize", source, target, "--fmt", "mxfp4", "--force") == 0
    assert len(ifjax.open_file(target).packed) == 2


def test_damage_is_found_and_nothing_is_made_of_it(capsys, source, target, tmp_path):
    assert run("quantize", source, target, "--fmt", "mxfp4") == 0
    good = target.read_bytes()
    entries = ifjax.open_file(target).entries
    data = bytearray(good)
    data[entries["layers.1.w.weight.codes"].start] ^= 1
    target.write_bytes(data)
    capsys.readouterr()
    assert run("verify", target) == 1
    out, err = capsys.readouterr()
    assert "ifjax: error: layers.1.w.weight: " in err and "is damaged" in err and err.count("\n") == 1
    assert "4 of 5 tensors are as they should be" in out
    assert not run_json(capsys, "verify", target, code=1)["ok"]
    assert "is damaged" in fails(capsys, "dequantize", target, tmp_path / "back.safetensors")
    for cut in (0, 7, 100, len(good) - 1):
        target.write_bytes(good[:cut])
        for command in (["inspect", target], ["verify", target], ["dequantize", target, tmp_path / "back.safetensors"]):
            assert "is not a whole safetensors file" in fails(capsys, *command)
    target.unlink()
    good, entries = source.read_bytes(), ifjax.open_file(source).entries
    for name in ("layers.0.w.weight", "ids"):  # the original, too, if it has checksums: what is packed and what stays
        data = bytearray(good)
        data[entries[name].start] ^= 1
        source.write_bytes(data)
        assert "is damaged" in fails(capsys, "quantize", source, target, "--fmt", "mxfp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


def test_a_full_disk_is_a_sentence_and_leaves_the_old_file(capsys, source, target, tmp_path):
    target.write_bytes(b"precious")
    with file_limit(4000):
        assert "File too large" in fails(capsys, "quantize", source, target, "--fmt", "mxfp4", "--force")
    assert target.read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "packed.safetensors"]


def test_values_that_are_not_finite_are_told(capsys, target, tmp_path):
    x = normal(32, 64)
    x[3, 3] = np.nan
    assert run("quantize", ifjax.save_file({"w": x}, tmp_path / "m.safetensors"), target, "--fmt", "mxfp4") == 0
    assert "ifjax: warning: w: holds values that are not finite" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_kill_at_any_moment_of_a_conversion_leaves_the_old_or_the_new(tmp_path):
    source = ifjax.save_file({f"l{i}.weight": normal(512, 512, seed=i) for i in range(8)}, tmp_path / "m.safetensors")
    target = tmp_path / "q.safetensors"
    command = [sys.executable, "-m", "ifjax", "quantize", str(source), str(target), "--force", "--fmt"]
    started = time.perf_counter()
    subprocess.run([*command, "mxfp4"], cwd=ROOT, check=True, capture_output=True)
    usual = time.perf_counter() - started
    rng, seen, now = random.Random(0), set(), "mxfp4"
    for i in range(15):  # test_checkpoint kills writers 50 times, without the start of Python
        wanted = ("if4", "mxfp4")[i % 2]
        child = subprocess.Popen([*command, wanted], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.8, 1) * usual)
        child.send_signal(signal.SIGKILL)
        child.wait()
        file = ifjax.open_file(target)
        found = {file[name].fmt.name for name in file}
        assert len(file) == 8 and found in ({now}, {wanted})
        seen.add(found == {wanted})
        usual *= 0.8 if found == {wanted} else 1.2  # however busy the machine is by now
        now = found.pop()
    assert seen == {True, False}


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_request_to_end_removes_the_temporary_file(target, source, monkeypatch):
    from ifjax.convert import quantize

    def slow(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not ended")

    monkeypatch.setattr(quantize, "_pack", slow)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        run("quantize", source, target, "--fmt", "mxfp4")
    assert left.value.code == 128 + signal.SIGTERM
    assert [path.name for path in target.parent.iterdir()] == ["model.safetensors"]
    assert signal.getsignal(signal.SIGTERM) == before
