"""The TPU's encoder and decoder, interpreted, where `quantize` and the others find them."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from test_places import assert_same_numbers

import ifjax
from ifjax.arrays import ENCODERS, Encoder
from ifjax.arrays.ms_eden import ms_eden_operand, ms_eden_packed
from ifjax.arrays.quantize import Multiples, operand_in_multiples, quantize_rotated
from ifjax.codec import Encoding
from ifjax.codec.places import LANES
from ifjax.numerics.hadamard import hadamard, random_signs
from ifjax.products.dot_general import multiples
from pallas_kernels import tpu_blocks


class Interpreted:
    """The kernels as CPUs interpret them; counts what it is asked to do."""

    Noise, PARTS, supports = tpu_blocks.Noise, tpu_blocks.PARTS, staticmethod(tpu_blocks.supports)
    tables = staticmethod(tpu_blocks.tables)

    def __init__(self):
        self.calls: list[str] = []

    def encode(self, *args, **settings):
        self.calls.append("encode")
        return tpu_blocks.encode(*args, **settings, interpret=True)

    def peaks(self, *args, **settings):
        self.calls.append("peaks")
        return tpu_blocks.peaks(*args, **settings, interpret=True)

    def decode(self, *args, **settings):
        self.calls.append("decode")
        return tpu_blocks.decode(*args, **settings, interpret=True)

    def rotated_peaks(self, *args, **settings):
        self.calls.append("rotated_peaks")
        return tpu_blocks.rotated_peaks(*args, **settings, interpret=True)


@pytest.fixture
def kernels(monkeypatch):
    """Within, CPUs have the kernels; gives the list of calls."""
    jax.clear_caches()
    kernels = Interpreted()
    record = Encoder("interpreted", "cpu", "cpu", lambda: kernels, gives_multiples=True)
    monkeypatch.setattr(ENCODERS, "_records", {"interpreted": record})
    with ifjax.kernels("always"):
        yield kernels.calls
    jax.clear_caches()


def data(shape, seed=0):
    """Numbers of many sizes, zeros of either sign, ties, and some that are none."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-12, 4, shape))
    x.flat[::7] = rng.integers(-24, 25, x.flat[::7].shape) / 4
    x.flat[::11], x.flat[5::13] = 0.0, -0.0
    x.flat[::1001], x.flat[7::2003], x.flat[9::3001] = np.nan, np.inf, -np.inf
    return x.astype(np.float32)


# Shapes that do not fill tiles, and what only one of them has: two modes, no tensor scale, several words a unit.
CASES = {
    "if4, columns": ("if4", (40, 200), -1, "bfloat16", "stochastic_unbiased"),
    "if4, rows": ("if4", (200, 40), -2, "float32", "stochastic"),
    "nvfp4, columns": ("nvfp4", (136, 272), -1, "float32", "stochastic"),
    "mxfp4, rows": ("mxfp4", (72, 136), -2, "bfloat16", "nearest"),
    "if4, squares": ("if4", (40, 72), -1, "float32", "nearest"),
    "nvfp4, squares": ("nvfp4", (2, 40, 72), -2, "bfloat16", "nearest"),
    "if3, rows": ("if3", (40, 16), -2, "bfloat16", "nearest"),
    "nvfp6_e2m3, columns": ("nvfp6_e2m3", (8, 72), -1, "bfloat16", "nearest"),
    "if6, rows": ("if6", (40, 16), -2, "bfloat16", "stochastic"),
    "nvfp4, columns, halves": ("nvfp4", (40, 200), -1, "float16", "stochastic_unbiased"),
    "if4, rows, halves": ("if4", (72, 40), -2, "float16", "nearest"),
    "mxfp4, columns, halves": ("mxfp4", (24, 64), -1, "float16", "nearest"),
    "if6, squares, halves": ("if6", (40, 48), -2, "float16", "nearest"),
}  # fmt: skip


