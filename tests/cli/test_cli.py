"""The command line: what it prints and where, what it writes, and that bad input ends in a sentence."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import ifjax
from ifjax import cli
from ifjax import measure as analysis

ROOT = Path(__file__).resolve().parents[2]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def write(path, tensors):
    from safetensors.numpy import save_file

    save_file(tensors, path)
    return path


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Tables are as wide as COLUMNS says, where it is set; here no cell is to be broken into lines."""
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def model(tmp_path):
    tensors = {"layer.0.w[a]": normal(16, 64), "layer.1.w": normal(32, 40, seed=1), "layer.1.bias": normal(64)}
    return write(tmp_path / "model.safetensors", tensors | {"ids": np.arange(8), "zero": np.zeros((4, 32), np.float32)})


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def run_json(capsys, *arguments):
    assert run("compare", *arguments, "--json") == 0
    printed = capsys.readouterr()
    assert printed.err == ""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(printed.out, parse_constant=refuse)


# --- usage -----------------------------------------------------------------------------------------------------------


def leave(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        run(*arguments)
    printed = capsys.readouterr()
    return left.value.code, printed.out, printed.err


def test_version(capsys):
    assert leave(capsys, "--version") == (0, f"ifjax {ifjax.__version__}\n", "")


def test_help_has_examples(capsys):
    code, out, _ = leave(capsys, "compare", "--help")
    assert code == 0
    assert "ifjax compare model.safetensors --formats if4 nvfp4 --out plots" in out


def test_help_leads_somewhere(capsys):
    code, out, _ = leave(capsys, "--help")
    assert code == 0 and "where to begin" in out
    for command in ("compare", "quantize", "dequantize", "inspect", "verify"):
        assert f"    {command}" in out and leave(capsys, command, "--help")[0] == 0


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_formats_and_files(capsys, shell):
    pytest.importorskip("shtab")
    assert run("completion", shell) == 0
    script = capsys.readouterr().out
    for word in ("quantize", "--min-sqnr", f"echo {next(iter(ifjax.FORMATS))} ", "mlx"):
        assert word in script


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes(capsys):
    pytest.importorskip("shtab")
    run("completion", "bash")
    ask = """
        COMP_WORDS=(ifjax quantize --fmt hif) COMP_CWORD=3
        $(complete -p ifjax | grep -o -- "-F [^ ]*" | cut -c4-)
        echo "${COMPREPLY[*]}"
    """
    script = capsys.readouterr().out + ask
    said = subprocess.run(["bash", "--norc"], input=script, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["hifloat4", "hifloat4_half_even"]


def test_completion_without_shtab_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert run("completion", "bash") == 1
    assert "pip install 'ifjax[completion]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "COMMAND"),
        (["compare", "--axis", "last"], "invalid int value"),
        (["compare", "--search", "slow"], "invalid choice"),
        (["compare", "--formats", "nvfp5"], "unknown format 'nvfp5'; did you mean nvfp"),
        (["compare", "--formats", "if4", "model.safetensors"], "FILE comes before --formats"),
        (["compare", "--formats", ","], "needs a format's name"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_why(capsys, arguments, message):
    code, out, err = leave(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err


# --- results ---------------------------------------------------------------------------------------------------------


def test_json_holds_every_figure(capsys, model):
    result = run_json(capsys, model, "--formats", "if4,mxfp4", "if4")
    assert (result["source"], result["axis"], result["search"]) == ("model.safetensors", -1, None)
    tensors = {t["name"]: t for t in result["tensors"]}
    assert list(tensors) == ["ids", "layer.0.w[a]", "layer.1.bias", "layer.1.w", "zero"]
    assert tensors["ids"]["status"] == "skipped" and "I64" in tensors["ids"]["reason"]
    assert (tensors["layer.1.bias"]["status"], tensors["layer.1.bias"]["reason"]) == ("kept", "a bias")

    w = tensors["layer.1.w"]
    assert (w["shape"], w["dtype"], w["nbytes"], w["status"]) == ([32, 40], "F32", 5120, "quantized")
    assert list(w["errors"]) == ["if4", "mxfp4"]
    expected = analysis.tensor_report("", normal(32, 40, seed=1), ["if4"]).errors["if4"]
    assert w["errors"]["if4"] == expected.to_dict()
    assert w["errors"]["mxfp4"]["choice_share"] is None
    # 40 values take three blocks of 16: 24 bytes of codes and 3 of scales; and 4 bytes of amax.
    assert w["errors"]["if4"]["nbytes"] == 32 * (24 + 3) + 4

    assert tensors["zero"]["errors"]["if4"]["relative_error"] == 0
    assert tensors["zero"]["errors"]["if4"]["sqnr_db"] is None  # infinite, which JSON cannot say
    assert result["total"]["nbytes"] == 4 * (16 * 64 + 32 * 40 + 4 * 32)
    assert result["total"]["nbytes_not_quantized"] == 64 * 4 + 8 * 8
    assert result["total"]["errors"]["if4"]["values"] == 16 * 64 + 32 * 40 + 4 * 32


def test_tables_show_every_tensor_and_the_total(capsys, model):
    model = model.rename(model.with_name("model[v2].safetensors"))  # brackets are no markup
    assert run("compare", model, "--formats", "if4", "mxfp4", "--all") == 0
    out, err = capsys.readouterr()
    assert err == ""
    result = run_json(capsys, model, "--formats", "if4", "mxfp4")
    for name in (model.name, "layer.0.w[a]", "layer.1.w", "16 x 64 F32, 4.10 kB", "kept: a bias", "I64 is not one of"):
        assert name in out
    for where in (*result["tensors"], result["total"]):
        for e in where.get("errors", {}).values():
            assert f"{e['bits_per_value']:.3f}" in out
            assert f"{100 * e['relative_error']:.3f}" in out
            assert f"{100 * (e['choice_share'] or 0):.1f}" in out
    assert out.splitlines()[1].startswith("Total of 3 tensors")
    assert f"{result['total']['errors']['if4']['sqnr_db']:.2f}" in "\n".join(out.splitlines()[:8])


def test_of_many_tensors_the_worst_and_the_best_are_shown(capsys, tmp_path):
    # A block with one large value errs little in MXFP4 relative to its signal: errors fall from a to i.
    tensors = {name: normal(8, 64) for name in "abcdefghi"}
    for i, x in enumerate(tensors.values()):
        x[:, ::32] = 4.0 * (1 + i)
    path = write(tmp_path / "m.safetensors", tensors)
    by_error = sorted(
        run_json(capsys, path, "--formats", "mxfp4")["tensors"], key=lambda t: -t["errors"]["mxfp4"]["relative_error"]
    )
    assert run("compare", path, "--formats", "mxfp4") == 0
    out = capsys.readouterr().out
    shown = [line.split()[0] for line in out.splitlines() if "8x64" in line]
    assert shown == [t["name"] for t in (*by_error[:3], *by_error[-3:])]
    assert len(out.splitlines()) < 30 and "--all" in out
    assert run("compare", path, "--formats", "mxfp4", "--all") == 0
    assert capsys.readouterr().out.count("8 x 64 F32") == 9


def test_folders_indices_and_stdin_are_read(capsys, tmp_path, monkeypatch):
    first = write(tmp_path / "m-00001-of-00002.safetensors", {"a": normal(16, 64)})
    write(tmp_path / "m-00002-of-00002.safetensors", {"b": normal(16, 64, seed=1)})
    index = tmp_path / "m.safetensors.index.json"
    files = {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": files}))
    for where in (tmp_path, index):
        result = run_json(capsys, where, "--formats", "mxfp4")
        assert result["source"] == where.name and [t["name"] for t in result["tensors"]] == ["a", "b"]
    with first.open("rb") as file:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=file))
        assert run_json(capsys, "-", "--formats", "mxfp4")["tensors"] == result["tensors"][:1]


def test_vectors_are_taken_on_request(capsys, model):
    result = run_json(capsys, model, "--formats", "mxfp4", "--vectors")
    assert [t["status"] for t in result["tensors"]] == ["skipped", *["quantized"] * 4]


def test_axis_turns_the_blocks(capsys, tmp_path):
    x = normal(64, 48)
    turned = run_json(capsys, write(tmp_path / "t.safetensors", {"w": x.T.copy()}), "--formats", "if4", "--axis", "-2")
    straight = run_json(capsys, write(tmp_path / "s.safetensors", {"w": x}), "--formats", "if4")
    assert turned["tensors"][0]["shape"] == [48, 64]
    assert turned["total"] == straight["total"]


def test_a_tensor_with_a_nan_is_skipped_aloud(capsys, tmp_path):
    bad = normal(4, 32)
    bad[2, 3] = np.nan
    path = write(tmp_path / "a.safetensors", {"bad": bad, "good": normal(4, 32)})
    result = run_json(capsys, path, "--formats", "mxfp4")
    assert result["tensors"][0]["reason"] == "1 of its values are not finite in float32"
    assert run("compare", path, "--formats", "mxfp4", "--all") == 0
    assert "not finite in float32" in capsys.readouterr().out


def test_without_a_file_samples_stand_beside_published_numbers(capsys):
    result = run_json(capsys, "--formats", "mxfp4")
    assert result["source"] == analysis.SAMPLE_SOURCE
    assert len(result["tensors"]) == 39
    rows = {row["distribution"]: row for row in result["synthetic"]}
    assert list(rows) == list(analysis.DISTRIBUTIONS)
    assert rows["normal"]["published"][0]["source"] == "arXiv 2603.28765, Table 1"
    # Of 2^20 values: the figure's own deviation is below 0.3 %.
    assert rows["normal"]["error"]["normalized_mse"] == pytest.approx(13.32e-3, rel=0.01)

    assert run("compare", "--formats", "mxfp4") == 0
    out = capsys.readouterr().out
    assert "13.3" in out and "(13.2; 13.32)" in out and "arXiv 2603.28765" in out


def test_out_writes_pictures(capsys, model, tmp_path):
    folder = tmp_path / "new" / "plots"
    assert run("compare", model, "--formats", "if4", "mxfp4", "--out", folder) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["choices.png", "errors.png", "pareto.png"]
    for path in folder.iterdir():
        head = path.read_bytes()[:24]
        assert head.startswith(b"\x89PNG")
        assert min(struct.unpack(">II", head[16:])) > 200
    assert "wrote" in capsys.readouterr().err


def test_out_writes_no_choices_where_there_are_none(model, tmp_path):
    assert run("compare", model, "--formats", "mxfp4", "--out", tmp_path / "plots") == 0
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["errors.png", "pareto.png"]


@pytest.mark.bert
def test_compare_of_a_pretrained_bert(capsys, bert_file):
    result = run_json(capsys, bert_file, "--formats", "if4", "mxfp4")
    assert len([t for t in result["tensors"] if t["status"] == "quantized"]) == 37  # without embeddings
    e = result["total"]["errors"]["if4"]
    assert e["bits_per_value"] == pytest.approx(4.5, abs=1e-3)
    assert e["sqnr_db"] == pytest.approx(22.01, abs=0.006)
    assert result["total"]["errors"]["mxfp4"]["sqnr_db"] == pytest.approx(18.45, abs=0.006)


# --- bad input -------------------------------------------------------------------------------------------------------


def fails(capsys, *arguments):
    assert run("compare", *arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ifjax: error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("size", [0, 5, 200, 5000])
def test_a_cut_file_is_an_error(capsys, model, size):
    model.write_bytes(model.read_bytes()[:size])
    assert "model.safetensors is not a whole safetensors file" in fails(capsys, model)


def test_a_file_of_something_else_is_an_error(capsys, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("not the tensors you are looking for")
    assert "a.safetensors is not a whole safetensors file" in fails(capsys, path)


def test_a_missing_file_and_an_empty_folder_are_errors(capsys, tmp_path):
    assert f"{tmp_path / 'none'}: No such file or directory" in fails(capsys, tmp_path / "none")
    assert f"{tmp_path} holds no safetensors file" in fails(capsys, tmp_path)


@pytest.mark.parametrize(
    "tensors, why",
    [
        ({}, "it holds no tensors"),
        ({"ids": np.arange(64).reshape(8, 8)}, "1 tensors skipped, I64 is not one of F32, BF16, F16, F64"),
        ({"a": normal(64), "b": normal(8)}, "2 tensors kept, not a matrix (--vectors takes them too)"),
        ({"w": np.zeros((4, 0), np.float32)}, "1 tensors kept, not a matrix"),
        ({"w": np.full((4, 32), np.inf, np.float32)}, "128 of its values are not finite"),
    ],
)
def test_a_file_with_nothing_to_measure_is_an_error(capsys, tmp_path, tensors, why):
    path = write(tmp_path / "a.safetensors", tensors)
    assert why in fails(capsys, path, "--formats", "mxfp4")


def test_out_that_is_a_file_is_an_error(capsys, model):
    assert "model.safetensors: File exists" in fails(capsys, model, "--out", model)


def test_out_without_matplotlib_is_an_error_before_the_work(capsys, model, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'ifjax[viz]'" in fails(capsys, model, "--out", tmp_path)


def test_python_m_ifjax_exits_with_the_code_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "ifjax", "compare", str(tmp_path / "none.safetensors")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == f"ifjax: error: {tmp_path / 'none.safetensors'}: No such file or directory\n"


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_reader_that_leaves_early_is_no_error(model):
    command = [sys.executable, "-m", "ifjax", "compare", str(model), "--formats", "mxfp4", "--json"]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ran = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)
    assert (ran.returncode, ran.stderr) == (0, "")


# --- formats ---------------------------------------------------------------------------------------------------------


def test_formats_are_listed_by_bits_then_error(capsys):
    assert run("formats", "nvfp4", "if4", "mxfp4") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()[:1].isalpha()][1:]
    assert [row[:5] for row in rows] == [
        ["mxfp4", "4.25", "13.32", "8.91", "32"], ["if4", "4.5", "6.15", "9.44", "16"],
        ["nvfp4", "4.5", "9.03", "9.44", "16"],
    ]  # fmt: skip


def test_all_formats_are_listed_without_measuring(capsys):
    assert run("formats", "--quick", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["format"] for row in rows} == {fmt.name for fmt in ifjax.FORMATS.values()}
    assert [row["bits"] for row in rows] == sorted(row["bits"] for row in rows)
    assert all(row["error"] is None and row["grids"] for row in rows)
    with pytest.raises(SystemExit):
        run("formats", "if5")
    assert "did you mean" in capsys.readouterr().err
