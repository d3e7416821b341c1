"""Division is numpy's to the last bit, however it is compiled; `materialize` changes where a value is made, alone."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy.testing import assert_array_equal

from ifjax.numerics.xla import by_platform, correct_quotient, divide, materialize, undivided

# Of formats, and of exponents and mantissas at which rounding is easily wrong.
CONSTANTS = [1.0, 3.0, 6.0, 7.0, 2688.0, 12544.0, float(np.float32(2688 * 16 / 17)), 1 + 2.0**-23, 2 - 2.0**-23, -0.3]


def floats(shape, seed, exponents=(-40, 40)):
    """Random mantissas, a quarter of them within 3 units of a power of two; both signs."""
    rng = np.random.default_rng(seed)
    mantissa = rng.integers(0, 2**23, shape)
    mantissa = np.where(rng.random(shape) < 0.25, rng.choice([0, 1, 2, 3, -1, -2, -3], shape) % 2**23, mantissa)
    bits = (mantissa + (rng.integers(*exponents, shape) + 127 << 23)).astype(np.uint32)
    return bits.view(np.float32) * rng.choice([-1, 1], shape).astype(np.float32)


A = floats((64, 512), 0)


def own_rows(f):
    """f on each row by itself, by vmap."""
    return lambda a, b: jax.vmap(lambda a, b: f(a[None], b[None])[0])(a, b)


def scanned(f):
    """f on each row by itself, in a scan."""
    return lambda a, b: lax.scan(lambda _, ab: (None, f(ab[0][None], ab[1][None])[0]), None, (a, b))[1]


each_run = pytest.mark.parametrize(
    "run", [lambda f: f, jax.jit, own_rows, lambda f: jax.jit(own_rows(f)), scanned],
    ids=["eager", "jit", "vmap", "jit-vmap", "scan"],
)  # fmt: skip


# --- divide


@each_run
@pytest.mark.parametrize("columns", [1, A.shape[1]], ids=["broadcast", "full"])
def test_every_quotient_is_the_nearest_float32(run, columns):
    b = floats((A.shape[0], columns), 1)
    assert_array_equal(run(divide)(A, b), A / b)
    assert_array_equal(run(lambda a, b: divide(b, a))(A, b), b / A)


@each_run
def test_a_row_of_equal_quotients_is_not_turned_into_a_product(run):
    """Both numbers are computed, and alike in a row: XLA would compute one reciprocal and spread their product."""
    a, b = floats((A.shape[0], 1), 3), floats((A.shape[0], 1), 4)

    def spread(a, b):
        return divide(jnp.broadcast_to(a * 3, A.shape[-1:] if a.ndim == 1 else (a.shape[0], A.shape[1])), b * 5)

    assert_array_equal(run(spread)(a, b), np.broadcast_to(a * 3 / (b * 5), A.shape))


@each_run
def test_a_constant_divisor_is_not_turned_into_a_factor(run):
    # one program for all constants
    got = run(lambda a, _: jnp.stack([divide(a, c) for c in CONSTANTS], -1))(A, A)
    assert_array_equal(got, np.stack([A / np.float32(c) for c in CONSTANTS], -1))


@each_run
def test_a_constant_dividend_is_not_taken_out(run):
    got = run(lambda a, _: jnp.stack([divide(c, a) for c in CONSTANTS], -1))(A, A)
    assert_array_equal(got, np.stack([np.float32(c) / A for c in CONSTANTS], -1))


@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_scalar_divisor_is_not_turned_into_a_factor(run):
    scalars, run = floats((16,), 2), run(divide)
    assert_array_equal([run(A, scalar) for scalar in scalars], [A / scalar for scalar in scalars])


@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["vmap", "jit-vmap"])
def test_a_scalar_divisor_of_each_row_is_not_turned_into_a_factor(run):
    scalars = floats(A.shape[:1], 2)
    assert_array_equal(run(jax.vmap(divide))(A, scalars), A / scalars[:, None])


@each_run
def test_the_reciprocal_of_a_quotient_rounds_twice(run):
    one, c = np.float32(1), np.float32(2688)
    assert_array_equal(run(lambda a, b: divide(1.0, divide(c, a)) * b)(A, A), one / (c / A) * A)


@each_run
def test_a_quotient_of_a_quotient_and_a_product_with_one_are_left_alone(run):
    """The shape of a block scale, and of a decoded value."""
    amax, q, k = np.abs(floats((A.shape[0], 1), 3)), np.float32(6), np.float32(2688)
    assert_array_equal(run(lambda a, b: divide(a, q) * divide(k, b))(A, amax), A / q * (k / amax))
    assert_array_equal(run(lambda a, b: divide(a * b, k))(A, amax), A * amax / k)


def test_special_values_divide_as_ieee_says():
    a = np.float32([0, -0.0, 1, -1, np.inf, -np.inf, np.nan])
    a, b = np.meshgrid(a, a)
    with np.errstate(all="ignore"):
        want = a / b
    for run in (lambda f: f, jax.jit):
        got = np.asarray(run(divide)(a, b))
        assert_array_equal(got, want)
        assert_array_equal(np.signbit(got)[want == 0], np.signbit(want)[want == 0])


def test_python_numbers_and_arrays_mix():
    for a, b in [(1, 3), (1.0, np.float32(3)), (np.float32([1]), 3), (1, jnp.float32([[3]]))]:
        got = divide(a, b)
        assert got.dtype == jnp.float32 and got.shape == np.broadcast_shapes(np.shape(a), np.shape(b))
        assert_array_equal(got.ravel(), np.float32([1]) / np.float32(3))


# --- correct_quotient: what a GPU needs


def by_ulps(q, n):
    return (q.view(np.int32) + np.int32(n)).view(np.float32)


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_a_quotient_one_unit_off_is_put_right(off):
    a, b = floats((500_000,), 4, (-50, 50)), floats((500_000,), 5, (-50, 50))
    assert_array_equal(jax.jit(correct_quotient)(a, b, by_ulps(a / b, off)), a / b)


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_quotients_beside_powers_of_two_are_put_right(off):
    near = np.r_[0:70, 2**23 - 70 : 2**23, 2**22 - 5 : 2**22 + 5].astype(np.int32)
    one_to_two = (near + (127 << 23)).view(np.float32)
    a, b = (m.ravel() for m in np.meshgrid(one_to_two, one_to_two))
    # quotients just below and just above 1, and one on it
    assert {int(e) for e in np.frexp(a / b)[1]} == {0, 1}
    assert_array_equal(jax.jit(correct_quotient)(a, b, by_ulps(a / b, off)), a / b)


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_quotients_are_put_right_up_to_the_ends_of_the_range(off):
    a, b = floats((200_000,), 6, (-126, 128)), floats((200_000,), 7, (-126, 128))
    with np.errstate(all="ignore"):
        want = a / b
    # two binades of room: q, a unit off, must be normal too
    inside = (np.abs(want) >= 2.0**-124) & (np.abs(want) < 2.0**126)
    a, b, want = a[inside], b[inside], want[inside]
    assert_array_equal(jax.jit(correct_quotient)(a, b, by_ulps(want, off)), want)


def test_what_is_not_a_normal_number_passes_unchanged():
    special = np.float32([0, -0.0, np.inf, -np.inf, np.nan])
    a, b = (m.ravel() for m in np.meshgrid(np.append(special, np.float32(3)), np.append(special, np.float32(7))))
    with np.errstate(all="ignore"):
        q = a / b
    odd = ~(np.isfinite(q) & (q != 0))
    assert_array_equal(correct_quotient(a, b, q)[odd], q[odd])


# --- materialize


def centred(x, scale):
    return (x - x.mean()) * scale


def test_a_stage_returns_what_its_function_returns():
    x, scale = A[0], np.float32(3)
    want = jax.jit(centred)(x, scale)
    for run in (lambda f: f, jax.jit):
        assert_array_equal(run(functools.partial(materialize, centred))(x, scale), want)


@pytest.mark.parametrize("scale_axis", [0, None])
def test_a_stage_maps_over_rows(scale_axis):
    scale = np.float32(3) if scale_axis is None else np.arange(len(A), dtype=np.float32)
    mapped = jax.vmap(functools.partial(materialize, centred), (0, scale_axis))
    want = jax.jit(jax.vmap(centred, (0, scale_axis)))(A, scale)
    assert_array_equal(jax.jit(mapped)(A, scale), want)
    assert_array_equal(mapped(A, scale), want)


def test_a_stage_maps_over_other_arguments_than_the_first():
    scale = np.arange(5, dtype=np.float32)
    got = jax.vmap(functools.partial(materialize, lambda x, s: x * s), (None, 0))(A[0], scale)
    assert_array_equal(got, A[0] * scale[:, None])


def test_a_stage_maps_twice():
    x = A.reshape(4, 16, 512)
    f = lambda f: jax.vmap(jax.vmap(f, (0, None)), (0, 0))  # noqa: E731
    scale = np.arange(4, dtype=np.float32)
    got = jax.jit(f(functools.partial(materialize, lambda x, s: x.max() * s)))(x, scale)
    assert_array_equal(got, x.max(-1) * scale[:, None])


@pytest.mark.parametrize("mapped", [False, True])
def test_a_stage_takes_tuples_lists_and_nothing(mapped):
    def f(x, pair, nothing, many):
        assert nothing is None and isinstance(pair, tuple) and isinstance(many, list)
        return x * pair[0] + pair[1] - many[0]

    whole = A[:8], (A[8:16], A[16:24]), None, [A[24:32]]
    run = functools.partial(materialize, f)
    if mapped:
        run = jax.vmap(run)
    assert_array_equal(jax.jit(run)(*whole), jax.jit(f)(*whole))


def test_a_stage_runs_in_a_scan():
    _, got = lax.scan(lambda c, x: (c, materialize(lambda x: x + x.max(), x)), None, A)
    assert_array_equal(got, A + A.max(-1, keepdims=True))


@pytest.mark.parametrize("first", [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45])
def test_a_stage_runs_whatever_its_first_number_is(first):
    x = np.float32([first, 2])
    assert_array_equal(jax.jit(functools.partial(materialize, jnp.negative))(x), -x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32, jnp.uint8, jnp.bool_])
def test_a_stage_takes_any_dtype(dtype):
    x = jnp.array([0, 1, 1, 0]).astype(dtype)
    assert_array_equal(jax.jit(functools.partial(materialize, lambda x: x[::-1]))(x), x[::-1])


def test_a_stage_of_nothing_is_empty():
    for run in (lambda f: f, jax.jit, jax.vmap):
        got = run(functools.partial(materialize, lambda x: x.astype(jnp.int32)))(jnp.zeros((3, 0)))
        assert got.shape == (3, 0) and got.dtype == jnp.int32


def lowered_for(platform, f, *args):
    return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("run", [lambda f: f, jax.vmap], ids=["plain", "vmap"])
def test_a_stage_is_a_call_of_its_own_on_cpu_alone(run):
    """What stops XLA:CPU from fusing would cost a GPU kernels; it must survive vmap and XLA's inlining of calls."""
    f = run(functools.partial(materialize, jnp.cumsum))
    kept = 'inlineable = "false"'
    assert kept in lowered_for("cpu", f, A)
    assert kept not in lowered_for("cuda", f, A)
    compiled = jax.jit(f).lower(A).compile().as_text()
    assert (" call(" in compiled) == (jax.default_backend() == "cpu")


