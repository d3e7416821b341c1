"""Products with packed operands: equal to those of the dequantized values, whatever the axes and the transformation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import ifjax
from ifjax.arrays import Blocking

# Blocks of 4 go through the same code as those of 16 and compile in a fraction of the time.
IF4 = dataclasses.replace(ifjax.FORMATS["if4"], name="if4_bs4", block=4)
NVFP4 = dataclasses.replace(ifjax.FORMATS["nvfp4"], name="nvfp4_bs4", block=4)
MXFP4 = dataclasses.replace(ifjax.FORMATS["mxfp4"], name="mxfp4_bs4", block=4)


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32)).astype(dtype)


def wide(a):
    """float64 values of an array or a QTensor."""
    return np.asarray(a.dequantize(jnp.float32) if isinstance(a, ifjax.QTensor) else a).astype(np.float64)


def random_nvfp4(shape, axis, lead, seed):
    """A QTensor of random bytes in NVFP4 with blocks of 4, and its float64 values; compiles nothing."""
    rng, n, at = np.random.default_rng(seed), shape[axis], axis - len(shape)
    codes = rng.integers(0, 16, shape, np.uint8)
    scales = rng.integers(8, 0x7F, (*shape[:axis], -(-n // 4), *shape[axis + 1 :]), np.uint8)
    amax = rng.random(shape[:lead], np.float32) + np.float32(1)
    filled = np.pad(codes, [(0, -n % 4 if i == axis else 0) for i in range(len(shape))])
    low, high = (filled.take(range(start, filled.shape[axis], 2), axis) for start in (0, 1))
    packed = low | high << 4
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    values = grid[codes] * scales.view(ml_dtypes.float8_e4m3fn).astype(np.float64).repeat(4, axis).take(range(n), axis)
    values = values * amax.astype(np.float64).reshape(*amax.shape, *[1] * (len(shape) - lead)) / 2688
    blocking = Blocking(NVFP4, at, n, np.dtype(np.float32))
    return ifjax.QTensor(jnp.asarray(packed), jnp.asarray(scales), jnp.asarray(amax), blocking), values


def assert_product(got, spec, a, b, dtype=jnp.float32):
    """`got` is einsum(spec, a, b) but for the roundings that the type of the product allows.

    An error of at most n + 8 units of float32 in the sum of n magnitudes (n additions; the factor and the decoding
    round a few times more); in 16 bits also one rounding of every weight and one of the result.
    """
    a, b = wide(a), wide(b)
    exact, magnitude = np.einsum(spec, a, b), np.einsum(spec, abs(a), abs(b))
    inputs, out = spec.split("->")
    lengths = dict(zip(inputs.replace(",", ""), a.shape + b.shape, strict=True))
    terms = np.prod([n for c, n in lengths.items() if c not in out])
    bound = (terms + 8) * 2.0**-24 * magnitude
    if dtype != jnp.float32:
        unit = 2.0**-8 if dtype == jnp.bfloat16 else 2.0**-11
        bound = bound + unit * magnitude + unit * abs(exact) + 2.0**-24
    error = abs(np.asarray(got).astype(np.float64) - exact)
    assert got.shape == exact.shape
    assert (error <= bound).all(), (error / np.maximum(bound, 1e-300)).max()


# --- values -----------------------------------------------------------------------------------------------------------


@st.composite
def products(draw):
    """(einsum spec, shapes, which operands are packed, along which axis, how many leading amax axes)."""
    batch, contracted, left, right = (draw(st.integers(low, high)) for low, high in ((0, 2), (0, 2), (0, 2), (0, 2)))
    names = iter("abcdefgh")
    batch, contracted, left, right = ([next(names) for _ in range(n)] for n in (batch, contracted, left, right))
    length = {c: draw(st.sampled_from([1, 2, 3, 4, 6, 9])) for c in batch + contracted + left + right}
    a, b = draw(st.permutations(batch + contracted + left)), draw(st.permutations(batch + contracted + right))
    packed = draw(st.sampled_from([(True, False), (False, True), (True, True)]))
    operands = []
    for labels, is_packed in zip((a, b), packed, strict=True):
        axis = draw(st.integers(0, len(labels) - 1)) if labels else 0
        lead = draw(st.integers(0, axis))
        shape = tuple(length[c] for c in labels)
        operands.append((shape, is_packed and bool(labels), axis, lead))
    spec = f"{''.join(a)},{''.join(b)}->{''.join(batch + [c for c in a if c in left] + [c for c in b if c in right])}"
    dims = tuple(tuple(tuple(x.index(c) for c in chosen) for x in (a, b)) for chosen in (contracted, batch))
    return spec, dims, operands


@pytest.mark.slow
@settings(max_examples=4)  # each compiles a program of its own
@given(products())
def test_any_axes_may_be_contracted_batched_and_blocked(case):
    spec, dims, descriptions = case
    operands, values = [], []
    for seed, (shape, is_packed, axis, lead) in enumerate(descriptions):
        a, exact = random_nvfp4(shape, axis, lead, seed) if is_packed else (normal(*shape, seed=seed),) * 2
        operands.append(a)
        values.append(exact)
    assert_product(ifjax.dot_general(*operands, dims), spec, *values)


@pytest.mark.by_default("1.0-float16")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 3e4])
def test_sixteen_bits_accumulate_in_float32(dtype, magnitude):
    """4096 terms: adding up in 16 bits would lose most of them; unscaled float16 sums would overflow."""
    x = jnp.ones((2, 4096), dtype)
    q = ifjax.quantize((jnp.abs(normal(3, 4096)) * magnitude / 4096).astype(dtype))
    got = ifjax.einsum("mk,nk->mn", x, q)
    assert got.dtype == dtype
    assert_product(got, "mk,nk->mn", x, q, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["if4", "nvfp4", "fouroversix", "nvint4"])
@pytest.mark.parametrize("rows", [1, 96], ids=["few rows", "many rows"])
def test_float16_holds_4_bit_weights_exactly(name, rows):
    """Rows of the identity pick weights: to float16 they would differ by 2^-11, here by float32's roundings."""
    q = ifjax.quantize(normal(700, 96, dtype=jnp.float16), name)
    one_hot = jnp.eye(96, dtype=jnp.float16)[:rows]
    exact = q.dequantize(jnp.float32).T[:rows]
    got = ifjax.einsum("mk,nk->mn", one_hot, q, preferred_element_type=jnp.float32)
    np.testing.assert_allclose(got, exact, rtol=4 * 2.0**-24)
    packed_ones = ifjax.quantize(one_hot, "nvfp4")
    np.testing.assert_array_equal(packed_ones.dequantize(), one_hot)
    got = ifjax.einsum("mk,nk->mn", packed_ones, q, preferred_element_type=jnp.float32)
    np.testing.assert_allclose(got, exact, rtol=6 * 2.0**-24)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("q_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("preferred", [None, jnp.float32, jnp.bfloat16])
def test_the_result_has_the_type_that_jax_gives(side, x_dtype, q_dtype, preferred):
    def result(x, w):
        a = ifjax.quantize(x, NVFP4) if side in ("left", "both") else x
        b = ifjax.quantize(w, NVFP4, axis=0) if side in ("right", "both") else w
        return ifjax.matmul(a, b, preferred_element_type=preferred)

    x, w = jax.ShapeDtypeStruct((2, 8), x_dtype), jax.ShapeDtypeStruct((8, 4), q_dtype)
    with jax.numpy_dtype_promotion("standard"):
        expected = jax.eval_shape(functools.partial(jnp.matmul, preferred_element_type=preferred), x, w)
        got = jax.eval_shape(result, x, w)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)


