"""The GPU's encoder and decoder, interpreted, where `quantize` and the others find them: the bits of the codec."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy.testing import assert_array_equal
from test_places import assert_same_numbers
from test_tpu_blocks import data

import ifjax
from ifjax.arrays import ENCODERS, Encoder
from ifjax.arrays.ms_eden import ms_eden_operand, ms_eden_packed
from ifjax.arrays.qtensor import unscaled_values
from ifjax.arrays.quantize import Multiples, operand_in_multiples, quantize_rotated
from ifjax.codec import Encoding, decode
from ifjax.codec.decode import narrowed
from ifjax.codec.eden_places import EdenCodec, _quotients
from ifjax.codec.places import PlaceCodec, over
from ifjax.numerics.xla import divide
from ifjax.training import product
from ifjax.training.recipes import RECIPES
from pallas_kernels import gpu_blocks


class Interpreted:
    """The kernels as CPUs interpret them."""

    Noise, PARTS, supports = gpu_blocks.Noise, gpu_blocks.PARTS, staticmethod(gpu_blocks.supports)

    @staticmethod
    def tables(codec, maxima):
        return gpu_blocks.tables(codec, maxima, interpret=True)

    @staticmethod
    def encode(*args, **settings):
        return gpu_blocks.encode(*args, **settings, interpret=True)

    @staticmethod
    def peaks(*args, **settings):
        return gpu_blocks.peaks(*args, **settings, interpret=True)

    @staticmethod
    def decode(*args, **settings):
        return gpu_blocks.decode(*args, **settings, interpret=True)


class Emulated:
    """The instructions of a GPU as numpy computes them."""

    @staticmethod
    def fma(a, b, c):
        def run(a, b, c):  # the exact product and sum in float64, rounded to odd, rounds correctly to float32
            with np.errstate(all="ignore"):
                p, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
                s = p + c
                low = (p - (s - (s - p))) + (c - (s - p))
                bits = s.view(np.int64)
                odd = np.isfinite(s) & (low != 0) & (bits & 1 == 0)
                return (bits + np.where(odd, np.where((low > 0) == (s > 0), 1, -1), 0)).view(np.float64).astype("f")

        args = jnp.broadcast_arrays(*(jnp.asarray(v, jnp.float32) for v in (a, b, c)))
        return jax.pure_callback(lambda *args: run(*map(np.asarray, args)), args[0], *args, vmap_method="expand_dims")

    maximum, quotient = staticmethod(jnp.maximum), staticmethod(divide)

    @staticmethod
    def bfloat16(a, b):
        high, low = (lax.bitcast_convert_type(v.astype("bfloat16"), jnp.uint16).astype(jnp.int32) for v in (a, b))
        return high << 16 | low

    @staticmethod
    def permute(a, b, selector):
        found = jnp.int32(0)
        for i in range(4):
            number = jnp.int32(selector) >> 4 * i & 15
            byte = lax.shift_right_logical(jnp.where(number & 4 > 0, b, a), 8 * (number & 3)) & 255
            found = found | jnp.where(number & 8 > 0, -(byte >> 7) & 255, byte) << 8 * i
        return found

    @staticmethod
    def rounded(a, dtype):
        like, run = jax.ShapeDtypeStruct(a.shape, a.dtype), lambda a: np.asarray(a).astype(dtype).astype(np.float32)
        return jax.pure_callback(run, like, a, vmap_method="expand_dims")


@pytest.mark.by_default("nearest-if4", "nearest-mxfp4", "stochastic_unbiased-nvfp4")
@pytest.mark.parametrize(
    "name",
    ["nvfp4", "if4", "nvint4", "mxfp4", "fouroversix", "if6", "if6_e3m2", "nvint6", "mxfp6_e2m3", "nf4", "octet"],
)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic_unbiased"])
def test_instructions_of_a_gpu_change_no_bits(name, rounding):
    x = jnp.asarray(data((16, 2 * 32 * 16)))
    x = jnp.where(jnp.arange(16)[:, None] == 7, jnp.nan_to_num(x, posinf=0, neginf=0) * 2.0**-120, x)
    how = Encoding.of(name, rounding=rounding)
    codec, fmt = PlaceCodec(how, np.dtype("bfloat16")), how.fmt
    blocks = x.astype("bfloat16").astype(jnp.float32).reshape(-1, fmt.block)
    amax = jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0)).reshape(1) if fmt.has_tensor_scale else None
    scalars, table = codec.encoder_tables(amax, 1)
    noise = None
    if codec.noises:
        noise = jax.random.uniform(jax.random.key(0), (codec.noises, *blocks.shape), minval=-0.5, maxval=0.5)

    def run(machine, arrays):
        tables = [t.reshape(-1) for t in (table, codec.decoder_table(amax, 1))]
        lookup, lookup_back = (lambda row, index, t=t: t[row * 128 + index] for t in tables)
        block = codec.encode(
            arrays(blocks.T), noise if noise is None else [arrays(each.T) for each in noise], list(scalars[0]), lookup,
            wants_codes=True, wants_values=True, machine=machine,
        )  # fmt: skip
        return *block, codec.decode(block.words, block.header, lookup_back, machine=machine)

    expected = run(None, list)
    for machine, arrays in ((Emulated, list), (Emulated, one_array), (None, one_array)):
        for a, b in zip(run(machine, arrays), expected, strict=True):
            assert_array_equal(flat(a), flat(b))


def one_array(places):
    return [places]


def flat(arrays):
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(arrays)])


@pytest.mark.parametrize("name", ["nvfp4", "if4"])
def test_instructions_of_a_gpu_change_no_bits_of_ms_eden(name):
    codec = EdenCodec.of(ifjax.FORMATS[name], np.dtype("float32"))
    rng = np.random.default_rng(0)
    blocks = rng.standard_normal((4096, 16)).astype("f") * np.exp2(rng.integers(-12, 1, (4096, 16))).astype("f")
    blocks[::7] *= np.exp2(rng.integers(-12, 1, (len(blocks[::7]), 1))).astype("f")
    blocks[5], blocks[6, 3], blocks[7, 4] = 0, np.nan, np.inf
    scalars, _ = codec.encoder_tables(jnp.float32([3.0]), 1)
    noise = jnp.asarray(rng.random(len(blocks), np.float32) - np.float32(0.5))
    expected, *others = (
        codec.encode(
            arrays(jnp.asarray(blocks).T), noise if arrays is list else noise[None], list(scalars[0]), None,
            wants_codes=True, wants_values=False, machine=machine,
        )[:2]
        for machine, arrays in ((None, list), (Emulated, list), (Emulated, one_array), (None, one_array))
    )  # fmt: skip
    for got in others:
        assert_array_equal(flat(got), flat(expected))


@pytest.mark.by_default("if4-bfloat16", "nvfp4-bfloat16")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["if4", "nvfp4", "nvint4", "mxfp4", "fouroversix", "nvfp4_ue5m3", "nf4"])
def test_every_byte_decodes_to_the_bits_of_the_codec(name, dtype):
    fmt = ifjax.get_format(name)
    codec = PlaceCodec(Encoding.of(name), np.dtype(dtype))
    headers = jnp.arange(256)[None]
    words = np.random.default_rng(0).integers(0, 2**32, (fmt.block * fmt.bits // 32, 256), np.uint32).view(np.int32)
    codes = [words[i * fmt.bits // 32] >> i * fmt.bits % 32 & 2**fmt.bits - 1 for i in range(fmt.block)]
    every = [None]
    every += [1.7, 2.0**-90, 2.0**-110, 2.0**112.5, 3.2e38, 0.99] if fmt.has_tensor_scale else []
    for amax in every:
        peak = None if amax is None else jnp.float32(amax)
        expected = narrowed(decode(jnp.stack(codes), headers, fmt, amax=peak), dtype)
        expected = jnp.where(jnp.abs(expected) < 2.0**-126, expected * 0, expected)
        for machine in (None, Emulated):
            got = jnp.stack(codec.decode_by_arithmetic([jnp.asarray(w) for w in words], headers[0], peak, machine))
            assert_same_numbers(jnp.where(jnp.abs(got) < 2.0**-126, got * 0, got), expected)


@pytest.mark.parametrize("b", [6.0, 2688.0, 1536.0, 7.0, 2688 * 16 / 17, 6 * 16 / 17, 1.0000001, 1.9999999])
def test_fused_quotients_are_correctly_rounded(b):
    a = np.random.default_rng(0).integers(0x3F800000, 0x40800000, 2**18, np.int32).view(np.float32)
    exact = (a.astype(np.float64) / np.float64(np.float32(b))).astype(np.float32)  # no quotient is near a tie
    assert_array_equal(over(jnp.asarray(a), np.float32(b), Emulated), exact)


@pytest.mark.parametrize("machine", [None, Emulated], ids=["", "instructions"])
def test_quotients_by_one_number_are_correctly_rounded(machine):
    """Near powers of two, too, where the step between floats changes."""
    near = np.r_[0:50, 2**22 - 5 : 2**22 + 5, 2**23 - 50 : 2**23] + (127 << 23)
    mantissas = np.random.default_rng(0).integers(0x3F800000, 0x40000000, (2, 2000))
    a, b = (np.r_[near, m].astype(np.int32).view(np.float32) for m in mantissas)
    a, b = np.broadcast_to(a, (len(b), len(a))), b[:, None]
    (got,) = _quotients([jnp.asarray(a)], jnp.asarray(b), machine)
    assert_array_equal(got, a / b)


@pytest.mark.by_default("*if4")
@pytest.mark.parametrize("name", ["nvfp4", "if4", "nvint4", "fouroversix", "nvfp4_ue5m3"])
@pytest.mark.parametrize("machine", [None, Emulated], ids=["", "instructions"])
def test_tables_made_by_a_kernel_are_those_made_by_xla(monkeypatch, name, machine):
    codec = PlaceCodec(Encoding.of(name), np.dtype("float32"))
    amax = jnp.float32([1.7, 0, 2.0**-110, 3.4e38, 1, 2.0**-126, 449 * 6])
    maxima = jnp.zeros((7, 1500)).at[:, 700].set(amax / 2).at[np.arange(7), np.arange(7) * 249].set(amax)
    numbers, rows = jax.vmap(lambda a: codec.rows_of_table(jnp.full(128, a), machine))(amax)
    scalars, table = codec.encoder_tables(amax, len(amax))
    rows = jnp.concatenate(rows, 1)
    assert_same_numbers(rows, table[:, : rows.shape[1]])
    assert_same_numbers(jnp.stack(numbers, 1)[..., 0], scalars)
    if machine is None:
        (got, factor), (_, written) = gpu_blocks.tables(codec, maxima, interpret=True)
        assert_array_equal(got, amax)
        assert_array_equal(factor, codec.factor(amax))
        assert_same_numbers(written, table)


@pytest.mark.parametrize("name", ["nf4", "octet"])
@pytest.mark.parametrize("machine", [None, Emulated], ids=["", "instructions"])
def test_tables_of_negative_levels_differ_at_most_in_the_sign_of_zeros(name, machine):
    codec, amax = PlaceCodec(Encoding.of(name), np.dtype("float32")), jnp.float32([1.7, 0, 2.0**-110, 3.4e38, 449 * 6])
    _, rows = jax.vmap(lambda a: codec.rows_of_table(jnp.full(128, a), machine))(amax)
    _, table = codec.encoder_tables(amax, len(amax))
    rows = jnp.concatenate(rows, 1)
    assert_array_equal(rows, table[:, : rows.shape[1]])
    assert codec.first_row(len(codec.fmt.candidates) - 1) < rows.shape[1] <= table.shape[1] - 1


# Threads that have no block, last blocks that are not full, matrices with an amax of their own.
CASES = {
    "nvfp4, rows, matrices": ("nvfp4", (2, 40, 72), -2, "float32", "stochastic"),
    "nvfp4, columns, matrices": ("nvfp4", (3, 40, 72), -1, "bfloat16", "nearest"),
    "if4, columns": ("if4", (40, 200), -1, "bfloat16", "stochastic_unbiased"),
    "if3, rows": ("if3", (40, 24), -2, "bfloat16", "nearest"),
    "mxfp4, rows": ("mxfp4", (72, 136), -2, "float32", "nearest"),
    "nvfp4, squares": ("nvfp4", (2, 40, 72), -2, "bfloat16", "nearest"),
    "if4, squares": ("if4", (40, 72), -1, "float32", "nearest"),
    "nvfp4, columns, halves": ("nvfp4", (40, 64), -1, "float16", "stochastic_unbiased"),
    "if4, rows, halves": ("if4", (40, 72), -2, "float16", "nearest"),
    "mxfp4, columns, halves": ("mxfp4", (24, 64), -1, "float16", "nearest"),
    "mxfp3, columns": ("mxfp3", (24, 64), -1, "bfloat16", "nearest"),
    "nvfp6_e2m3, squares": ("nvfp6_e2m3", (40, 48), -1, "bfloat16", "nearest"),
}
# Of more than 4 bits, along rows with lengths that are not full, and along columns by words.
CASES |= {
    f"{name}, {'rows' if axis == -2 else 'columns'}, {rounding}": (name, (40, 64), axis, "bfloat16", rounding)
    for name, fmt in ifjax.FORMATS.items()
    for axis in (-1, -2)
    for rounding in ("nearest", "stochastic_unbiased")
    if fmt.bits > 4
}


@pytest.mark.by_default("nvfp4, rows*", "nvfp4, columns, halves", "if6_e3m2, columns, nearest")
@pytest.mark.parametrize("case", CASES)
def test_bits_are_those_of_the_codec(monkeypatch, case):
    fmt, shape, axis, dtype, rounding = CASES[case]
    monkeypatch.setattr(ENCODERS, "_records", {"mine": Encoder("mine", "cpu", "cpu", lambda: Interpreted)})
    x, key = jnp.asarray(data(shape)).astype(dtype), None if rounding == "nearest" else jax.random.key(3)
    settings = {"axis": axis, "rounding": rounding, "key": key, "amax_axes": (0,) if len(shape) > 2 else ()}
    settings["block_2d"] = "squares" in case

    def run(x):
        q = ifjax.quantize(x, fmt, **settings)
        return q, q.dequantize(), ifjax.fake_quantize(x, fmt, **settings)

    with ifjax.kernels("always"):
        got = jax.jit(run)(x)
    with ifjax.kernels("never"):
        expected = jax.jit(run)(x)
    for a, b in zip(jax.tree.leaves(got[0]), jax.tree.leaves(expected[0]), strict=True):
        assert_array_equal(a, b)
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert_same_numbers(a, b)


ROTATED = {
    "nvfp4, columns": ("nvfp4", (40, 96), -1, "bfloat16", 16, "stochastic_unbiased"),
    "if4, rows": ("if4", (48, 40), -2, "bfloat16", 16, "nearest"),
    "mxfp4, columns": ("mxfp4", (24, 64), -1, "float32", 32, "nearest"),
    "nvfp4, rows, halves": ("nvfp4", (48, 40), -2, "float16", 16, "nearest"),
}


@pytest.mark.by_default("nvfp4, columns")
@pytest.mark.parametrize("case", ROTATED)
def test_rotated_bits_are_those_of_the_transform_and_the_codec(monkeypatch, case):
    fmt, shape, axis, dtype, size, rounding = ROTATED[case]
    rotations = []

    class Watched(Interpreted):
        @staticmethod
        def encode(*args, **settings):
            rotations.append(settings["rotation"].size)
            return Interpreted.encode(*args, **settings)

    monkeypatch.setattr(ENCODERS, "_records", {"mine": Encoder("mine", "cpu", "cpu", lambda: Watched)})
    x = jnp.nan_to_num(jnp.asarray(data(shape)).astype(dtype), posinf=1, neginf=1)
    key = None if rounding == "nearest" else jax.random.key(3)
    how = Encoding.of(fmt, rounding=rounding)

    def run(x):
        return quantize_rotated(x, how, axis=axis, size=size, signs="fixed", key=key)

    with ifjax.kernels("always"):
        got = jax.jit(run)(x)
    assert rotations == [size]
    with ifjax.kernels("never"):
        expected = jax.jit(run)(x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_array_equal(a, b)


@pytest.mark.by_default("both-nvfp4*")
@pytest.mark.parametrize("case", ROTATED)
@pytest.mark.parametrize("wanted", ["values", "codes", "both"])
def test_operands_of_products_have_the_bits_of_the_codec(monkeypatch, case, wanted):
    fmt, shape, axis, dtype, size, rounding = ROTATED[case]
    monkeypatch.setattr(ENCODERS, "_records", {"mine": Encoder("mine", "cpu", "cpu", lambda: Interpreted)})
    x = jnp.nan_to_num(jnp.asarray(data(shape)).astype(dtype), posinf=1, neginf=1)
    key = None if rounding == "nearest" else jax.random.key(3)
    how, place = Encoding.of(fmt, rounding=rounding), {"axis": axis, "size": size, "signs": "fixed", "key": key}

    def run(x):
        wants = {"wants_codes": wanted != "values", "wants_values": wanted != "codes"}
        return operand_in_multiples(x, how, **wants, **place)

    with ifjax.kernels("always"):
        got = jax.jit(run)(x)
    with ifjax.kernels("never"):
        q = quantize_rotated(x, how, **place)
    assert ((got.values is None), (got.packed is None)) == (wanted == "codes", wanted == "values")
    if got.values is not None:
        assert_same_numbers(got.values, unscaled_values(q, dtype))
    for a, b in zip(jax.tree.leaves(got.packed), jax.tree.leaves(q), strict=True) if got.packed is not None else ():
        assert_array_equal(a, b)
    assert (got.factor is None) == (q.amax is None)
    if q.amax is not None:
        assert_array_equal(got.factor, divide(q.amax, q.fmt.tensor_constant(q.headroom)))


WAYS = {
    "jit": lambda f: f,
    "scan": lambda f: lambda *args: lax.scan(lambda c, _: (c, f(*args)), 0, None, 1)[1][0],
    "remat": jax.checkpoint,
    "vmap": lambda f: f,
}


@pytest.mark.by_default("*jit*")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("recipe", ["nvfp4", "if4", "packed", "if4_mseden"])
def test_training_products_of_the_encoders_values_change_no_bits(monkeypatch, recipe, way):
    encoder = Encoder("mine", "cpu", "cpu", lambda: Interpreted, gives_multiples=True)
    monkeypatch.setattr(ENCODERS, "_records", {"mine": encoder})
    packs, recipe = recipe == "packed", RECIPES["nvfp4" if recipe == "packed" else recipe]
    recipe = dataclasses.replace(recipe, residuals="packed") if packs else recipe
    rng = np.random.default_rng(0)
    lead = (2,) if way == "vmap" else ()
    x = jnp.asarray(rng.standard_normal((*lead, 32, 48)), jnp.float32)
    w, keys = jnp.asarray(rng.standard_normal((48, 32)), jnp.float32), jax.random.split(jax.random.key(0), lead or 1)
    given = []

    multiply = product._multiply

    def watched(a, b, *settings):
        given.extend(each for each in (a, b) if isinstance(each, Multiples))
        return multiply(a, b, *settings)

    monkeypatch.setattr(product, "_multiply", watched)

    def run(x, w, key):
        multiply = lambda x, w: ifjax.quantized_dot_general(x, w, (((1,), (0,)), ((), ())), recipe, key)  # noqa: E731
        y, back = jax.vjp(WAYS[way](multiply), x, w)
        return y, back(y)

    run = jax.vmap(run, (0, None, 0)) if way == "vmap" else run
    args = x, w, keys if lead else keys[0]
    with ifjax.kernels("always"):
        got = jax.jit(lambda *args: run(*args))(*args)
    assert len(given) >= (4 if packs else 6)
    with ifjax.kernels("never"):
        expected = jax.jit(lambda *args: run(*args))(*args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_array_equal(a, b)


EDEN = {
    "nvfp4, columns, 128": ("nvfp4", (40, 256), -1, "bfloat16", 128),
    "nvfp4, rows, 128": ("nvfp4", (128, 24), -2, "bfloat16", 128),
    "nvfp4, columns, halves, 32": ("nvfp4", (40, 256), -1, "float16", 32),
    "if4, rows, matrices, 32": ("if4", (2, 64, 24), -2, "float32", 32),
    "if4, columns, matrices, 16": ("if4", (2, 9, 96), -1, "float32", 16),
}


@pytest.mark.by_default("nvfp4, rows, 128")
@pytest.mark.parametrize("case", EDEN)
def test_ms_eden_has_the_bits_of_xla(monkeypatch, case):
    fmt, shape, axis, dtype, size = EDEN[case]
    taken = []

    class Watched(Interpreted):
        @staticmethod
        def encode(*args, **settings):
            taken.append(settings["rotation"].size)
            return Interpreted.encode(*args, **settings)

    monkeypatch.setattr(ENCODERS, "_records", {"mine": Encoder("mine", "cpu", "cpu", lambda: Watched)})
    x = jnp.asarray(data(shape)).astype(dtype)
    x = x.at[..., 0, :].set(0) if axis == -1 else x.at[..., 0].set(0)

    def run(x, key):
        signs = ifjax.random_signs(key, size)
        place = {"axis": axis, "size": size, "signs": signs, "key": key}
        packed = [ms_eden_packed(x, fmt, amax=amax, **place) for amax in (None, 3.0)]
        return *packed, ms_eden_operand(x, fmt, in_multiples=True, **place)

    with ifjax.kernels("always"):
        got = jax.jit(run)(x, jax.random.key(3))
    assert taken == [size] * 3
    with ifjax.kernels("never"):
        expected = jax.jit(run)(x, jax.random.key(3))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_same_numbers(a, b)
