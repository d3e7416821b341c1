"""A mapped function is one operation of a program for one CPU and has the bits of the function, however it is run."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from numpy.testing import assert_array_equal

from ifjax.formats.floats import as_float, bits_of
from ifjax.numerics.mapped import mapped
from ifjax.numerics.xla import divide

RNG = np.random.default_rng(0)
X, ROWS = RNG.standard_normal((8, 6, 16), np.float32), RNG.standard_normal((8, 6, 1), np.float32)
NUMBER = np.float32(1.7)


def arithmetic(x, rest):
    """Rounding, bits, a quotient and constants; of `rest`, the second is not read and the third is nothing."""
    rows, _, _, number = rest
    y = jnp.where(rows == 0, 0, divide(x * number, 2688.0) * rows)
    return as_float(bits_of(jnp.round(y) - y) & np.int32(-2))


def direct(x, rows, number=NUMBER):
    return arithmetic(x, (rows, rows, None, number))


def in_one(x, rows, number=NUMBER):
    return mapped(arithmetic)(x, (rows, rows, None, jnp.asarray(number)))


RUNS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "vmap": jax.vmap,
    "jit-vmap": lambda f: jax.jit(jax.vmap(jax.vmap(f), in_axes=(1, 1), out_axes=1)),
    "vmap of the rows": lambda f: lambda x, rows: jax.vmap(f, in_axes=(None, 0), out_axes=0)(x[0], rows),
    "vmap of the array": lambda f: lambda x, rows: jax.jit(jax.vmap(f, in_axes=(2, None), out_axes=2))(x, rows[..., 0]),
    "scan": lambda f: lambda x, rows: lax.scan(lambda _, each: (None, f(*each)), None, (x, rows))[1],
    "remat": lambda f: jax.jit(jax.checkpoint(f)),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_mapped_function_has_the_bits_of_the_function(run):
    assert_array_equal(run(in_one)(X, ROWS).view(np.int32), run(direct)(X, ROWS).view(np.int32))


def test_it_is_one_operation_among_arrays_and_reads_what_it_needs():
    text = jax.jit(in_one).lower(X, ROWS).as_text()
    assert text.count("stablehlo.map") == 1
    before, after = text.split("stablehlo.map")
    assert before.count("stablehlo.constant") == 1, "constants but the number are scalars of the function"
    operands = after[: after.index(")")]
    assert operands.count("%") == 3, f"x, rows and the number, and not the rows twice: {operands}"


@pytest.mark.parametrize(
    ("f", "args"),
    [
        (lambda x: jnp.asarray(np.arange(16, dtype=np.float32))[x], (np.arange(16),)),
        (lambda x, y: x.astype(jnp.float32) * y, (X.astype(jnp.bfloat16), ROWS)),
        (jnp.sin, (NUMBER,)),
    ],
    ids=["look-up", "two types of floats", "a number"],
)
def test_other_functions_stay_as_they_are(f, args):
    assert "stablehlo.map" not in jax.jit(mapped(f)).lower(*args).as_text()
    assert_array_equal(jax.jit(mapped(f))(*args), jax.jit(f)(*args))


def test_programs_for_several_devices_divide_the_operations():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    x, rows = (jax.device_put(a, NamedSharding(mesh, PartitionSpec("data"))) for a in (X, ROWS))
    compiled = jax.jit(in_one).lower(x, rows).compile()
    text = compiled.as_text()
    assert " map(" not in text and "all-gather" not in text
    assert_array_equal(compiled(x, rows), jax.jit(direct)(X, ROWS))


def test_a_derivative_is_that_of_the_function():
    got, wanted = (jax.grad(lambda x, f=f: (f(x, ROWS) * x).sum())(X) for f in (in_one, direct))
    assert_array_equal(got, wanted)


def test_an_empty_array_stays_empty():
    assert jax.jit(in_one)(X[:0], ROWS[:0]).shape == (0, 6, 16)


def test_sizes_may_be_unknown_until_a_program_runs():
    sizes = jax.export.symbolic_shape("n, 6, 16")
    x, rows = (jax.ShapeDtypeStruct((sizes[0], 6, last), jnp.float32) for last in (16, 1))
    exported = jax.export.export(jax.jit(in_one))(x, rows)
    assert_array_equal(exported.call(X, ROWS), jax.jit(direct)(X, ROWS))