@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize("fmt", ["if4", "mxfp4"])
def test_complex_operands_keep_their_imaginary_parts(fmt):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((8, 512), (2, 512, 256)))
    z, q = lax.complex(x, x[::-1]), ifjax.quantize(w, fmt, axis=1)
    for rows in (z, z[:1]):  # also the path of few rows
        want = rows @ q[0].dequantize().astype(rows.dtype)
        for got in (rows @ q[0], jax.jit(ifjax.quantized(lambda q, z: z @ q))(q[0], rows)):
            assert got.dtype == jnp.complex64
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    sizes = jnp.array([3, 5])
    want = lax.ragged_dot(z, q.dequantize().astype(z.dtype), sizes)
    np.testing.assert_allclose(ifjax.ragged_dot(z, q, sizes), want, rtol=0, atol=1e-4)
    of = lambda w: jax.grad(lambda z: jnp.abs(z @ w).sum())(z)  # noqa: E731
    np.testing.assert_allclose(of(q[0]), of(q[0].dequantize().astype(z.dtype)), rtol=0, atol=1e-3)


def test_the_tensors_factor_is_applied_once_after_the_sum():
    """So doubling amax doubles the result to the last bit, and no product of weights sees a small or large factor."""
    q, x = ifjax.quantize(normal(6, 32)), normal(3, 32, seed=1)
    one = ifjax.einsum("mk,nk->mn", x, q)
    for factor in (2.0**-90, 2.0, 2.0**90):
        scaled = q.replaced(amax=q.amax * factor)
        np.testing.assert_array_equal(ifjax.einsum("mk,nk->mn", x, scaled), one * factor)