@pytest.mark.parametrize("run", [lambda f: f, jax.vmap], ids=["plain", "vmap"])
def test_a_function_for_other_platforms_is_traced_for_them_alone(run):
    traced = []

    def elsewhere(x):
        traced.append(x.shape)
        return [jnp.cos(x)]

    f = run(functools.partial(by_platform, cpu=lambda x: [jnp.sin(x)], default=elsewhere))
    on_cpu = lowered_for("cpu", f, A)
    assert "sine" in on_cpu and "cosine" not in on_cpu and not traced
    on_cuda = lowered_for("cuda", f, A)
    assert "cosine" in on_cuda and "sine" not in on_cuda.replace("cosine", "") and traced
    if jax.default_backend() == "cpu":
        for got in (f(A), jax.jit(f)(A)):
            assert_array_equal(got[0], jax.jit(jnp.sin)(A))


@pytest.mark.parametrize("run", [lambda f: f, jax.vmap], ids=["plain", "vmap"])
def test_a_function_may_be_for_any_platform(run):
    f = run(functools.partial(by_platform, cuda=jnp.sin, default=jnp.cos))
    assert "cosine" not in lowered_for("cuda", f, A)
    assert "stablehlo.sine" not in lowered_for("tpu", f, A)
    if jax.default_backend() == "cpu":
        with jax.disable_jit():
            assert_array_equal(f(A), jnp.cos(A))
        assert_array_equal(f(A), jax.jit(jnp.cos)(A))


