"""On a CPU blocks are regrouped so that loops over them are long and nested; the results are those of others."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from numpy.testing import assert_array_equal

import ifjax
from ifjax.codec.blocks import split_blocks
from ifjax.codec.encode import Encoding, _encode, _with_long_axes, encode

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("shape", "axis", "lead", "wanted"),
    [
        ((2500, 16), -1, 0, ((4, 625, 16), -1)),
        ((64, 32, 24, 16), -1, 0, ((48, 1024, 16), -1)),
        ((64, 32, 24, 16), -1, 1, ((64, 1, 768, 16), -1)),
        ((4, 1024, 16), -1, 0, ((4, 1024, 16), -1)),
        ((8192, 4, 16, 1), -2, 0, ((32, 1024, 16), -1)),
        ((1, 16, 65536), -2, 0, ((1, 16, 64, 1024), -3)),
        ((9, 16, 100, 7), -3, 0, ((9, 16, 1, 700), -3)),
        ((9, 16, 700), -2, 0, ((9, 16, 700), -2)),
        ((9, 16, 70, 10), -3, 1, ((9, 16, 70, 10), -3)),
        ((10007, 16), -1, 0, ((10007, 16), -1)),
        ((0, 24, 16), -1, 0, ((0, 24, 16), -1)),
        ((1, 16), -1, 0, ((1, 16), -1)),
    ],
)
def test_axes_become_long_and_nested(shape, axis, lead, wanted):
    assert _with_long_axes(shape, axis, lead) == wanted
    assert math.prod(wanted[0]) == math.prod(shape)


SHAPES = [((40_000,), 0, ()), ((7, 33, 100), -1, ()), ((16, 5000), 0, ()), ((6, 20, 9, 7), 1, ()),
          ((5, 60, 50), -1, (0,)), ((3, 40, 64, 2), 2, (1,)), ((3, 1000, 1), 1, (0,)), ((1, 1), 0, ())]  # fmt: skip


@pytest.mark.parametrize(
    ("fmt", "rounding"), [("if4", "nearest"), ("if4", "stochastic"), ("mxfp4", "nearest"), ("hifloat4", "nearest")]
)
@pytest.mark.parametrize(("shape", "axis", "amax_axes"), SHAPES, ids=[str(s) for s, _, _ in SHAPES])
def test_regrouped_blocks_have_the_bytes_of_others(fmt, rounding, shape, axis, amax_axes):
    how = Encoding.of(fmt, rounding=rounding)
    x = RNG.standard_normal(shape, np.float32) * np.exp2(RNG.integers(-20, 20, shape)).astype(np.float32)
    if x.size > 9:
        np.put(x, RNG.choice(x.size, 9, replace=False), [np.nan, np.inf, -np.inf, 0, -0.0, 1e-40, 3e38, -1, 7])
    blocks = split_blocks(jnp.asarray(x), how.fmt.block, axis % x.ndim - x.ndim)
    noise = None
    if how.rounding.draws:
        noise = [RNG.uniform(-0.5, 0.5, blocks.shape).astype(np.float32) for _ in how.fmt.candidates]
    run = {"how": how, "axis": axis % x.ndim - x.ndim, "amax_axes": amax_axes}
    got = jax.jit(functools.partial(encode, **run))(blocks, noise=noise)
    wanted = jax.jit(functools.partial(_encode, **run, in_multiples=False))(blocks, None, noise, None)
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert_array_equal(a, b)


def test_a_program_for_one_device_regroups_and_others_do_not():
    x = jnp.asarray(RNG.standard_normal((64, 4, 384), np.float32))
    assert "6x1024x16xf32" in jax.jit(ifjax.quantize).lower(x).as_text()
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:8])
    divided = jax.device_put(x, NamedSharding(mesh, PartitionSpec("a", "b")))
    compiled = jax.jit(ifjax.quantize).lower(divided).compile()
    assert "1024,16]" not in compiled.as_text() and "all-gather" not in compiled.as_text()
    jax.tree.map(assert_array_equal, compiled(divided), ifjax.quantize(x))