def test_nan_blocks_poison_their_own_results_only():
    w = normal(4, 8).at[2, 1].set(jnp.nan)
    got = ifjax.einsum("mk,nk->mn", jnp.ones((2, 8)), ifjax.quantize(w, NVFP4))
    np.testing.assert_array_equal(np.isnan(got), np.array([[0, 0, 1, 0]] * 2, bool))


@pytest.mark.by_default("2-3-0")
@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 8), (2, 0, 8), (2, 3, 0), (0, 0, 0)])
def test_empty_products(m, n, k):
    got = ifjax.einsum("mk,nk->mn", jnp.ones((m, k)), ifjax.quantize(jnp.ones((n, k)), NVFP4))
    np.testing.assert_array_equal(got, np.zeros((m, n)))


# --- few rows, which XLA:CPU multiplies without writing the decoded weights -------------------------------------------


@pytest.mark.by_default("1-if4-rows0")
@pytest.mark.parametrize("rows", [(), (2, 2), (5,)])
@pytest.mark.parametrize(("axis", "name"), [(1, "if4"), (0, "if4"), (0, "mxfp4"), (1, "nvfp4_bs8")])
def test_few_rows(rows, axis, name):
    n, k = 70, 1001
    w = normal(*((n, k) if axis else (k, n)), seed=1)
    x, q = normal(*rows, k), ifjax.quantize(w, name, axis=axis)
    labels = "abc"[: len(rows)]
    spec = f"{labels}k,{'nk' if axis else 'kn'}->{labels}n"
    for dtype in (jnp.float32, jnp.bfloat16):
        few = ifjax.einsum(spec, x.astype(dtype), q.astype(dtype))
        assert_product(few, spec, x.astype(dtype), q, dtype)


@pytest.mark.slow
def test_few_rows_of_stacked_matrices_and_nans():
    layers = normal(3, 40, 1001, seed=1).at[1, 7, 500].set(jnp.nan)
    q = ifjax.quantize(layers, amax_axes=(0,))
    got = ifjax.einsum("mk,lnk->mln", normal(2, 1001), q)
    nan = np.zeros(got.shape, bool)
    nan[:, 1, 7] = True
    np.testing.assert_array_equal(np.isnan(got), nan)
    clean = jnp.nan_to_num(q.dequantize())
    expected = np.where(nan, np.nan, jnp.einsum("mk,lnk->mln", normal(2, 1001), clean))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_vmap_over_single_rows_is_one_product_of_many_rows():
    x, q = normal(64, 512), ifjax.quantize(normal(256, 512, seed=1))
    by_row = jax.jit(jax.vmap(lambda x, q: ifjax.einsum("k,nk->n", x, q), (0, None)))
    np.testing.assert_array_equal(by_row(x, q), jax.jit(lambda x, q: ifjax.einsum("mk,nk->mn", x, q))(x, q))
    assert " call(" not in by_row.lower(x, q).compile().as_text()
    assert " call(" in jax.jit(lambda x, q: ifjax.einsum("k,nk->n", x, q)).lower(x[0], q).compile().as_text()


