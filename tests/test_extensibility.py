"""Formats, searches, roundings and backends are data: each is defined here, outside the library, in at most 25 lines,
and goes wherever a named one does. An exchange layout of one's own is in tests/exchange/test_own_layout.py.
"""

import dataclasses
import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import ifjax
from ifjax import Candidate, Format, Grid, Scale, TableScale, plots
from ifjax.codec import Rounding, Search
from ifjax.formats import SCALES
from ifjax.formats.grids import E2M1
from ifjax.products.backends import BACKENDS, Backend


def unsigned_scales():
    """UE5M3: E2M1 under block scales of five exponent and three mantissa bits and no sign."""
    scale = TableScale.minifloat("unsigned e5m3", 5, 3, 15)
    return Format("unsigned_scales", (Candidate(E2M1),), 16, scale, tensor_peak=scale.values[scale.top])


def four_grids():
    """Two grids of sixteen free values each and their mirror images: two bits of a header say which."""
    narrow = (-0.6, -0.45, -0.34, -0.26, -0.18, -0.11, -0.05, 0.0, 0.06, 0.13, 0.21, 0.3, 0.4, 0.53, 0.71, 1.0)
    wide = (-0.95, -0.7, -0.5, -0.37, -0.26, -0.16, -0.08, 0.0, 0.08, 0.16, 0.26, 0.37, 0.5, 0.65, 0.82, 1.0)
    grids = []
    for name, values in (("narrow", narrow), ("wide", wide)):
        mirrored = tuple(-v for v in reversed(values))
        grids += [Grid(name, values, "lower"), Grid(f"{name} mirrored", mirrored, "lower")]
    scale = TableScale.minifloat("e3m3", 3, 3, 3)
    return Format("four_grids", tuple(map(Candidate, grids)), 16, scale, peak=1.0, tensor_peak=28.0)


def special_value():
    """RaZeR: the code of -0 is worth 5 or -5, as the block chooses."""
    grids = [
        Grid(f"E2M1 and {value:g}", (*E2M1.values[:8], value, *E2M1.values[9:]), preferred=(8,))
        for value in (5.0, -5.0)
    ]
    return Format("special_value", tuple(map(Candidate, grids)), 16, peak=6.0, prevent_zero=True)


E6M2 = TableScale("e6m2", tuple((1 + m / 4) * 2.0**e for e in range(-48, 16) for m in range(4))[:-1], nan=0xFF)


