"""The programs that check and measure kernels on a GPU and a TPU, as far as a machine without either runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(script, *options):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, ROOT / "benchmarks" / script, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["gpu.py", "tpu.py"])
def test_dry_runs_check_interpreted_kernels_and_print_the_tables(script, tmp_path):
    done = run(script, "--dry", "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "bits golden mxfp4" in done.stderr
    assert "WRONG" not in done.stderr
    assert done.stdout.startswith(f"# {script} on cpu, dry: these are no figures")
    assert "| 1 | 128 x 128 | if4, bfloat16 |" in done.stdout
    assert (tmp_path / "figures.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["gpu.py", "tpu.py"])
def test_nothing_is_measured_elsewhere(script):
    done = run(script)
    assert (done.returncode, done.stdout) == (2, "")
    assert "run it there" in done.stderr