# --- the namesakes ----------------------------------------------------------------------------------------------------

MATMULS = [
    ((8,), (8,)), ((8,), (8, 3)), ((2, 8), (8,)), ((2, 8), (8, 3)), ((4, 2, 8), (8, 3)), ((2, 8), (4, 8, 3)),
    ((4, 2, 8), (4, 8, 3)), ((4, 2, 8), (1, 8, 3)), ((1, 2, 8), (4, 8, 3)), ((5, 1, 2, 8), (4, 8, 3)),
]  # fmt: skip


def operands(left, right, packed, left_axis, right_axis):
    """Two arrays of which the named ones ("left", "right" or "both") are packed, and their values."""
    one = (normal(*left),) * 2 if packed == "right" else random_nvfp4(left, left_axis, 0, 0)
    other = (normal(*right, seed=1),) * 2 if packed == "left" else random_nvfp4(right, right_axis, 0, 1)
    return tuple(zip(one, other, strict=True))


each_side = pytest.mark.parametrize(
    "packed", ["right", pytest.param("left", marks=pytest.mark.slow), pytest.param("both", marks=pytest.mark.slow)]
)


@pytest.mark.by_default("right-left6-right6")
@pytest.mark.parametrize(("left", "right"), MATMULS)
@each_side
def test_matmul_broadcasts_like_its_namesake(left, right, packed):
    (a, b), values = operands(left, right, packed, len(left) - 1, max(len(right) - 2, 0))
    np.testing.assert_allclose(ifjax.matmul(a, b), np.matmul(*values), rtol=1e-4, atol=1e-4)


SPECS = [
    ("bk,kn->nb", (3, 8), (8, 4)), ("bqhd,bkhd->bhqk", (2, 3, 4, 8), (2, 5, 4, 8)), ("...k,kn", (2, 3, 8), (8, 4)),
    ("k,k", (8,), (8,)), ("m,n->mn", (3,), (8,)), ("mk,nk->m", (3, 8), (4, 8)), ("kk,kn->n", (8, 8), (8, 4)),
    ("abk,kcd->adbc", (2, 3, 8), (8, 4, 5)), ("...ab,...bc->...ac", (3, 2, 8), (1, 8, 4)), ("ab,bc", (2, 8), (8, 3)),
]  # fmt: skip


@pytest.mark.by_default("right-bqhd*")
@pytest.mark.parametrize(("spec", "left", "right"), SPECS)
@each_side
def test_einsum_means_what_its_namesake_means(spec, left, right, packed):
    (a, b), values = operands(left, right, packed, len(left) - 1, 0)
    np.testing.assert_allclose(ifjax.einsum(spec, a, b), np.einsum(spec, *values), rtol=1e-4, atol=1e-4)


