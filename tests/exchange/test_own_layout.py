"""A layout defined outside the library, in less than 25 lines, goes everywhere that the built-in ones go."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import ifjax
from ifjax import exchange
from ifjax.exchange import Blocks, Declared, Layout, Part


def define():
    """Scales first and reversed, codes in the other order of nibbles, the factor as a power of two and a rest."""

    def read(fmt, codes, scales, factor):
        return Blocks(codes >> 4 | codes << 4, scales[..., ::-1], multiplier=np.ldexp(factor[0], int(factor[1])))

    def write(b):
        fraction, exponent = np.frexp(b.multiplier)
        return b.codes >> 4 | b.codes << 4, b.scales[..., ::-1], np.array([fraction, exponent], np.float32)

    parts = (
        Part("{}.nibbles", ("U8",), lambda size: (size.rows, size.columns // 2)),
        Part("{}.unit", ("U8",), lambda size: (size.rows, size.blocks)),
        Part("{}.f", ("F32",), lambda size: (2,)),
    )
    return Layout(
        "mine v1", "mine", "v1", parts, "nvfp4", read=read, write=write,
        config=lambda model: {"quant_method": "mine", "layers": sorted(*model.groups.values())},
        declares=lambda layout, config: Declared() if config.get("quant_method") == "mine" else None,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def mine(monkeypatch):
    monkeypatch.setattr(exchange.LAYOUTS, "_records", dict(exchange.LAYOUTS))
    return exchange.LAYOUTS.register(define())


def test_it_takes_at_most_25_lines():
    assert len([line for line in inspect.getsource(define).splitlines() if line.strip()]) <= 25


@pytest.mark.by_default("fouroversix")
@pytest.mark.parametrize("fmt", ["nvfp4", "fouroversix"])
def test_a_tensor_goes_there_and_back(fmt, tmp_path):
    w = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    q = ifjax.quantize(jnp.asarray(w), fmt)
    arrays, config = exchange.export_tensors({"up.weight": q, "up.bias": np.ones(3)}, "mine")
    assert set(arrays) == {"up.nibbles", "up.unit", "up.f", "up.bias"}
    assert config == {"quant_method": "mine", "layers": ["up"]}
    assert_array_equal(arrays["up.nibbles"], np.asarray(q.codes) >> 4 | np.asarray(q.codes) << 4)
    back = exchange.import_tensors(arrays, config, fmt=fmt)["up.weight"]
    assert back.fmt == q.fmt
    assert_array_equal(back.codes, q.codes)
    assert_array_equal(back.scales, q.scales)
    np.testing.assert_allclose(back.dequantize(), q.dequantize(), rtol=2.0**-23)
    # By the names, from a folder, and as a tensor that is quantized already.
    assert "up.weight" in exchange.import_tensors(arrays)
    exchange.save({"up.weight": q}, tmp_path / "model", "mine")
    assert_array_equal(exchange.load(tmp_path / "model")["up.weight"].codes, q.codes)
    (found,) = exchange.recognize({name: exchange.Spec.of(a) for name, a in arrays.items()})
    assert (found.name, found.layout.name) == ("up.weight", "mine v1")


def test_what_it_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="if4 marks the blocks"):
        exchange.export_tensor(ifjax.quantize(jnp.ones((4, 32)), "if4"), "mine")
    with pytest.raises(ValueError, match=r"another layout in ifjax\.exchange\.LAYOUTS"):
        exchange.LAYOUTS.register(define())
