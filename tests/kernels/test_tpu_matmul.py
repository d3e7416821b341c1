"""The TPU kernel in the interpreter: against the record's formula in float64, and lowered for a TPU without one."""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # what it found of races has no public name
from jax.experimental.pallas import tpu as pltpu
from numpy.testing import assert_array_equal

from pallas_kernels import tpu_matmul
from pallas_kernels.decoding import Decoding
from pallas_kernels.tpu_matmul import LARGE_M, TILES, UNIT_K, UNIT_N, Tiles, matmul, pack, reference, supports, unpack

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
INT4 = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
UNEVEN = (0.0, 3.0, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0)  # slopes of 3, 2, 1, 1, 1, 2, 2

DECODINGS = {
    "if4": Decoding((E2M1, INT4), (7, 6), "e4m3", 16),
    "if4 in blocks of 8": Decoding((E2M1, INT4), (7, 6), "e4m3", 8),
    "if4, integers first": Decoding((INT4, E2M1), (6, 7), "e4m3", 16),
    "nvfp4, fouroversix": Decoding((E2M1,), (1,), "e4m3", 16),
    "nvint4": Decoding((INT4,), (1,), "e4m3", 16),
    "nvint4 in blocks of 32": Decoding((INT4,), (1,), "e4m3", 32),
    "mxfp4": Decoding((E2M1,), (1,), "e8m0", 32),
    "neither convex nor concave": Decoding((UNEVEN, E2M1), (1, 5), "e4m3", 16),
}
IF4 = DECODINGS["if4"]
SMALL = Tiles(m=16, n=UNIT_N, k=UNIT_K)

