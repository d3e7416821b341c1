"""The rotation is the reference's to the bit, orthonormal, linear, and the same however JAX runs it."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from numpy.testing import assert_array_equal

from ifjax.numerics.hadamard import FIXED_SIGNS, SIZES, hadamard, inverse_hadamard, random_signs
from ifjax.numerics.orders import is_order, longest_run

each_size = pytest.mark.parametrize("size", SIZES)
each_direction = pytest.mark.parametrize("rotate", [hadamard, inverse_hadamard])


def normal(shape, dtype=np.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(dtype))


def integers(shape, seed=0):
    """Small integers: with size 16 or 64 every sum and every product of them is exact in float32."""
    return jnp.asarray(np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32))


def matrix(size, signs="fixed"):
    """Row i of the transform is what becomes of the i-th unit vector."""
    return np.asarray(hadamard(jnp.eye(size), size=size, signs=signs))


def sylvester(size):
    h = np.ones((1, 1), np.float32)
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return h


def signed_sylvester(size):
    return np.tile(np.float32(FIXED_SIGNS), size // 16)[:, None] * sylvester(size)


def run_norms(x, size):
    return np.linalg.norm(np.asarray(x, np.float64).reshape(-1, size), axis=-1)


# --- against the reference


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "rht_2d_transpose.npz")


def test_the_matrices_are_the_references(golden):
    assert_array_equal(matrix(16), golden["rht_matrix"])
    assert_array_equal(matrix(16, signs=None), golden["rht_matrix_no_sign"])


def test_the_inverse_matrix_is_the_references_transposed(golden):
    assert_array_equal(inverse_hadamard(jnp.eye(16)), golden["rht_matrix"].T)


@pytest.mark.by_default("jit")
@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_bfloat16_has_the_references_bits(golden, run):
    x = jnp.asarray(golden["x_bf16bits"].view(ml_dtypes.bfloat16))
    rotate = run(hadamard)
    assert_array_equal(np.asarray(rotate(x)).view(np.uint16), golden["x_rht_bf16bits"])
    assert_array_equal(np.asarray(rotate(x.T)).view(np.uint16), golden["xT_rht_bf16bits"])
    along_rows = run(lambda x: hadamard(x, axis=0))(x)
    assert_array_equal(np.asarray(along_rows.T).view(np.uint16), golden["xT_rht_bf16bits"])


# --- the transform


@each_size
@pytest.mark.parametrize("signs", ["fixed", None])
def test_the_matrix_is_signs_times_sylvester_over_the_root(size, signs):
    expected = (signed_sylvester(size) if signs else sylvester(size)) * np.float32(size**-0.5)
    assert_array_equal(matrix(size, signs), expected)


@each_size
def test_the_matrix_is_orthonormal(size):
    m = matrix(size)
    # Up to sign all entries are the float32 nearest to 1/sqrt(size); the signs are orthogonal as integers.
    assert_array_equal(np.abs(m), np.full((size, size), np.float32(size**-0.5)))
    assert_array_equal(np.sign(m).astype(int) @ np.sign(m).astype(int).T, size * np.eye(size, dtype=int))


@pytest.mark.by_default("*-16")
@each_size
@each_direction
def test_every_run_is_rotated_by_itself(rotate, size):
    x = normal((3, 4 * size))
    parts = [rotate(part, size=size) for part in np.split(np.asarray(x), 4, axis=-1)]
    assert_array_equal(rotate(x, size=size), np.concatenate(parts, axis=-1))


@each_size
def test_float32_is_within_the_error_of_a_sum(size):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, size)) * np.exp2(8 * rng.standard_normal((64, size)))).astype(np.float32)
    exact = x.astype(np.float64) @ signed_sylvester(size).astype(np.float64) * size**-0.5
    # size terms added in any order, times a rounded 1/sqrt(size), rounded: at most size + 1 roundings.
    bound = (size + 1) * 2.0**-24 * 1.001 * size**-0.5 * np.abs(x, dtype=np.float64).sum(-1, keepdims=True)
    assert (np.abs(hadamard(x, size=size) - exact) <= bound).all()


@pytest.mark.by_default("32")
@each_size
def test_the_inverse_undoes_it(size):
    x = normal((8, 2 * size))
    back = inverse_hadamard(hadamard(x, size=size), size=size)
    # Each way errs by (size + 1) 2^-24 times |H| |run|, whose norm is at most sqrt(size) times the run's. The
    # first error is then rotated, which keeps its norm. 1.001 covers the second order.
    bound = 2 * np.sqrt(size) * (size + 1) * 2.0**-24 * 1.001 * run_norms(x, size)
    assert (run_norms(np.asarray(back) - np.asarray(x), size) <= bound).all()


@pytest.mark.parametrize("size", [16, 64])
def test_integers_come_back_exactly(size):
    x = integers((8, 2 * size))
    assert_array_equal(inverse_hadamard(hadamard(x, size=size), size=size), x)
    assert_array_equal(hadamard(inverse_hadamard(x, size=size), size=size), x)


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("signs", ["fixed", None, "random"])
def test_a_product_of_rotated_operands_is_the_product(size, signs):
    signs = random_signs(jax.random.key(7), size) if signs == "random" else signs
    a, b = integers((5, 2 * size), seed=1), integers((2 * size, 3), seed=2)
    rotated = jnp.matmul(
        hadamard(a, size=size, signs=signs), hadamard(b, axis=0, size=size, signs=signs), precision="highest"
    )
    assert_array_equal(rotated, jnp.matmul(a, b, precision="highest"))


# --- shapes, axes, types


@each_direction
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_any_axis_is_the_last_axis_moved(rotate, axis):
    x = normal((32, 48, 16))
    moved = np.moveaxis(np.asarray(x), axis, -1)
    assert_array_equal(rotate(x, axis=axis), np.moveaxis(np.asarray(rotate(moved)), -1, axis))


@pytest.mark.parametrize("shape", [(0,), (0, 16), (3, 0), (2, 0, 32)])
def test_empty_arrays_stay_empty(shape):
    x = jnp.zeros(shape, jnp.bfloat16)
    assert hadamard(x).shape == shape and hadamard(x).dtype == x.dtype


def test_rank_one_is_a_single_row():
    x = normal(32)
    assert_array_equal(hadamard(x), hadamard(x[None])[0])


@pytest.mark.by_default("bfloat16-128", "float16-16")
@each_size
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_floats_are_rounded_once_from_float32(dtype, size):
    x = normal((4, 2 * size), dtype)
    result = hadamard(x, size=size)
    assert result.dtype == dtype
    assert_array_equal(result, hadamard(x.astype(jnp.float32), size=size).astype(dtype))


def test_float16_sums_do_not_overflow():
    assert_array_equal(hadamard(jnp.full(16, 1e4, jnp.float16), signs=None)[0], jnp.float16(4e4))


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 32)))
        y = hadamard(x, size=32)
        assert y.dtype == jnp.float64
        exact = np.asarray(x) @ signed_sylvester(32).astype(np.float64) * 32**-0.5
        # Both sides err as float32 does, with 2^-53 for 2^-24; a run's sum is at most 32 times its largest.
        np.testing.assert_allclose(y, exact, rtol=0, atol=2 * 33 * 2.0**-53 * 32**0.5 * np.abs(x).max())


@each_direction
def test_integer_input_is_a_type_error(rotate):
    with pytest.raises(TypeError, match=r"floating-point, got int32: write x\.astype"):
        rotate(jnp.ones(16, jnp.int32))


@each_direction
def test_a_length_that_is_no_multiple_says_how_much_to_pad(rotate):
    with pytest.raises(ValueError, match=r"axis 0 must be a multiple of size=16 .* got 20 .*append 12 zeros"):
        rotate(jnp.ones((20, 3)), axis=-2)


@pytest.mark.parametrize("size", [0, 1, 6, 52, 172])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match=f"no Hadamard matrix of order {size} is known here"):
        hadamard(jnp.ones(256), size=size)
    with pytest.raises(ValueError, match=f"order {size}"):
        random_signs(jax.random.key(0), size)


@pytest.mark.parametrize("shape, axis", [((), -1), ((), 0), ((16,), 1), ((16, 16), -3)])
def test_an_axis_that_is_not_there_is_refused(shape, axis):
    with pytest.raises(ValueError, match=f"got axis={axis}"):
        hadamard(jnp.ones(shape), axis=axis)


# --- signs


def test_larger_sizes_repeat_the_sixteen_signs():
    # diag(D, D) (H2 x H16) = (I x diag(D) H16) (H2 x I): the rotation of 16, then an unsigned mix of runs.
    x = integers(32)
    first, second = hadamard(x[:16]), hadamard(x[16:])
    mixed = jnp.concatenate([first + second, first - second]) * np.float32(2**-0.5)
    # 4 * 1/sqrt(32) and 1/sqrt(2) are the same float32.
    assert_array_equal(hadamard(x, size=32), mixed)


@each_direction
def test_explicit_signs_are_a_product_around_the_unsigned_transform(rotate):
    x = np.asarray(integers((3, 32)))
    signs = random_signs(jax.random.key(1), 32)
    d = np.asarray(signs, np.float32)
    before, after = (d, 1) if rotate is hadamard else (1, d)
    plain = np.asarray(rotate(x * before, size=32, signs=None))
    assert_array_equal(rotate(x, size=32, signs=signs), plain * after)


def test_fixed_signs_can_be_written_out():
    x = normal((2, 32))
    for signs in (FIXED_SIGNS, np.asarray(FIXED_SIGNS), jnp.asarray(FIXED_SIGNS, jnp.float32)):
        assert_array_equal(hadamard(x, signs=signs), hadamard(x))


@pytest.mark.by_default("16", "32")
@each_size
def test_random_signs_follow_from_the_key(size):
    signs = random_signs(jax.random.key(3), size)
    assert signs.shape == (size,) and signs.dtype == jnp.int8
    assert_array_equal(jnp.abs(signs), np.ones(size))
    assert_array_equal(signs, jax.jit(random_signs, static_argnums=1)(jax.random.key(3), size))
    assert (signs != random_signs(jax.random.key(4), size)).any()


def test_random_signs_have_even_odds():
    signs = jax.vmap(lambda key: random_signs(key, 128))(jax.random.split(jax.random.key(0), 512))
    # 65536 fair coins: five standard deviations of their mean are 5 / 256.
    assert abs(np.mean(np.asarray(signs, np.float64))) < 5 / 256


def test_signs_may_be_traced():
    x = normal((2, 16))
    signs = jax.vmap(random_signs)(jax.random.split(jax.random.key(0), 4))
    batched = jax.vmap(lambda s: hadamard(x, signs=s))(signs)
    assert_array_equal(batched, np.stack([hadamard(x, signs=s) for s in np.asarray(signs)]))


@pytest.mark.parametrize(
    "signs, message",
    [
        ("random", "'fixed', None or an array of 16"),
        (np.ones(15), r"shape \(16,\), .* got \(15,\): draw them with random_signs"),
        (np.ones((16, 1)), r"got \(16, 1\)"),
        (np.arange(16) % 2, r"\+1 or -1"),
        (np.full(16, np.nan), r"\+1 or -1"),
    ],
)
def test_wrong_signs_are_refused(signs, message):
    with pytest.raises(ValueError, match=message):
        hadamard(jnp.ones(16), signs=signs)


# --- transformations


@pytest.mark.by_default("16-float32-1-hadamard", "16-float32-0-inverse_hadamard")
@each_direction
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size, dtype", [(16, np.float32), (128, jnp.bfloat16)])
def test_jit_vmap_and_scan_change_no_bit(rotate, size, axis, dtype):
    x = np.asarray(normal((3, size, 2 * size), dtype))

    def one(x):
        return rotate(x, axis=axis, size=size)

    eager = np.stack([one(v) for v in x])
    assert_array_equal(rotate(x, axis=axis + 1, size=size), eager)
    assert_array_equal(jax.jit(one)(x[0]), eager[0])
    assert_array_equal(jax.jit(jax.vmap(one))(x), eager)
    batch_last = jax.jit(jax.vmap(one, in_axes=2, out_axes=2))
    assert_array_equal(batch_last(np.moveaxis(x, 0, 2)), np.moveaxis(eager, 0, 2))
    assert_array_equal(jax.lax.scan(lambda _, v: (None, one(v)), None, x)[1], eager)


@pytest.mark.by_default("*-16")
@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("rotate, transpose", [(hadamard, inverse_hadamard), (inverse_hadamard, hadamard)])
def test_the_gradient_is_the_transpose(rotate, transpose, size):
    x, cotangent = normal((3, 2 * size)), normal((3, 2 * size), seed=1)
    _, pull = jax.vjp(lambda x: rotate(x, size=size), x)
    # To the bit: 1/sqrt(size) is a power of two, so it may multiply before the sum, as it does here.
    assert_array_equal(pull(cotangent)[0], transpose(cotangent, size=size))


@pytest.mark.by_default("32")
@each_size
def test_the_tangent_is_the_transform_itself(size):
    x, tangent = normal((3, size)), normal((3, size), seed=1)
    _, out = jax.jvp(lambda x: hadamard(x, size=size), (x,), (tangent,))
    assert_array_equal(out, hadamard(tangent, size=size))


@pytest.mark.parametrize("spec", [("d", None, None), (None, "d", None), (None, None, "d")])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_sharded_array_stays_where_it_is(spec, axis):
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    x = normal((32, 32, 64))
    rotate = jax.jit(lambda x: hadamard(x, axis=axis), in_shardings=sharding, out_shardings=sharding)
    assert_array_equal(rotate(x), hadamard(x, axis=axis))
    compiled = rotate.lower(x).compile().as_text()
    assert not re.findall("all-gather|all-to-all|all-reduce|collective-permute", compiled)


@pytest.mark.by_default("12", "28", "256")
@pytest.mark.parametrize("size", [2, 8, 12, 20, 28, 36, 60, 256, 384])
def test_other_orders_are_orthogonal_too(size):
    """Powers of two, and Paley's orders times one: 384 is the whole axis of a BERT, 12 x 32."""
    m = matrix(size)
    signs = np.sign(m).astype(int)
    assert_array_equal(np.abs(m), np.full((size, size), np.float32(size**-0.5)))
    assert_array_equal(signs @ signs.T, size * np.eye(size, dtype=int))
    x, w = normal((5, size)), normal((size, 3))
    exact = np.asarray(x, np.float64) @ np.asarray(w)
    turned = np.asarray(hadamard(x, size=size), np.float64) @ np.asarray(hadamard(w, axis=0, size=size), np.float64)
    np.testing.assert_allclose(turned, exact, atol=1e-5 * np.abs(exact).max() * size**0.5)
    np.testing.assert_allclose(inverse_hadamard(hadamard(x, size=size), size=size), x, atol=2e-6 * size**0.5)


def test_orders():
    assert [n for n in range(2, 65) if is_order(n)] == [
        2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 56, 60, 64,
    ]  # fmt: skip
    assert is_order(1536)
    # The whole axis, or the largest part of it: 11008 = 43 x 256, 14336 = 28 x 512.
    assert [longest_run(n) for n in (384, 1536, 4096, 11008, 14336, 100, 9)] == [384, 1536, 4096, 256, 14336, 20, None]
    with pytest.raises(ValueError, match="of order 6 is known"):
        hadamard(jnp.ones(12), size=6)