def test_programs_for_several_platforms_hold_the_function_of_each():
    f = jax.jit(functools.partial(by_platform, cpu=jnp.sin, default=jnp.cos))
    text = jax.export.export(f, platforms=["cpu", "tpu"])(A[0]).mlir_module()
    assert "stablehlo.sine" in text and "stablehlo.cosine" in text


def test_a_quotient_has_a_derivative():
    a, b = np.float32(3), np.float32(7)
    got = jax.grad(divide, (0, 1))(a, b)
    np.testing.assert_allclose(got, (1 / b, -a / b**2), rtol=1e-6)


def test_quotients_are_corrected_everywhere_but_on_cpu():
    corrected = "stablehlo.shift"
    assert corrected not in lowered_for("cpu", divide, A, A)
    assert corrected in lowered_for("cuda", divide, A, A)
    assert corrected in lowered_for("tpu", divide, A, A)


def test_functions_may_hold_traced_values():
    def f(x, scale):
        return materialize(lambda x: x.max() * scale, x)

    want = A[0].max() * np.float32(3)
    assert_array_equal(jax.jit(f)(A[0], np.float32(3)), want)
    with jax.disable_jit():
        assert_array_equal(f(A[0], np.float32(3)), want)
    assert_array_equal(jax.vmap(f, (0, None))(A[:2], np.float32(3)), A[:2].max(-1) * np.float32(3))
    assert_array_equal(jax.grad(lambda s: f(A[0], s))(np.float32(3)), A[0].max())