each_decoding = pytest.mark.parametrize("decoding", DECODINGS.values(), ids=DECODINGS)
# What is new in a case runs always, the rest of the table with `-m slow`: a program takes seconds to compile.
always = {("if4", "bfloat16", "bfloat16"), ("if4", "bfloat16", "float32"), ("if4", "float32", "float32")}
always |= {(name, "bfloat16", "bfloat16") for name in ("if4, integers first", "nvfp4, fouroversix", "mxfp4")}
each_arithmetic = pytest.mark.parametrize(
    ("decoding", "dtype", "arithmetic"),
    [
        pytest.param(
            decoding,
            *dtypes,
            id=f"{name}-{'-'.join(dtypes)}",
            marks=() if (name, *dtypes) in always else pytest.mark.slow,
        )
        for name, decoding in DECODINGS.items()
        for dtypes in [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")]
    ],
)


@pytest.fixture(autouse=True)
def on_cpu():
    """The interpreter is a CPU's, also where a GPU is."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def scale_values(scales: np.ndarray, decoding: Decoding) -> tuple[np.ndarray, np.ndarray]:
    """The scales in float64 and the modes of scale bytes."""
    if decoding.scale == "e8m0":
        values = np.where(scales == 0, 0.0, 2.0 ** (scales.astype(np.float64) - 127))
        return np.where(scales == 0xFF, np.nan, values), np.zeros(scales.shape, int)
    if len(decoding.magnitudes) == 1:
        return scales.view(ml_dtypes.float8_e4m3fn).astype(np.float64), np.zeros(scales.shape, int)
    return (scales & 0x7F).view(ml_dtypes.float8_e4m3fn).astype(np.float64), scales >> 7


def weights(nibbles: np.ndarray, scales: np.ndarray, decoding: Decoding) -> np.ndarray:
    """The record's formula in float64."""
    scale, mode = scale_values(scales, decoding)
    scale = np.repeat(scale * np.array(decoding.multipliers)[mode], decoding.block, axis=1)
    magnitude = np.array(decoding.magnitudes)[np.repeat(mode, decoding.block, axis=1), nibbles & 7]
    return np.where(nibbles & 8, -magnitude, magnitude) * scale


def random_packed(rng, n: int, k: int, decoding: Decoding) -> tuple[np.ndarray, np.ndarray]:
    """Random codes and random scale bytes, none of them NaN, E8M0 ones between 2**-7 and 2**8."""
    nibbles = rng.integers(0, 16, (n, k)).astype(np.uint8)
    scales = rng.integers(0, 256, (n, k // decoding.block)).astype(np.uint8)
    if decoding.scale == "e8m0":
        return nibbles, 120 + scales % 16
    return nibbles, np.where(scales & 0x7F == 0x7F, scales ^ 1, scales)


def run(x, nibbles, scales, factor=1.0, *, decoding, out_dtype="float32", tiles=SMALL, interpret=True) -> np.ndarray:
    """`pack` and `matmul` in one program, compiled in a hurry: its code runs for milliseconds."""

    def program(x, nibbles, scales, factor):
        n, k = nibbles.shape
        words, packed = pack(nibbles, scales, decoding)
        settings = {"n": n, "k": k, "decoding": decoding, "out_dtype": out_dtype, "tiles": tiles}
        return matmul(x, words, packed, factor, interpret=interpret, **settings)

    arguments = (x, jnp.asarray(nibbles), jnp.asarray(scales), jnp.float32(factor))
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return np.asarray(jax.jit(program).lower(*arguments).compile(compiler_options=quick)(*arguments))


@contextlib.contextmanager
def checked():
    """The interpreter that fills memory with NaN and fails on a race."""
    yield pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    assert interpret_pallas_call.races is not None and not interpret_pallas_call.races.races_found


# Decoding


@pytest.mark.by_default("if4-bfloat16-bfloat16")
@each_arithmetic
def test_every_code_with_every_scale_byte_is_the_formula_rounded_once(monkeypatch, decoding, dtype, arithmetic):
    """x is the identity, so that the product shows each weight alone; only a NaN spreads, over its row of W."""
    monkeypatch.setattr(tpu_matmul, "_arithmetic", lambda _: jnp.dtype(arithmetic))
    k = max(UNIT_K, 16 * decoding.block)
    # From block to block the codes move on, so that in blocks of 8, too, all of them meet every byte.
    codes = (np.arange(k) + np.arange(k) // decoding.block) % 16
    nibbles = np.tile(codes.astype(np.uint8), (256, 1))
    scales = np.tile(np.arange(256, dtype=np.uint8)[:, None], (1, k // decoding.block))
    if decoding.scale == "e8m0":  # without weights that are subnormal or overflow
        scales = np.clip(scales, 2, 252)
        scales[0], scales[255] = 0, 255

    got = run(jnp.eye(k, dtype=dtype), nibbles, scales, decoding=decoding, tiles=Tiles(m=k, n=256, k=k))
    wanted = weights(nibbles, scales, decoding)
    met = {*zip(nibbles.ravel(), np.repeat(scales, decoding.block), strict=True)}
    assert len(met) == 16 * len(np.unique(scales)) >= 16 * 250
    # float32 holds the formula, so this rounds once.
    assert_array_equal(got.T, wanted.astype(np.float32).astype(dtype).astype(np.float32))
    assert np.isnan(wanted).any()


def test_any_eight_magnitudes_are_a_difference_of_maxima_of_lines():
    rng = np.random.default_rng(0)
    for _ in range(200):
        values = [0.0, *np.sort(rng.choice(np.arange(1, 57) / 4, 7, replace=False)).tolist()]
        curve = tpu_matmul._Curve.through(values)
        assert_array_equal(curve(jnp.arange(8.0)), np.float32(values))


def test_the_curves_of_if4_are_those_of_the_module_docstring():
    plan = tpu_matmul._plan(IF4)
    assert (plan.multiples, plan.base) == ((3.5, 6.0), 1)
    assert plan.value == tpu_matmul._Curve(((1, 0),), ((0, 0),))
    assert plan.difference == tpu_matmul._Curve(((0, 0), (1, 4), (3, 16)), ((0, 0),))


# Layout


@pytest.mark.by_default("257-65-nvint4", "3-40-if4", "3-40-neither*")
@each_decoding
@pytest.mark.parametrize(("n", "blocks"), [(3, 40), (257, 65)])
def test_unpack_undoes_pack_to_the_bit(decoding, n, blocks):
    rng = np.random.default_rng(n)
    k = blocks * decoding.block
    nibbles = jnp.asarray(rng.integers(0, 16, (n, k)), jnp.uint8)  # 0x8, negative zero, among them
    scales = jnp.asarray(rng.integers(0, 256, (n, blocks)), jnp.uint8)
    words, packed = jax.jit(functools.partial(pack, decoding=decoding))(nibbles, scales)
    assert words.size * 8 == packed.size * decoding.block and words.dtype == jnp.int32  # 4 bits a weight
    assert words.shape[0] * 8 - k < max(UNIT_K, 1024) and words.shape[1] - n < UNIT_N
    for got, given in zip(unpack(words, packed, n, k, decoding), (nibbles, scales), strict=True):
        assert got.dtype == given.dtype
        assert_array_equal(got, given)


def test_a_nibble_lies_where_pack_says():
    n, k = 3, 600
    g, i, r, j = 1, 0, 40, 1
    nibbles = jnp.zeros((n, 1024), jnp.uint8).at[2, 512 * g + 128 * i + 2 * r + j].set(0xB)
    words, _ = pack(nibbles[:, :k], jnp.zeros((n, -(-k // 8)), jnp.uint8), dataclasses.replace(IF4, block=8))
    assert np.argwhere(words).tolist() == [[64 * g + r, 2]]
    assert int(words[64 * g + r, 2]) == 0xB << (4 * i + 16 * j)


# Products


def assert_close(got, x, nibbles, scales, factor, decoding):
    """Within what rounding of weights (bfloat16 x) and of float32 products and sums can do."""
    x64, w64 = np.asarray(x, np.float64), weights(nibbles, scales, decoding)
    per_term = 2.0**-9 * (x.dtype == jnp.bfloat16) + (x.shape[1] + 2) * 2.0**-24
    wanted, size = x64 @ w64.T * factor, np.abs(x64) @ np.abs(w64).T * abs(factor)
    assert np.isfinite(got).all() and got.shape == wanted.shape
    assert (np.abs(got - wanted) <= per_term * size).all()


products = [
    ("if4", "bfloat16", 5, 300, 528),
    ("if4", "float32", 37, 256, 512),
    ("nvfp4, fouroversix", "bfloat16", 16, 7, 16),
    ("nvfp4, fouroversix", "float32", 3, 260, 512),
    ("nvint4", "bfloat16", 33, 1, 1040),
    pytest.param("nvint4", "float32", 1, 300, 1040, marks=pytest.mark.slow),
    pytest.param("mxfp4", "bfloat16", 20, 257, 1056, marks=pytest.mark.slow),
    pytest.param("mxfp4", "float32", 2, 100, 32, marks=pytest.mark.slow),
    pytest.param("if4 in blocks of 8", "bfloat16", 1, 300, 520, marks=pytest.mark.slow),
    pytest.param("if4, integers first", "float32", 18, 513, 48, marks=pytest.mark.slow),
    pytest.param("neither convex nor concave", "bfloat16", 65, 300, 528, marks=pytest.mark.slow),
]


@pytest.mark.by_default("nvfp4, fouroversix-float32-3-260-512")
@pytest.mark.parametrize(("name", "dtype", "m", "n", "k"), products)
def test_ragged_products_meet_float64_without_races_and_garbage(name, dtype, m, n, k):
    rng, decoding = np.random.default_rng(m), DECODINGS[name]
    nibbles, scales = random_packed(rng, n, k, decoding)
    x = jnp.asarray(rng.normal(size=(m, k)), dtype)
    with checked() as interpret:
        got = run(x, nibbles, scales, -0.3, decoding=decoding, interpret=interpret)
    assert_close(got, x, nibbles, scales, float(np.float32(-0.3)), decoding)


def test_a_tile_of_two_units_and_the_last_rounding():
    rng = np.random.default_rng(0)
    decoding = DECODINGS["nvint4"]  # exact in bfloat16
    nibbles, scales = random_packed(rng, 512, 512, decoding)
    x = jnp.asarray(rng.integers(-3, 4, (2, 512)), jnp.bfloat16)
    got = run(x, nibbles, scales, 0.25, decoding=decoding, out_dtype="bfloat16", tiles=Tiles(m=32, n=512, k=512))
    # Sums of multiples of 2**-9 below 2**15 fit float32.
    wanted = np.asarray(x, np.float64) @ weights(nibbles, scales, decoding).T * 0.25
    assert got.dtype == jnp.bfloat16
    assert_array_equal(got, wanted.astype(np.float32).astype(jnp.bfloat16))


@pytest.mark.by_default("nvint4-*")
@pytest.mark.parametrize(("name", "bytes_of_nan"), [("nvint4", [0x7F, 0xFF]), ("mxfp4", [0xFF])])
def test_a_nan_byte_makes_nan_of_the_outputs_of_its_row_only(name, bytes_of_nan):
    """x and codes are positive, so that an infinite scale would not become NaN on its way."""
    decoding = DECODINGS[name]
    scales = np.full((4, 2), 120, np.uint8)
    scales[1 : 1 + len(bytes_of_nan), 1] = bytes_of_nan
    nibbles = np.full((4, 2 * decoding.block), 2, np.uint8)
    got = run(jnp.ones((3, nibbles.shape[1]), jnp.bfloat16), nibbles, scales, decoding=decoding)
    assert_array_equal(np.isnan(got), np.broadcast_to(np.isin(scales, bytes_of_nan).any(axis=1), (3, 4)))


def test_vmap_over_everything_is_a_stack_of_products():
    rng, decoding = np.random.default_rng(0), DECODINGS["nvint4"]
    nibbles, scales = (
        np.stack(arrays) for arrays in zip(*(random_packed(rng, 20, 32, decoding) for _ in range(2)), strict=True)
    )
    x, factors = jnp.asarray(rng.normal(size=(2, 5, 32)), jnp.bfloat16), jnp.array([1.0, -0.5])

    def product(x, nibbles, scales, factor, interpret):
        packed = pack(nibbles, scales, decoding)
        return matmul(x, *packed, factor, n=20, k=32, decoding=decoding, out_dtype="float32", interpret=interpret)

    got = jax.vmap(functools.partial(product, interpret=True))(x, jnp.asarray(nibbles), jnp.asarray(scales), factors)
    for arguments in zip(np.asarray(got), x, nibbles, scales, factors.tolist(), strict=True):
        assert_close(*arguments, decoding)
    compiled = jax.jit(jax.vmap(functools.partial(product, interpret=False)))
    assert compiled.trace(x, nibbles, scales, factors).lower(lowering_platforms=("tpu",))


@pytest.mark.by_default("if4", "mxfp4")
@each_decoding
def test_the_reference_is_the_formula(decoding):
    rng = np.random.default_rng(0)
    nibbles, scales = random_packed(rng, 9, 4 * decoding.block, decoding)
    got = reference(jnp.eye(4 * decoding.block), jnp.asarray(nibbles), jnp.asarray(scales), jnp.float32(2), decoding)
    assert_array_equal(got.T, 2 * weights(nibbles, scales, decoding))


# What is taken and what is not


@pytest.mark.by_default("bfloat16-1-if4", "bfloat16-1-mxfp4")
@each_decoding
@pytest.mark.parametrize(("dtype", "m"), [("bfloat16", 1), pytest.param("float32", 300, marks=pytest.mark.slow)])
def test_it_lowers_for_a_tpu_where_there_is_none(decoding, dtype, m):
    n, k = 256, 1024

    def program(x, nibbles, scales, factor):
        words, packed = pack(nibbles, scales, decoding)
        return matmul(x, words, packed, factor, n=n, k=k, decoding=decoding, out_dtype=dtype)

    shapes = [((m, k), dtype), ((n, k), "uint8"), ((n, k // decoding.block), "uint8"), ((), "float32")]
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    lowered = jax.jit(program).trace(*arguments).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") == 1
    assert supports(decoding, dtype, m) is None


def test_no_rows_make_no_rows():
    words, scales = pack(jnp.zeros((3, 16), jnp.uint8), jnp.zeros((3, 1), jnp.uint8), IF4)
    settings = {"n": 3, "k": 16, "decoding": IF4, "out_dtype": "bfloat16"}
    got = matmul(jnp.zeros((0, 16)), words, scales, jnp.float32(1), **settings)
    assert (got.shape, got.dtype) == ((0, 3), jnp.bfloat16)


@pytest.mark.parametrize(
    ("change", "dtype", "m", "reason"),
    [
        ({}, "float16", 1, "bfloat16 or float32, got float16"),
        ({}, "bfloat16", LARGE_M, "dequantize once"),
        ({"block": 4}, "bfloat16", 1, "8, 16 or 32, got 4"),
        ({"multipliers": (17, 6)}, "bfloat16", 1, r"4 significant bits, got \(17, 6\)"),
        ({"magnitudes": (E2M1,), "multipliers": (4,), "scale": "e8m0"}, "bfloat16", 1, "E8M0 scales leave no room"),
        ({"magnitudes": (E2M1, (*INT4[:7], 448.0))}, "bfloat16", 1, "exactly"),
    ],
)
def test_supports_says_why_not(change, dtype, m, reason):
    assert re.search(reason, supports(dataclasses.replace(IF4, **change), dtype, m) or "")


def test_what_does_not_fit_is_refused_with_what_was_needed():
    nibbles, scales = jnp.zeros((3, 32), jnp.uint8), jnp.zeros((3, 2), jnp.uint8)
    words, packed = pack(nibbles, scales, IF4)
    call = functools.partial(matmul, n=3, k=32, decoding=IF4, out_dtype="float32")
    x, one = jnp.zeros((2, 32)), jnp.float32(1)
    with pytest.raises(TypeError, match="must be uint8, got int32"):
        pack(nibbles.astype(jnp.int32), scales, IF4)
    with pytest.raises(ValueError, match=r"a multiple of the block, got nibbles \(3, 30\)"):
        pack(nibbles[:, :30], scales, IF4)
    with pytest.raises(ValueError, match=r"\[N, K / block\] = \(3, 2\), got .* scales \(3, 1\)"):
        pack(nibbles, scales[:, :1], IF4)
    with pytest.raises(TypeError, match="x must be bfloat16 or float32, got float16"):
        call(x.astype(jnp.float16), words, packed, one)
    with pytest.raises(TypeError, match="out_dtype must be bfloat16 or float32, got float16"):
        call(x, words, packed, one, out_dtype="float16")
    with pytest.raises(TypeError, match=r"factor must be a float32 scalar, got float32\(1,\)"):
        call(x, words, packed, one.reshape(1))
    with pytest.raises(ValueError, match=r"x must be \[M, k=32\], got \(2, 16\)"):
        call(x[:, :16], words, packed, one)
    with pytest.raises(TypeError, match="words must be int32 and scales uint8, got uint8"):
        call(x, nibbles, packed, one)
    with pytest.raises(ValueError, match="k a multiple of 16, got n=3, k=24"):
        unpack(words, packed, 3, 24, IF4)
    with pytest.raises(ValueError, match=r"pack makes \(\(64, 512\).* for n=300, k=32, got \(64, 256\)"):
        call(x, words, packed, one, n=300)
    with pytest.raises(ValueError, match="multiples of m=16, n=256, k=512"):
        Tiles(m=16, n=128, k=512)


def test_tiles_are_there_for_every_m_that_is_taken():
    assert max(TILES) == LARGE_M and list(TILES) == sorted(TILES)