# Interpreting one compiles for 10 seconds.
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_bits_are_those_of_the_codec(kernels, case):
    name, shape, axis, dtype, rounding = CASES[case]
    x, fmt = jnp.asarray(data(shape)).astype(dtype), ifjax.get_format(name)
    key = None if rounding == "nearest" else jax.random.key(3)
    settings = {"axis": axis, "block_2d": "squares" in case, "rounding": rounding, "key": key}
    q, y = ifjax.quantize(x, fmt, **settings), ifjax.fake_quantize(x, fmt, **settings)
    values = q.dequantize()
    assert kernels == ["encode", "encode", "decode"]
    ENCODERS._records.clear()
    jax.clear_caches()
    expected = ifjax.quantize(x, fmt, **settings)
    for got, want in zip(jax.tree.leaves(q), jax.tree.leaves(expected), strict=True):
        assert_array_equal(got, want)
    for got in (y, values):
        assert got.dtype == x.dtype
        assert_same_numbers(got, expected.dequantize())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "axis", "dtype"), [((16, 160), -1, "bfloat16"), ((144, 24), -2, "bfloat16"), ((144, 24), -2, "float16")]
)
def test_rotated_bits_are_those_of_the_transform_and_the_codec(kernels, shape, axis, dtype):
    x, how = jnp.asarray(np.nan_to_num(data(shape), posinf=1, neginf=1)).astype(dtype), Encoding.of("nvfp4")

    def run():
        return jax.jit(lambda x: quantize_rotated(x, how, axis=axis, size=16, signs="fixed", key=None))(x)

    got = run()
    assert kernels == ["rotated_peaks", "encode"]
    ENCODERS._records.clear()
    jax.clear_caches()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(run()), strict=True):
        assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fmt", "shape", "axis", "rounding", "size"),
    [("if4", (144, 24), -2, "stochastic_unbiased", 16), ("nvfp4", (16, 160), -1, "nearest", None),
     ("mxfp4", (160, 24), -2, "nearest", None)],
)  # fmt: skip
def test_a_product_gets_the_values_that_codes_mean(kernels, fmt, shape, axis, rounding, size):
    how, key = Encoding.of(fmt, rounding=rounding), None if rounding == "nearest" else jax.random.key(5)
    x = jnp.asarray(data(shape) if size is None else np.nan_to_num(data(shape), posinf=1, neginf=1))
    x, place = x.astype(jnp.bfloat16), {"axis": axis, "key": key}
    wants = {"wants_codes": False, "wants_values": True}
    got = operand_in_multiples(x, how, **wants, **place, size=size, signs="fixed")
    assert isinstance(got, Multiples)
    assert kernels == ["rotated_peaks"] * (size is not None) + ["encode"]
    ENCODERS._records.clear()
    jax.clear_caches()
    by_xla = operand_in_multiples(x, how, **wants, **place, size=size, signs="fixed")
    assert by_xla is not None and by_xla.values.dtype == jnp.float32  # on a CPU, in which it multiplies
    assert_array_equal(*(np.asarray(each.values.astype(jnp.bfloat16), np.float32) for each in (by_xla, got)))
    q = quantize_rotated(x, how, **place, size=16, signs="fixed") if size else ifjax.quantize(x, how, **place)
    values, factor = multiples(q, jnp.bfloat16)
    assert_same_numbers(got.values, values)
    assert (1 if got.factor is None else got.factor) == factor


@pytest.mark.slow
def test_matrices_with_an_amax_of_their_own_and_members_of_a_vmap(kernels):
    x, keys = jnp.asarray(data((3, 2, 16, 16))), jax.random.split(jax.random.key(0), 3)

    def run(x, key):
        q = ifjax.quantize(x, "nvfp4", axis=-2, amax_axes=(0,))
        return q, q.dequantize(), ifjax.fake_quantize(x, "nvfp4", axis=-1, rounding="stochastic", key=key)

    got = jax.jit(jax.vmap(run))(x, keys)
    assert kernels
    ENCODERS._records.clear()
    jax.clear_caches()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(jax.jit(jax.vmap(run))(x, keys)), strict=True):
        assert_same_numbers(a, b) if a.dtype == np.float32 else assert_array_equal(a, b)


@pytest.mark.slow
def test_products_decode_by_the_kernel(kernels):
    x, w = data((8, 64), 1)[:, :32], data((32, 16), 2)
    x, w = (jnp.asarray(np.nan_to_num(a, nan=1, posinf=2, neginf=-2)) for a in (x, w))

    def run(x, w):
        return ifjax.quantized_dot_general(x, w, (((1,), (0,)), ((), ())), "nvfp4", jax.random.key(1))

    got = jax.jit(jax.grad(lambda *args: run(*args).sum(), (0, 1)))(x, w)
    assert {"encode", "decode"} <= set(kernels)
    ENCODERS._records.clear()
    jax.clear_caches()
    for a, b in zip(got, jax.grad(lambda *args: run(*args).sum(), (0, 1))(x, w), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [16, 64])
def test_rotated_places_are_the_hadamard_transform(size):
    x, signs = data((4, size), 4)[1:2], np.asarray(random_signs(jax.random.key(2), size))
    x = np.nan_to_num(x, nan=0, posinf=1, neginf=1)
    got = tpu_blocks.rotated([jnp.asarray(v * s) for v, s in zip(x[0], signs, strict=True)])
    want = hadamard(jnp.asarray(x), size=size, signs=signs)[0]
    np.testing.assert_allclose(np.array(got), want, rtol=1e-5, atol=1e-5)


