"""The training benchmark at its smallest: losses fall by every recipe, and killed runs go on as if nothing had been."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ifjax.training import RECIPES

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "train_lm.py"
FALL = 2.3  # nats a byte in 30 steps; measured 2.9
GAP = 0.15  # to bf16


@pytest.fixture(scope="module")
def train_lm():
    """The script, which looks for its neighbours where it lies."""
    pytest.importorskip("flax")
    pytest.importorskip("orbax.checkpoint", reason="pip install orbax-checkpoint")
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("train_lm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_lm"] = module  # where dataclasses look
    spec.loader.exec_module(module)
    yield module
    module._compiled.cache_clear()
    sys.path.remove(str(SCRIPT.parent))
    del sys.modules["train_lm"]


@pytest.fixture(autouse=True)
def _as_optax_promotes():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def tiny(train_lm):
    return train_lm.Settings(
        layers=2, dim=32, heads=2, hidden=64, dtype="float32", steps=30, batch=8, length=32, rate=2e-2, warmup=3,
        windows=16, every=10,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(train_lm):
    return train_lm.load()


@pytest.fixture(scope="module")
def trained(train_lm, tiny, data, tmp_path_factory):
    """Records by recipe and seed, each made once."""
    out, records = tmp_path_factory.mktemp("runs"), {}

    def run(recipe, seed):
        if (recipe, seed) not in records:
            records[recipe, seed] = train_lm.train(recipe, seed, tiny, data, out)
        return records[recipe, seed]

    run.out = out
    return run


def assert_falls(record, fall=FALL):
    losses = np.array(record["losses"])
    assert losses.shape == (record["settings"]["steps"],) and np.isfinite(losses).all()
    assert losses[0] > math.log(256) - 0.5
    assert losses[-5:].mean() < losses[0] - fall
    assert list(record["validation"]) == ["10", "20", "30"]
    assert record["validation loss"] == record["validation"]["30"] < losses[0] - fall


# One recipe of each kind: every other is one of these with another format or fewer products, and a compile of a minute.
KINDS = ["bf16", "nvfp4", "ue5m3", "quartet2"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", KINDS)
def test_the_loss_falls(trained, recipe):
    record, bf16 = trained(recipe, 0), trained("bf16", 0)
    assert_falls(record)
    if recipe != "bf16":
        assert record["losses"] != bf16["losses"]
        assert abs(record["validation loss"] - bf16["validation loss"]) < GAP


class Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("recipe, options", [("bf16", {"moments": "if6"})])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(train_lm, tiny, data, tmp_path, recipe, options):
    settings, stopped, seen = dataclasses.replace(tiny, **options), tmp_path / "stopped", []
    whole = train_lm.train(recipe, 0, settings, data, tmp_path / "whole")
    assert_falls(whole)

    def watch(step, loss):
        seen.append(step)
        if step in (7, 24) and seen.count(step) == 1:  # before the first checkpoint, and after the second
            raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            train_lm.train(recipe, 0, settings, data, stopped, watch=watch)
    record = train_lm.train(recipe, 0, settings, data, stopped, watch=watch)
    assert seen == [*range(1, 8), *range(1, 25), *range(21, 31)]
    for key in ("losses", "validation"):
        assert record[key] == whole[key]
    assert train_lm.train(recipe, 0, settings, data, stopped, watch=watch) == record
    assert len(seen) == 41  # it was there already


@pytest.mark.slow
def test_a_killed_process_goes_on_in_another(train_lm, tiny, tmp_path):
    flags = [str(a) for key, value in dataclasses.asdict(tiny).items() if value not in ("", False)
             for a in (f"--{key}", value)]  # fmt: skip
    command = [sys.executable, str(SCRIPT), "--recipes", "nvfp4", "--seeds", "0", *flags]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([*command, "--out", str(killed)], **quiet)
    folder, deadline = killed / "checkpoints" / "nvfp4-seed0", time.monotonic() + 600
    while not (folder / "10").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "nvfp4-seed0.json").exists()
    # Both by processes of one kind: among the eight devices of this one, sums are taken in another order.
    for out in (killed, whole):
        subprocess.run([*command, "--out", str(out)], check=True, timeout=600, **quiet)
    records = [json.loads((out / "nvfp4-seed0.json").read_text()) for out in (killed, whole)]
    assert records[0]["losses"] == records[1]["losses"]


@pytest.mark.slow
def test_seeds_differ(trained):
    first, second = (trained("bf16", seed)["losses"] for seed in (0, 1))
    assert not set(first) & set(second)


@pytest.mark.slow
def test_other_settings_are_refused(train_lm, tiny, data, trained):
    trained("bf16", 0)
    with pytest.raises(ValueError, match=r"bf16-seed0\.json is of a run with rate 0\.02, not 0\.1: remove it, or"):
        train_lm.train("bf16", 0, dataclasses.replace(tiny, rate=0.1), data, trained.out)
    with pytest.raises(ValueError, match="layers must be at least 2: the last block stays"):
        dataclasses.replace(tiny, layers=1)
    with pytest.raises(ValueError, match=r"rotates nothing, and if4_mseden must: use one of bf16, nvfp4"):
        train_lm.rules("if4_mseden", dataclasses.replace(tiny, ngpt=True))


def test_no_file_is_for_training_and_validation(train_lm, tmp_path):
    import sysconfig

    training, validation = train_lm.split(Path(sysconfig.get_path("stdlib")))
    assert not set(training) & set(validation)
    assert len(validation) > 20 and len(training) > 10 * len(validation)
    assert not [name for name in (*training, *validation) if "site-packages" in name or "/test/" in name]
    for i in range(40):
        (tmp_path / f"m{i}.py").write_text(f"x = {i:03}")
    names = train_lm.split(tmp_path)
    data = train_lm.load(tmp_path)
    for part, own in zip(data[:2], names, strict=True):
        assert part.tobytes() == b"".join((tmp_path / name).read_bytes() + b"\0" for name in own)
    with pytest.raises(SystemExit, match="too few"):
        train_lm.load(tmp_path, length=10**6)


def test_batches_are_of_the_seed_and_the_step(train_lm, tiny):
    training = jnp.arange(256, dtype=jnp.uint8)
    key = jax.random.key(0)
    batches = [train_lm.batch_at(training, key, jnp.int32(step), tiny) for step in (0, 0, 1)]
    np.testing.assert_array_equal(batches[0], batches[1])
    assert not np.array_equal(batches[0], batches[2])
    assert batches[0].shape == (8, 33)
    np.testing.assert_array_equal(np.diff(np.asarray(batches[0], np.int32)), 1)


@pytest.mark.slow
def test_a_position_sees_nothing_of_what_follows(train_lm, tiny):
    """Of the float model: an amax over all tokens lets a quantized one see how large others are."""
    tokens = jnp.arange(32, dtype=jnp.int32)[None] * 7 % 256
    tokens = jnp.concatenate([tokens, tokens.at[0, 20].set(99)])
    model = train_lm.Transformer(dataclasses.replace(tiny, ngpt=True, mlp="gelu"))
    logits, _ = jax.jit(model.init_with_output)(jax.random.key(0), tokens)
    changed = np.abs(np.asarray(logits[0] - logits[1])).max(-1) > 1e-5
    assert changed.tolist() == [False] * 20 + [True] * 12


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, fall", [({"ngpt": True}, 1.8), ({"dtype": "bfloat16", "mlp": "gelu", "remat": True}, FALL)]
)
def test_the_loss_falls_with_options(train_lm, tiny, data, tmp_path, options, fall):
    assert_falls(train_lm.train("nvfp4", 0, dataclasses.replace(tiny, **options), data, tmp_path), fall)


def test_matrices_of_ngpt_are_put_on_the_sphere(train_lm):
    a = jnp.arange(1.0, 25).reshape(2, 4, 3)
    params = {"layers": {"qkv": {"kernel": a}, "down": {"kernel": a}}, "embed": {"embedding": a[0]}, "gain": a[0, 0]}
    new = train_lm.on_sphere(params)
    layers = new["layers"]
    lengths = [np.linalg.norm(layers["qkv"]["kernel"], axis=-2), np.linalg.norm(layers["down"]["kernel"], axis=-1),
               np.linalg.norm(new["embed"]["embedding"], axis=-1)]  # fmt: skip
    for length in lengths:
        np.testing.assert_allclose(length, 1, rtol=1e-5)
    np.testing.assert_array_equal(new["gain"], params["gain"])
    recipe = train_lm.bounded(RECIPES["nvfp4"])
    assert recipe.fprop.lhs.amax == recipe.fprop.rhs.amax == recipe.wgrad.lhs.amax == 1.0
    assert recipe.dgrad.lhs.amax is None and recipe.wgrad.hadamard is None


def made_up(out, losses, **changes):
    """Runs of three steps with these validation losses, by recipe."""
    for recipe, by_seed in losses.items():
        for seed, loss in enumerate(by_seed):
            run = {
                "recipe": recipe, "seed": seed, "settings": {"steps": 3, "every": 2}, "data": "abc", "parameters": 10,
                "validation loss": loss, "seconds a step": 0.5 if recipe == "bf16" else 1.0, "temporary bytes": 2e6,
                "machine": {"processor": "none"}, "validation": {"2": 2 * loss, "3": loss}, "losses": [3.0, 2.0, loss],
            }  # fmt: skip
            (out / f"{recipe}-seed{seed}.json").write_text(json.dumps(run | changes))


def test_the_summary_of_made_up_runs(train_lm, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    losses = {"bf16": [1.0, 1.1, 0.9], "if4": [1.03, 1.14, 0.95], "nvfp4": [1.041, 1.139, 0.949]}
    made_up(tmp_path, losses)
    runs, times = train_lm.read(tmp_path)
    assert list(runs) == ["bf16", "nvfp4", "if4"] and times == {}
    mean, error = train_lm.gap(runs, "if4")
    assert mean == pytest.approx(0.04) and error == pytest.approx(0.01 / 3**0.5)
    table = {row["recipe"]: row for row in train_lm.rows(runs, times)}
    assert table["if4"] == {
        "recipe": "if4", "seeds": "0 1 2", "validation loss": "1.0400", "gap to bf16": "+0.0400",
        "its standard error": "0.0058", "steps a second": "1", "speed / bf16": "0.50", "temporary MB": "2",
    }  # fmt: skip
    assert table["bf16"]["gap to bf16"] == "" and table["bf16"]["speed / bf16"] == "1.00"

    text = train_lm.verdict(runs)
    assert "from the lowest loss up (bf16, if4, nvfp4) they cannot order if4 and nvfp4, which" in text
    bound = float(re.search(r"more than ([0-9.]+) nats", text)[1])
    assert 0.003 < bound < 0.04

    train_lm.main(["--summary", "--out", str(tmp_path), "--markdown", str(tmp_path / "table.md")])
    assert "0.0058" in capsys.readouterr().out
    assert "| if4 | 0 1 2 | 1.0400 | +0.0400 | 0.0058 | 1 | 0.50 | 2 |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

    times = {name: {"seconds a step": 0.1 * k, "times bf16": k} for name, k in [("bf16", 1), ("if4", 4)]}
    timed = {"settings": {"steps": 3, "every": 2}, "times": times}
    (tmp_path / "times.json").write_text(json.dumps(timed))
    rows = {row["recipe"]: row for row in train_lm.rows(*train_lm.read(tmp_path))}
    assert rows["if4"]["speed / bf16"] == "0.25" and rows["if4"]["steps a second"] == "2.5"


def test_the_summary_says_what_it_cannot(train_lm, tmp_path):
    with pytest.raises(ValueError, match="has no runs: run without --summary first"):
        train_lm.read(tmp_path)
    made_up(tmp_path, {"bf16": [1.0], "if4": [1.1]})
    runs, _ = train_lm.read(tmp_path)
    assert "on 1 common seeds nothing can be told" in train_lm.verdict(runs)
    assert math.isnan(train_lm.gap(runs, "if4")[1])
    made_up(tmp_path, {"nvfp4": [1.1]}, data="other")
    with pytest.raises(ValueError, match=r"nvfp4-seed0\.json is of a run with data 'other', not 'abc'"):
        train_lm.read(tmp_path)