# --- one device or several -------------------------------------------------------------------------------------------

as_one = functools.partial(undivided, run=jnp.sin, default=jnp.cos)


@pytest.mark.parametrize("run", [jax.jit, lambda f: jax.jit(jax.vmap(f)), lambda f: jax.vmap(jax.jit(f))])
def test_a_program_for_one_device_is_undivided(run):
    x = jnp.arange(4.0)
    assert_array_equal(run(as_one)(x), jax.jit(jnp.sin)(x))


def test_a_program_for_several_devices_is_not():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    x = jax.device_put(jnp.arange(4.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    assert_array_equal(jax.jit(as_one)(x), jax.jit(jnp.cos)(x))
    with jax.disable_jit():
        assert_array_equal(as_one(x), jax.jit(jnp.cos)(x))


def test_a_function_that_holds_a_traced_value_takes_the_other_way():
    x = jnp.arange(4.0)
    got = jax.jit(lambda x, y: undivided(x, run=lambda x: x + y, default=lambda x: x - y))(x, 1.0)
    assert_array_equal(got, x - 1)


def test_what_differentiates_an_undivided_program_takes_the_other_way():
    x = jnp.arange(4.0)
    value, rate = jax.jit(lambda x: jax.jvp(as_one, (x,), (jnp.ones_like(x),)))(x)
    wanted, slope = jax.jit(lambda x: jax.jvp(jnp.cos, (x,), (jnp.ones_like(x),)))(x)
    assert_array_equal(value, wanted)
    assert_array_equal(rate, slope)