def test_einsum_takes_one_or_three_operands():
    q, a, b = ifjax.quantize(normal(4, 8), NVFP4), normal(3, 4, seed=1), normal(8, 5, seed=2)
    np.testing.assert_allclose(ifjax.einsum("ab->b", q), q.dequantize().sum(0), rtol=1e-6)
    expected = jnp.einsum("xa,ab,by->yx", a, q.dequantize(), b)
    np.testing.assert_allclose(ifjax.einsum("xa,ab,by->yx", a, q, b), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_numpy_arrays_are_arrays():
    (q, values), x = random_nvfp4((3, 4), 1, 0, 0), np.array([1.0, 2, 3], np.float32)
    np.testing.assert_allclose(ifjax.matmul(x, q), x @ values, rtol=1e-5)
    np.testing.assert_allclose(ifjax.dot_general(x, q, (((0,), (0,)), ((), ()))), x @ values, rtol=1e-5)


def test_arrays_alone_go_to_the_namesakes():
    a, b = normal(2, 8), normal(8, 3)
    dims = ((1,), (0,)), ((), ())
    np.testing.assert_array_equal(ifjax.dot_general(a, b, dims), lax.dot_general(a, b, dims))
    np.testing.assert_array_equal(ifjax.matmul(a, b), jnp.matmul(a, b))
    sizes = jnp.array([1, 1])
    stack = jnp.stack([b, b])
    np.testing.assert_array_equal(ifjax.ragged_dot(a, stack, sizes), lax.ragged_dot(a, stack, sizes))


@pytest.mark.by_default("*-2}")
@pytest.mark.parametrize("settings", [{"axis": -2}, {"axis": -1}, {"axis": -2, "amax_axes": (0,)}], ids=str)
def test_ragged_dot_gives_each_group_its_expert(settings):
    x, experts = normal(7, 8), ifjax.quantize(normal(4, 8, 5, seed=1), IF4, **settings)
    sizes = np.array([2, 0, 4, 1])
    rows = np.split(wide(x), sizes.cumsum()[:-1])
    expected = np.concatenate([a @ w for a, w in zip(rows, wide(experts), strict=True)])
    np.testing.assert_allclose(ifjax.ragged_dot(x, experts, jnp.asarray(sizes)), expected, rtol=1e-5, atol=1e-5)

    def loss(product, x):
        return jnp.sum(jnp.sin(product(x)))

    got = jax.grad(functools.partial(loss, lambda x: ifjax.ragged_dot(x, experts, jnp.asarray(sizes))))(x)
    values = experts.dequantize()
    want = jax.grad(functools.partial(loss, lambda x: lax.ragged_dot(x, values, jnp.asarray(sizes))))(x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# --- gradients and transformations ------------------------------------------------------------------------------------


@pytest.mark.by_default("float32-mk,nk->mn-*")
@pytest.mark.parametrize(
    ("spec", "left", "right", "axis"),
    [("mk,nk->mn", (3, 8), (4, 8), 1), ("mk,kn->mn", (3, 8), (8, 4), 0), ("abk,kcd->abcd", (2, 3, 8), (8, 4, 5), 0),
     ("bhqd,bhkd->bhqk", (2, 2, 3, 8), (2, 2, 5, 8), 3), ("mab,nba->nm", (3, 2, 8), (4, 8, 2), 1)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_is_the_product_with_the_other_axes(spec, left, right, axis, dtype):
    x, q = normal(*left, dtype=dtype), ifjax.quantize(normal(*right, seed=1, dtype=dtype), IF4, axis=axis)
    y, pull = jax.vjp(lambda x: ifjax.einsum(spec, x, q), x)
    g = normal(*y.shape, seed=2, dtype=dtype)
    (got,) = pull(g)
    assert got.dtype == dtype
    inputs, out = spec.split("->")
    assert_product(got, f"{out},{inputs.split(',')[1]}->{inputs.split(',')[0]}", g, q, dtype)
    # the packed operand may stand on the left as well
    swapped = f"{','.join(inputs.split(',')[::-1])}->{out}"
    np.testing.assert_array_equal(jax.vjp(lambda x: ifjax.einsum(swapped, q, x), x)[1](g)[0], got)


def test_the_backward_pass_keeps_the_packed_bytes_and_nothing_else():
    q = ifjax.quantize(normal(64, 128))
    pull = jax.jit(lambda x, q: jax.vjp(lambda x: ifjax.einsum("mk,nk->mn", x, q), x)[1])(normal(16, 128), q)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(pull)) == q.nbytes


def test_a_packed_operand_gets_no_gradient():
    x, q = normal(3, 8), ifjax.quantize(normal(4, 8), NVFP4)
    _, pull = jax.vjp(lambda x, q: ifjax.einsum("mk,nk->mn", x, q), x, q)
    dx, dq = pull(jnp.ones((3, 4)))
    assert dx.any()
    assert dq.codes.dtype == jax.dtypes.float0
    assert not dq.amax
    assert dq.scales.dtype == jax.dtypes.float0


def test_second_derivatives():
    x, q = normal(3, 8), ifjax.quantize(normal(4, 8), NVFP4)

    def curvature(product):
        return jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(product(x) ** 3))(x) ** 2))(x)

    got = curvature(lambda x: ifjax.einsum("mk,nk->mn", x, q))
    np.testing.assert_allclose(got, curvature(lambda x: x @ q.dequantize().T), rtol=1e-4)


