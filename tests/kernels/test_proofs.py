"""Kernels are taken on a device once they have proven themselves there: broken ones, by which all goes on as before."""

import json
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import ifjax
from ifjax import cli
from ifjax.arrays import ENCODERS, Encoder
from ifjax.codec import decode
from ifjax.codec.blocks import merge_blocks
from ifjax.numerics import kernels, proofs, unpack
from ifjax.products import BACKENDS, Backend
from pallas_kernels import tpu_blocks


class Zeros:
    """Kernels that forget to write their results; and count how often they are asked."""

    Noise, PARTS, supports = tpu_blocks.Noise, tpu_blocks.PARTS, staticmethod(tpu_blocks.supports)
    tables = staticmethod(tpu_blocks.tables)

    def __init__(self):
        self.calls = 0

    def encode(self, x, scalars, tables, noise, *, codec, axis, wants_codes, wants_values):
        self.calls += 1
        packed = [x.shape[0], *x.shape[1:]]
        packed[axis] = packed[axis] // codec.block
        headers = jnp.zeros(packed, jnp.uint8)
        codes = jnp.repeat(headers, codec.block * codec.bits // 8, axis)
        return [codes, headers] * wants_codes + [jnp.zeros_like(x)] * wants_values

    def decode(self, codes, headers, tables, *, codec, axis, length, dtype):
        raise RuntimeError("does not compile here")


class Right(Zeros):
    """A decoder that decodes."""

    def decode(self, codes, headers, tables, *, codec, axis, length, dtype):
        self.calls += 1
        headers = jnp.repeat(headers, codec.block, axis).astype(jnp.int32)
        codes = merge_blocks(unpack(codes, codec.bits, axis), axis)
        return decode(codes, headers, codec.fmt).astype(dtype)


@pytest.fixture
def take(monkeypatch, tmp_path):
    """take(kernels): CPUs have them from now on, and nothing is known of them but what is on disk."""
    monkeypatch.setenv("IFJAX_CACHE", str(tmp_path / "cache"))

    def take(module):
        jax.clear_caches()
        monkeypatch.setattr(proofs, "_verdicts", {})
        proofs._warned.clear()
        monkeypatch.setattr(ENCODERS, "_records", {"mine": Encoder("mine", "cpu", "cpu", lambda: module)})
        return module

    yield take
    jax.clear_caches()


def test_broken_kernels_are_told_of_once_and_not_taken(take):
    x = jnp.asarray(np.random.default_rng(1).standard_normal((8, 32)), jnp.float32)
    with kernels("never"):
        q = ifjax.quantize(x, "mxfp4")
        y = q.dequantize()
    broken = take(Zeros())
    with pytest.warns(RuntimeWarning, match="mine: quantize float32 mxfp4.*numbers of result 0 differ.*doctor") as told:
        got = jax.jit(lambda x: ifjax.quantize(x, "mxfp4"))(x)
        assert_array_equal(got.codes, q.codes)
        assert_array_equal(got.dequantize(), y)  # its kernel raises
        assert ifjax.quantize(x, "mxfp4").shape == x.shape
    assert len([w for w in told if "doctor" in str(w.message)]) == 1
    assert broken.calls == 1
    found = proofs.verdicts("cpu")
    assert [fault.split()[0] for fault in found.values() if fault] == ["27283", "RuntimeError:"]
    assert "does not compile here" in [*found.values()][1]
    path, reason = ifjax.explain_quantize(x, "mxfp4")
    assert path == "xla"
    assert "failed its check on cpu" in reason
    with kernels("always"):
        assert not ifjax.quantize(x, "mxfp4").codes.any()


@pytest.mark.slow
def test_a_product_whose_kernel_is_broken_goes_by_xla(take, monkeypatch):
    kernel = SimpleNamespace(
        supports=lambda *_, m: None, pack=lambda nibbles, scales, decoding: (nibbles, scales),
        matmul=lambda x, words, scales, factor, *, n, k, decoding, out_dtype: jnp.zeros((len(x), n), out_dtype),
    )  # fmt: skip
    take(None)
    ENCODERS._records.clear()
    monkeypatch.setattr(BACKENDS, "_records", {"mine": Backend("mine", "cpu", "cpu", lambda: kernel)})
    x, w = (np.random.default_rng(i).standard_normal((3, 32)).astype(np.float32) for i in range(2))
    q = ifjax.quantize(w, "mxfp4")
    with pytest.warns(RuntimeWarning, match="mine: product of 2 rows of float32 with mxfp4.*sums differ"):
        y = ifjax.einsum("mk,nk->mn", x, q)
    np.testing.assert_allclose(y, x @ np.asarray(q.dequantize()).T, rtol=1e-5, atol=1e-5)
    with kernels("always"):
        assert not ifjax.einsum("mk,nk->mn", x, q).any()


def test_what_was_found_holds_in_the_next_process(take, tmp_path):
    codes, scales = (jnp.asarray(np.random.default_rng(2).integers(0, 256, s, np.uint8)) for s in ((8, 16), (8, 1)))
    with kernels("never"):
        like = ifjax.quantize(jnp.ones((8, 32)), "mxfp4")
    q = like.replaced(codes=codes, scales=scales)
    right = take(Right())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q.dequantize()
    assert right.calls == 2  # the small case, and the call
    (file,) = (tmp_path / "cache").iterdir()
    assert jax.__version__ in file.name
    assert list(json.loads(file.read_text()).values()) == [None]
    right = take(Right())
    q.dequantize()
    assert right.calls == 1
    file.write_text("{")  # cut off
    right = take(Right())
    q.dequantize()
    assert right.calls == 2
    proofs.forget("cpu")
    assert proofs.verdicts("cpu") == {}


class Raises(Zeros):
    """Kernels that no compiler takes."""

    def encode(self, *args, **settings):
        raise RuntimeError("does not compile here")


@pytest.mark.slow
def test_doctor_tells_what_is_here_and_which_kernels_pass(take, capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["jax"] == jax.__version__
    assert report["devices"][0] == "cpu cpu"
    assert {kernel["name"]: kernel["here"] for kernel in report["kernels"]}["tpu_blocks"] is False
    assert report["checks"] == {}
    take(Raises())
    assert cli.main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert "FAILS   mine: dequantize bfloat16 if4" in told
    assert "RuntimeError: does not compile here" in told


def test_devices_that_are_only_named_are_not_asked(take):
    zeros = take(Zeros())
    device = jax.sharding.AbstractDevice("cpu", num_cores=1, platform="cpu")
    mesh = jax.sharding.AbstractMesh((1,), ("one",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(lambda x: ifjax.quantize(x, "mxfp4"), jax.ShapeDtypeStruct((8, 32), jnp.float32))
    assert zeros.calls == 1
    assert proofs.verdicts("cpu") == {}