def test_every_half_is_read_and_written_as_it_is():
    halves, dtype = np.arange(2**16, dtype=np.uint16), jnp.dtype(jnp.float16)
    numbers = halves.view(np.float16).astype(np.float32)
    words = tpu_blocks._upper_half(numbers, dtype)
    got = tpu_blocks._widened(jnp.asarray(halves.astype(np.int32) << 16), dtype)
    assert_same_numbers(got, numbers)
    is_nan = np.isnan(numbers)
    assert_array_equal(np.asarray(words)[~is_nan] >> 16 & 0xFFFF, halves[~is_nan])
    assert np.isnan((np.asarray(words)[is_nan] >> 16).astype(np.uint16).view(np.float16)).all()


def test_what_goes_which_way_and_why():
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    for kind in ("TPU v5 lite", "TPU v6e", "TPU7x"):
        assert ifjax.explain_quantize(x, target=kind) == ("tpu_blocks", f"on {kind}")
    assert ifjax.explain_quantize(x, target="TPU v4").path == "xla"
    assert ifjax.explain_quantize(x, target="NVIDIA H200") == ("gpu_blocks", "on NVIDIA H200")
    assert ifjax.explain_quantize(x, target="NVIDIA A100") == ("xla", "there is no kernel for NVIDIA A100")
    settings = [
        ({"search": "fast"}, "searches"), ({"amax_axes": (0,)}, "amax belongs to rows"),
        ({"loss": lambda x, y: x[..., 0]}, "loss"), ({"weights": jnp.ones(4096)}, "weighs no errors"),
        ({"gradient": "clipped"}, "gradients are clipped"),
        ({"fmt": "hifloat4"}, "hifloat4 has headers of several bytes"),
    ]  # fmt: skip
    for kwargs, reason in settings:
        path, why = ifjax.explain_quantize(x, target="TPU v6e", **kwargs)
        assert path == "xla"
        assert reason in why
    shapes = ((4096, 4096), "float64", "float64"), ((4096,), "float32", "vector"), ((0, 8), "float32", "empty")
    for shape, dtype, reason in shapes:
        path, why = ifjax.explain_quantize(jax.ShapeDtypeStruct(shape, dtype), target="TPU v6e")
        assert (path, reason in why) == ("xla", True)
    assert LANES == tpu_blocks.LANES


def test_kernels_are_left_where_the_user_says_so(kernels):
    """Though one function was compiled with them before."""
    x = jnp.asarray(data((8, 16)))
    run = jax.jit(lambda x: ifjax.quantize(x, "mxfp4").dequantize())
    run.trace(x)
    assert kernels == ["encode", "decode"]
    with ifjax.kernels("never"):
        run.trace(x)
        assert ifjax.explain_quantize(x, "mxfp4").path == "xla"
        assert "'never'" in ifjax.explain_matmul(x, ifjax.quantize(x.T, "mxfp4"), target="H200").reason
    run.trace(x)
    assert kernels == ["encode", "decode"]
    with pytest.raises(ValueError, match="policy must be one of 'auto', 'always', 'never', got 'off'"):
        ifjax.kernels("off")
    code = "import ifjax; from ifjax.numerics.kernels import kernel_policy; print(kernel_policy())"
    command, environment = [sys.executable, "-c", code], os.environ | {"IFJAX_KERNELS": "never"}
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip() == "never"


EDEN = {
    "nvfp4, columns, 128": ("nvfp4", (40, 256), -1, "bfloat16", 128),
    "nvfp4, rows, 128": ("nvfp4", (1024, 24), -2, "bfloat16", 128),
    "if4, rows, matrices, 32": ("if4", (2, 256, 24), -2, "float32", 32),
    "if4, columns, 16": ("if4", (9, 2048), -1, "float32", 16),
    "nvfp4, columns, halves, 32": ("nvfp4", (9, 2048), -1, "float16", 32),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", EDEN)
def test_ms_eden_has_the_bits_of_xla(kernels, case):
    fmt, shape, axis, dtype, size = EDEN[case]
    x = jnp.asarray(data(shape)).astype(dtype)

    def run(x, key):
        place = {"axis": axis, "size": size, "signs": random_signs(key, size), "key": key}
        in_multiples = ms_eden_operand(x, fmt, in_multiples=True, **place) if dtype != "float16" else None
        return ms_eden_packed(x, fmt, **place), in_multiples

    got = jax.jit(run)(x, jax.random.key(3))
    assert kernels == ["peaks", "encode"] * (1 if dtype == "float16" else 2)
    with ifjax.kernels("never"):
        expected = jax.jit(run)(x, jax.random.key(3))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_same_numbers(a, b)