@pytest.mark.slow
def test_vmap_over_either_operand_and_both():
    xs, q = normal(5, 3, 8), ifjax.quantize(normal(5, 4, 8, seed=1), IF4, amax_axes=(0,))

    def product(x, q):
        return ifjax.einsum("mk,nk->mn", x, q)

    assert_product(jax.vmap(product)(xs, q), "lmk,lnk->lmn", xs, q)
    assert_product(jax.vmap(product, (0, None))(xs, q[1]), "lmk,nk->lmn", xs, q[1])
    assert_product(jax.vmap(product, (None, 0))(xs[1], q), "mk,lnk->lmn", xs[1], q)
    got = jax.vmap(jax.grad(lambda x, q: product(x, q).sum()))(xs, q)
    np.testing.assert_allclose(got, jnp.broadcast_to(q.dequantize().sum(1)[:, None], xs.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.by_default("remat")
@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "remat"])
def test_layers_scan_over_packed_weights(wrap):
    x, layers = normal(3, 8), ifjax.quantize(normal(4, 8, 8, seed=1), IF4, axis=-2, amax_axes=(0,))

    def run(step, x, weights):
        return jnp.sum(lax.scan(lambda x, w: (jnp.tanh(step(x, w)), None), x, weights)[0])

    got = jax.jit(jax.value_and_grad(functools.partial(run, wrap(ifjax.matmul))))(x, layers)
    want = jax.value_and_grad(functools.partial(run, jnp.matmul))(x, layers.dequantize())
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), got, want)


def test_jit_and_eager_agree():
    x, q = normal(3, 40), ifjax.quantize(normal(5, 40, seed=1))
    eager = ifjax.einsum("mk,nk->mn", x, q)
    np.testing.assert_allclose(jax.jit(lambda x, q: ifjax.einsum("mk,nk->mn", x, q))(x, q), eager, rtol=1e-6)


# --- which way, and errors --------------------------------------------------------------------------------------------


def test_axes_that_do_not_match_are_an_error():
    x, q = normal(3, 8), ifjax.quantize(normal(4, 12), NVFP4)
    for contracted in [((1,), (1,)), ((1, 1), (1, 1)), ((1,), (1, 0)), ((2,), (1,))]:
        with pytest.raises(ValueError, match="dimension_numbers"):
            ifjax.dot_general(x, q, (contracted, ((), ())))
    with pytest.raises(ValueError, match="scalar"):
        ifjax.matmul(2.0, q)


def test_an_unknown_or_impossible_implementation_is_an_error():
    x, q = normal(3, 16), ifjax.quantize(normal(4, 16), "if3")
    with pytest.raises(ValueError, match="impl must be"):
        ifjax.einsum("mk,nk->mn", x, q, impl="triton")
    with pytest.raises(ValueError, match="if3 has codes of 3 bits"):
        ifjax.einsum("mk,nk->mn", x, q, impl="hopper")
    with pytest.raises(ValueError, match="contracts the axis"):
        ifjax.einsum("mk,nk->mn", x, ifjax.quantize(normal(4, 16), axis=0), impl="hopper")


def test_prepack_refuses_what_it_cannot_hold():
    with pytest.raises(TypeError, match="needs a QTensor"):
        ifjax.prepack(normal(4, 16), target="H200")
    with pytest.raises(ValueError, match="no kernel for 'A100'"):
        ifjax.prepack(ifjax.quantize(normal(4, 16)), target="A100")
    with pytest.raises(ValueError, match="4-bit codes"):
        ifjax.prepack(ifjax.quantize(normal(4, 16), "if6"), target="H200")
