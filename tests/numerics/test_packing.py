"""Packed bytes are the codes' bits one after another, for every width, along every axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from ifjax.numerics.packing import group_of, packed_length
from ifjax.numerics.packing import pack as eager_pack
from ifjax.numerics.packing import unpack as eager_unpack

# One program for each, instead of one for each operation.
pack = jax.jit(eager_pack, static_argnums=(1, 2))
unpack = jax.jit(eager_unpack, static_argnums=(1, 2))
each_width = pytest.mark.parametrize("bits", range(1, 9))


def random_codes(shape, bits, seed=0):
    return np.random.default_rng(seed).integers(0, 2**bits, shape, np.uint8)


def bit_string(codes, bits):
    """uint8 [..., bytes]: the codes of the last axis as one string of bits, lowest first, in whole groups."""
    string = (codes[..., None] >> np.arange(bits)) & 1
    string = string.reshape(*codes.shape[:-1], -1).astype(np.uint8)
    missing = 8 * packed_length(codes.shape[-1], bits) - string.shape[-1]
    return np.packbits(np.pad(string, [(0, 0)] * (codes.ndim - 1) + [(0, missing)]), axis=-1, bitorder="little")


def merged(groups, axis, length):
    """[..., groups, group, ...] -> [..., length, ...]"""
    at = groups.ndim + axis
    flat = groups.reshape(*groups.shape[: at - 1], -1, *groups.shape[at + 1 :])
    return np.take(flat, np.arange(length), axis)


@pytest.mark.parametrize(("bits", "group"), [(4, (2, 1)), (3, (8, 3)), (6, (4, 3)), (1, (8, 1)), (8, (1, 1))])
def test_groups_fill_whole_bytes(bits, group):
    assert group_of(bits) == group


@each_width
def test_no_bit_is_wasted_but_in_the_last_group(bits):
    group, width = group_of(bits)
    assert 8 * width == group * bits
    for length in range(40):
        assert packed_length(length, bits) == -(-length // group) * width


def test_the_low_nibble_comes_first():
    assert_array_equal(pack(jnp.array([0x1, 0x2, 0xF, 0x8, 0x7]), 4), np.uint8([0x21, 0x8F, 0x07]))


def test_eight_three_bit_codes_lie_low_bits_first_in_three_bytes():
    word = sum(code << 3 * i for i, code in enumerate(range(8)))
    assert_array_equal(pack(jnp.arange(8), 3), np.uint8([word & 0xFF, word >> 8 & 0xFF, word >> 16]))


@each_width
@pytest.mark.parametrize("length", [0, 1, 21])
def test_bytes_are_the_string_of_bits_and_unpack_to_the_codes(bits, length):
    codes = random_codes((3, length), bits)
    packed = pack(jnp.asarray(codes), bits)
    assert packed.dtype == jnp.uint8 and packed.shape == (3, packed_length(length, bits))
    assert_array_equal(packed, bit_string(codes, bits))
    groups = np.asarray(unpack(packed, bits))
    assert groups.dtype == np.int32 and groups.shape == (3, -(-length // group_of(bits)[0]), group_of(bits)[0])
    assert_array_equal(merged(groups, -1, length), codes)
    assert not groups.reshape(3, -1)[:, length:].any()


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_every_axis_packs_alike(bits, axis):
    codes = random_codes((10, 9, 13), bits)
    packed = np.asarray(pack(jnp.asarray(codes), bits, axis))
    assert_array_equal(packed, np.moveaxis(bit_string(np.moveaxis(codes, axis, -1), bits), -1, axis))
    negative = axis - 3 if axis >= 0 else axis
    assert_array_equal(merged(np.asarray(unpack(jnp.asarray(packed), bits, axis)), negative, codes.shape[axis]), codes)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_every_byte_is_the_packing_of_what_it_unpacks_to(bits):
    width = group_of(bits)[1]
    packed = random_codes((512, width), 8)
    assert_array_equal(pack(unpack(jnp.asarray(packed), bits)[:, 0], bits), packed)


@pytest.mark.by_default("4")
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_jit_and_vmap_change_nothing(bits):
    codes = random_codes((5, 3, 12), bits)
    packed = pack(jnp.asarray(codes), bits)
    assert_array_equal(eager_pack(jnp.asarray(codes), bits), packed)
    assert_array_equal(eager_unpack(packed, bits), unpack(packed, bits))
    assert_array_equal(jax.jit(jax.vmap(lambda c: eager_pack(c, bits)))(codes), packed)
    assert_array_equal(jax.jit(jax.vmap(lambda p: eager_unpack(p, bits)))(packed), unpack(packed, bits))
