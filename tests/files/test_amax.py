"""An amax that no quantizer gives is refused where it is saved and read: values would silently be others."""

import jax
import numpy as np
import pytest

import ifjax
from ifjax.cli.main import main
from ifjax.files import FileError, checkpoint, orbax

X = np.random.default_rng(0).standard_normal((4, 64), np.float32)


@pytest.fixture(scope="module")
def q():
    return ifjax.quantize(X, "nvfp4", amax_axes=(0,))


def with_amax(q, value):
    return q.replaced(amax=np.array([1, 2, value, 3], np.float32))


FAULTS = {np.nan: "amax nan", np.inf: "amax inf", -1.0: "amax -1.0", 0.0: "amax 0, by which values read as 0"}


@pytest.mark.parametrize("value", FAULTS)
def test_an_amax_that_cannot_be_is_told_by_name(q, value, tmp_path, monkeypatch, capsys):
    path, tree = tmp_path / "m.safetensors", {"layer": {"w": with_amax(q, value)}, "b": X[0]}
    with pytest.raises(ValueError, match=rf"'layer/w' has {FAULTS[value]}"):
        ifjax.save_file(tree, path)
    assert not path.exists()
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "amax_fault", lambda *given: None)
        ifjax.save_file(tree, path)
    message = rf"m.safetensors: 'layer/w' has {FAULTS[value]}"
    with pytest.raises(FileError, match=message):
        ifjax.load_file(path)
    like = jax.eval_shape(lambda: {"layer": {"w": q}, "b": X[0]})
    with pytest.raises(FileError, match=message):
        ifjax.load_file(path, like=like)
    np.testing.assert_array_equal(ifjax.open_file(path)["b"], X[0])  # others can be read
    assert main(["dequantize", str(path), str(tmp_path / "out.safetensors")]) == 1
    assert FAULTS[value] in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("value", FAULTS)
def test_orbax_tells_it_too(q, value, tmp_path, monkeypatch):
    pytest.importorskip("orbax.checkpoint")
    tree = jax.tree.map(jax.numpy.asarray, {"w": with_amax(q, value)})
    with pytest.raises(ValueError, match=rf"'w' has {FAULTS[value]}"):
        orbax.save_orbax(tree, tmp_path / "1")
    with monkeypatch.context() as patched:
        patched.setattr(orbax, "amax_fault", lambda *given: None)
        orbax.save_orbax(tree, tmp_path / "2")
    for like in (None, jax.eval_shape(lambda: tree)):
        with pytest.raises(ValueError, match=rf"'w' has {FAULTS[value]}"):
            orbax.load_orbax(tmp_path / "2", like)


def test_an_amax_of_zero_of_zeros_is_one(tmp_path):
    """A dead expert, and one whose only block that counts is NaN: both are what they were."""
    x = X.copy()
    x[1], x[2], x[2, 0] = 0, 0, np.nan
    q = ifjax.quantize(x, "nvfp4", amax_axes=(0,))
    np.testing.assert_array_equal(np.asarray(q.amax)[1:3], 0)
    ifjax.save_file({"w": q}, tmp_path / "m.safetensors")
    again = ifjax.load_file(tmp_path / "m.safetensors")["w"]
    np.testing.assert_array_equal(again.codes, q.codes)
    np.testing.assert_array_equal(again.amax, q.amax)