@dataclasses.dataclass(frozen=True)
class ThreeLevels(Scale):
    """HiFloat4's shape: a scale for 64 values, a bit for each 8 of them and one for each 4 that double it."""

    name: str = "three levels"
    bits, nbytes, runs, nan, top = 32, 4, (8, 4), 0xFF, 0xFE

    def encode(self, scale, eights, fours):
        word = E6M2.encode(scale / 4)
        unit = E6M2.decode(word)
        doubled = [(part >= 2 * unit).astype(jnp.int32) for part in eights]
        for j, bit in enumerate(doubled):
            word |= bit << 8 + j
        for k, part in enumerate(fours):
            word |= (part >= jnp.where(doubled[k // 2] == 1, 2 * unit, unit)).astype(jnp.int32) << 16 + k
        return word

    def decode(self, payload, place=0):
        shift = (payload >> 8 + place // 8 & 1) + (payload >> 16 + place // 4 & 1)
        return E6M2.decode(payload & 0xFF) * (1 << shift).astype(jnp.float32)


def three_levels():
    scale = SCALES.register(ThreeLevels())
    quarters = Grid.sign_magnitude("quarters", [c / 4 for c in range(8)], ties="away")
    return Format("three_levels", (Candidate(quarters),), 64, scale, tensor_peak=None)


FORMATS = [unsigned_scales, four_grids, special_value, three_levels]


@pytest.mark.by_default("three_levels")
@pytest.mark.parametrize("define", FORMATS)
def test_a_format_of_ones_own_goes_everywhere(define, tmp_path):
    fmt = define()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 2 * fmt.block + 3), np.float32)
    q = jax.jit(lambda x: ifjax.quantize(x, fmt))(x)
    values = np.asarray(q.dequantize())
    # quantized and decoded, packed or not, along any axis; no block errs much more than its 4 bits must
    assert np.square(values - x).sum() < 0.015 * np.square(x).sum()
    assert q.nbytes == 6 * 3 * fmt.block // 2 + 6 * 3 * fmt.scale.nbytes + 4 * fmt.has_tensor_scale
    assert_array_equal(ifjax.fake_quantize(x, fmt), values)
    assert_array_equal(ifjax.quantize(x.T, fmt, axis=0).dequantize(), values.T)
    if fmt.has_selector:
        assert len(np.unique(q.choices())) == len(fmt.decodings)
    # multiplied, with a gradient
    y = rng.standard_normal((2, x.shape[1]), np.float32)
    np.testing.assert_allclose(ifjax.einsum("mk,nk->mn", y, q), y @ values.T, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda y: ifjax.einsum("mk,nk->mn", y, q).sum())(y)
    np.testing.assert_allclose(gradient, np.broadcast_to(values.sum(0), y.shape), rtol=1e-5, atol=1e-5)
    # asked for by a rule
    packed, _ = ifjax.quantize_params({"w": jnp.asarray(x)}, ifjax.Rule(".*", fmt, axis=-1))
    assert_array_equal(packed["w"].codes, q.codes)
    # saved and loaded by content: the name is in no table
    assert fmt.name not in ifjax.FORMATS
    loaded = ifjax.load_file(ifjax.save_file({"w": q}, tmp_path / "w.safetensors"))["w"]
    assert loaded.fmt == fmt
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(q), strict=True):
        assert_array_equal(a, b)
    # drawn
    for figure in (plots.plot_grid(fmt), plots.plot_block(x[0, : fmt.block], fmt), plots.plot_bytes(q[0])):
        assert figure.axes


def rounding_away():
    """Magnitudes are rounded up, but for those that lie on the grid."""
    return Rounding("away", lambda key, shape, count: [jnp.full(shape, 0.499, jnp.float32)] * count)


def test_a_rounding_of_ones_own_is_an_argument_like_any():
    x = np.random.default_rng(1).standard_normal((4, 32), np.float32)
    q = ifjax.quantize(x, "nvfp4", rounding=rounding_away(), key=jax.random.key(0))
    values, nearest = (np.abs(np.asarray(a.dequantize())) for a in (q, ifjax.quantize(x, "nvfp4")))
    assert_array_equal(q.scales, ifjax.quantize(x, "nvfp4").scales)
    assert (values >= nearest).all() and (values > nearest).mean() > 0.3
    assert_array_equal(ifjax.fake_quantize(x, "nvfp4", rounding=rounding_away(), key=jax.random.key(0)), q.dequantize())


def decoupled():
    """Values are rounded with 0.85 to 1.15 of the block's own scale and decoded with one of five near it."""
    return Search("decoupled", offsets=range(-2, 3), multipliers=(0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15))


@pytest.mark.by_default("nvfp4")
@pytest.mark.parametrize("fmt", ["nvfp4", four_grids()], ids=["nvfp4", "four_grids"])
def test_a_search_of_ones_own_never_loses_and_writes_the_same_format(fmt):
    x = np.random.default_rng(2).standard_normal((64, 64), np.float32)
    q, plain = ifjax.quantize(x, fmt, search=decoupled()), ifjax.quantize(x, fmt)
    assert jax.tree.structure(q) == jax.tree.structure(plain)
    errors = [np.square(np.asarray(a.dequantize()) - x).reshape(-1, 16).sum(1) for a in (q, plain)]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all() and errors[0].sum() < 0.9 * errors[1].sum()


def backend():
    """A kernel for the machine "abacus": it keeps what it is given, and multiplies by XLA."""
    def matmul(x, words, scales, factor, *, n, k, decoding, out_dtype):
        table = jnp.asarray(decoding.magnitudes) * jnp.asarray(decoding.multipliers)[:, None].astype(jnp.float32)
        scales = jnp.repeat(scales, decoding.block, axis=1)
        w = table[scales >> 7, words & 7] * jnp.where(words >> 3, -1.0, 1.0)
        w *= jax.lax.bitcast_convert_type(scales & 0x7F, jnp.float8_e4m3fn).astype(jnp.float32)
        return (x.astype(jnp.float32) @ w.T * factor).astype(out_dtype)

    kernel = types.SimpleNamespace(
        supports=lambda decoding, dtype, *, m: None if m < 8 else "it counts seven rows at most",
        pack=lambda nibbles, scales, decoding: (nibbles, scales),
        unpack=lambda words, scales, n, k, decoding: (words, scales), matmul=matmul,
    )  # fmt: skip
    return Backend("abacus", "cpu", "abacus", lambda: kernel)


def test_a_backend_of_ones_own_is_planned_for_and_called(monkeypatch):
    monkeypatch.setattr(BACKENDS, "_records", dict(BACKENDS))
    BACKENDS.register(backend())
    x = np.random.default_rng(3).standard_normal((3, 64), np.float32)
    w = np.random.default_rng(4).standard_normal((5, 64), np.float32)
    q = ifjax.quantize(w, "if4")
    columns = ifjax.quantize(w.T, "if4", axis=0)
    for rows, path in ((3, "abacus"), (9, "xla")):
        assert ifjax.explain_matmul(np.ones((rows, 64), np.float32), columns, target="abacus").path == path
    y = ifjax.einsum("mk,nk->mn", x, q, target="abacus")
    np.testing.assert_allclose(y, x @ np.asarray(q.dequantize()).T, rtol=1e-5, atol=1e-5)
    packed = ifjax.prepack(q, "abacus")
    assert_array_equal(ifjax.einsum("mk,nk->mn", x, packed, target="abacus"), y)
    assert_array_equal(packed.unpack().codes, q.codes)


@pytest.mark.parametrize("define", [*FORMATS, ThreeLevels, rounding_away, decoupled, backend])
def test_none_of_them_takes_more_than_25_lines(define):
    assert len(inspect.getsource(define).splitlines()) <= 25
