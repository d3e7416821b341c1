"""Bit for bit what the published implementation computes, jitted or not, mapped or not, in every format and rule.

Nothing here names a platform: on a machine with a GPU the same tests judge the GPU.
"""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from numpy.testing import assert_array_equal
from test_codec import encode_in_one_pass
from test_oracle import REFERENCE_RUNS, RULED, fields, published_format, quantize_kinds

import ifjax
from ifjax import codec
from ifjax.codec import Encoding
from ifjax.codec.blocks import merge_blocks, split_blocks
from ifjax.numerics.packing import pack

OURS = Path(__file__).resolve().parents[1] / "golden"

# A rule or format of every kind, for the ways to run that differ in how XLA compiles them and in nothing else.
FEW = [
    ("nvfp4", "static_6"), ("nvfp4", "mse"), ("if4", "mse"), ("if6_e2m3", "mae"), ("if3_bs8", "abs_max"),
    ("nvint3", "static_6"), ("mxfp4", "static_6"),
]  # fmt: skip
# Where a block has a choice, by every format and by every loss.
CHOOSING = [
    ("nvfp4", "mse"), ("nvfp4_bs8", "mae"), ("if4", "mse"), ("if4", "mae"), ("if4_bs8", "abs_max"), ("if3", "mae"),
    ("if3_bs8", "mse"), ("if6_e2m3", "mse"), ("if6_e3m2", "abs_max"),
]  # fmt: skip


def each(cases):
    return pytest.mark.parametrize(("name", "rule"), cases)


def record(name, rule):
    """What a published data type and rule mean together."""
    if name.startswith("nvfp4") and rule in ("mse", "mae", "abs_max"):
        return ifjax.get_format(name.replace("nvfp4", "fouroversix"))
    fmt = ifjax.get_format(name)
    return dataclasses.replace(fmt, peak=4.0) if rule == "static_4" else fmt


class Got(NamedTuple):
    codes: jax.Array
    packed: jax.Array
    scales: jax.Array
    amax: jax.Array | None
    deq: jax.Array


def quantized(x, fmt, rule, **settings):
    loss = None if rule.startswith("static") else rule
    q = ifjax.quantize(x, fmt, loss=loss, **settings)
    return Got(q.unpacked_codes(), q.codes, q.scales, q.amax, q.dequantize(jnp.float32))


def together(x, fmt, rule):
    """Tensors [k, rows, columns] in one array, each with its own amax."""
    return quantized(x, fmt, rule, amax_axes=(0,) if fmt.has_tensor_scale else ())


def one_by_one(x, fmt, rule):
    results = [quantized(tensor, fmt, rule) for tensor in x]
    return Got(*(None if field[0] is None else jnp.stack(field) for field in zip(*results, strict=True)))


def mapped(x, fmt, rule):
    return jax.vmap(lambda tensor: quantized(tensor, fmt, rule))(x)


def in_one_pass(x, fmt, rule):
    """As `together`, by the arrangement of the encoder that a CPU does not take."""
    loss = "mse" if rule.startswith("static") else rule
    blocks = split_blocks(x, fmt.block, -1)
    codes, scales, amax = encode_in_one_pass(
        blocks, Encoding.of(fmt, loss=loss), axis=-1, amax_axes=(0,) if fmt.has_tensor_scale else ()
    )
    values = merge_blocks(codec.decode(codes, scales[..., None], fmt, amax=amax), -1)
    codes = merge_blocks(codes, -1)
    return Got(codes, pack(codes, fmt.bits), scales, amax, values)


def in_a_jit(run):
    return jax.jit(run, static_argnames=("fmt", "rule"))


def assert_meets(got, want, fmt):
    """`got` equals the vectors outside ambiguous blocks, and is a valid encoding inside them."""
    codes, packed, scales, amax, deq = (None if a is None else np.asarray(a) for a in got)
    clear = ~want.get("ambiguous", np.zeros(want["scales"].shape, bool))
    elements = np.repeat(clear, fmt.block, axis=-1)
    if not fmt.has_tensor_scale:
        assert amax is None
        amax = np.ones(len(codes), np.float32)
    else:
        assert_array_equal(amax.view(np.uint32), want["amax"].view(np.uint32))
    assert_array_equal(scales[clear], want["scales"][clear])
    assert_array_equal(codes[elements], want["codes"][elements])
    assert_array_equal(deq[elements], want["deq"][elements])
    if "packed" in want:
        assert_array_equal(packed[elements[..., ::2]], want["packed"][elements[..., ::2]])
    if not clear.all():
        values = [oracle.dequantize(*args, fmt.name) for args in zip(codes, scales, amax, strict=True)]
        assert_array_equal(deq, values)


# --- every published file


@functools.cache
def published(folder, name, rule):
    """The 19 tensors, and what the reference makes of them.

    Where its squares leave float32's range it chooses nothing, so there it is what the oracle makes of them.
    """
    want = fields(folder, f"fmt_{name}.npz", f"{rule}__")
    x = np.concatenate([fields(folder, "inputs.npz", "")["x"], want["x_ties"][None]])
    fmt = published_format(name, rule)
    ours = quantize_kinds(x, fmt, rule)
    if ours.lost.any():
        elements = np.repeat(ours.lost, fmt.block, axis=-1)
        for field in ("codes", "scales", "deq", "select", "ambiguous"):
            here = elements if field in ("codes", "deq") else ours.lost
            want[field] = np.where(here, getattr(ours, field), want[field])
        want.pop("packed", None)
    return x, want


@pytest.mark.by_default("if4-mse", "mxfp4-*", "nvfp4-mse")
@each(RULED)
def test_published_vectors_are_met_in_one_jit(golden_dir, name, rule):
    x, want = published(golden_dir, name, rule)
    fmt = record(name, rule)
    assert_meets(in_a_jit(together)(x, fmt=fmt, rule=rule), want, fmt)


@pytest.mark.by_default("if4-mse")
@each(CHOOSING)
def test_published_vectors_are_met_in_one_pass(golden_dir, name, rule):
    x, want = published(golden_dir, name, rule)
    fmt = record(name, rule)
    assert_meets(in_a_jit(in_one_pass)(x, fmt=fmt, rule=rule), want, fmt)


@pytest.mark.by_default("if4-mse")
@each(FEW)
def test_published_vectors_are_met_under_vmap(golden_dir, name, rule):
    x, want = published(golden_dir, name, rule)
    fmt = record(name, rule)
    assert_meets(in_a_jit(mapped)(x, fmt=fmt, rule=rule), want, fmt)


@pytest.mark.by_default("if4-mse")
@each(FEW)
def test_published_vectors_are_met_without_a_jit_of_the_users(golden_dir, name, rule):
    x, want = published(golden_dir, name, rule)
    fmt = record(name, rule)
    assert_meets(one_by_one(x, fmt, rule), want, fmt)


@pytest.mark.slow
@each([("if4", "mse"), ("nvfp4", "abs_max"), ("mxfp6_e3m2", "static_4")])
def test_published_vectors_are_met_operation_by_operation(golden_dir, name, rule):
    x, want = published(golden_dir, name, rule)
    fmt = record(name, rule)
    with jax.disable_jit():
        got = together(x, fmt, rule)
    assert_meets(got, want, fmt)


@pytest.mark.by_default("if4-*")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@each([("if4", "mse"), ("mxfp4", "static_6"), ("nvfp6_e3m2", "static_6")])
def test_published_vectors_are_met_from_narrow_floats(golden_dir, name, rule, dtype):
    x, want = published(golden_dir, name, rule)
    fmt = record(name, rule)
    if dtype == jnp.bfloat16:
        fits = np.append(fields(golden_dir, "inputs.npz", "")["is_bf16"], False)
    else:
        with np.errstate(over="ignore"):
            fits = (x.astype(np.float16).astype(np.float32) == x).all((1, 2))
    assert fits.sum() > 1
    got = in_a_jit(together)(jnp.asarray(x[fits]).astype(dtype), fmt=fmt, rule=rule)
    assert_meets(got, {key: a[fits] for key, a in want.items() if a.ndim and len(a) == len(fits)}, fmt)


# --- rotated, transposed, square, padded, stochastic


@pytest.fixture(scope="module")
def turned(golden_dir):
    with np.load(golden_dir / "rht_2d_transpose.npz") as arrays:
        return dict(arrays)


def assert_is(q, turned, prefix, transposed=False):
    scales, codes = q.scales, q.unpacked_codes()
    if q.amax is not None:
        assert_array_equal(q.amax, turned[f"{prefix}__amax"])
    assert_array_equal(scales.T if transposed else scales, turned[f"{prefix}__scales"])
    assert_array_equal(codes.T if transposed else codes, turned[f"{prefix}__codes"])


@pytest.mark.slow
@each(REFERENCE_RUNS)
def test_rotated_and_transposed_matrices_are_the_references(turned, name, rule):
    x = jnp.asarray(turned["x_bf16bits"].view(ml_dtypes.bfloat16))
    quantize = functools.partial(ifjax.quantize, fmt=record(name, rule))
    assert_is(quantize(ifjax.hadamard(x)), turned, f"{name}_{rule}_rht")
    assert_is(quantize(x.T), turned, f"{name}_{rule}_t")
    assert_is(quantize(ifjax.hadamard(x.T)), turned, f"{name}_{rule}_t_rht")
    # the same without moving a value: blocks and rotation down the columns
    q = quantize(ifjax.hadamard(x, axis=0), axis=0)
    assert_is(q, turned, f"{name}_{rule}_t_rht", transposed=True)


@pytest.mark.by_default("if4-*")
@each(REFERENCE_RUNS)
def test_square_blocks_are_the_references_and_so_is_their_transpose(turned, name, rule):
    x = jnp.asarray(turned["x_bf16bits"].view(ml_dtypes.bfloat16))
    q = ifjax.quantize(x, record(name, rule), block_2d=True)
    assert_is(q, turned, f"{name}_{rule}_2d")
    assert_is(q.T, turned, f"{name}_{rule}_t_2d")


@pytest.mark.by_default("nvint4-*")
@each(REFERENCE_RUNS)
def test_square_blocks_of_the_transposed_matrix_are_the_references(turned, name, rule):
    x = jnp.asarray(turned["x_bf16bits"].view(ml_dtypes.bfloat16)).T
    assert_is(ifjax.quantize(x, record(name, rule), block_2d=True), turned, f"{name}_{rule}_t_2d")


@pytest.mark.by_default("if4-mse")
@each([("nvfp4", "mse"), ("mxfp4", "static_6"), ("if4", "mse")])
def test_a_padded_matrix_is_the_references(golden_dir, name, rule):
    want = fields(golden_dir, "layout.npz", f"pad_{name}_{rule}__")
    x = jnp.asarray(fields(golden_dir, "layout.npz", "pad_x_")["bf16bits"].view(ml_dtypes.bfloat16))
    q = ifjax.quantize(x, record(name, rule))
    if q.amax is not None:
        assert_array_equal(q.amax, want["amax"])
    # The reference pads the matrix to whole tiles before it quantizes; what it adds is zero codes and zero scales.
    rows, columns = want["padded_shape"]
    missing = [(0, rows - len(x)), (0, columns // 2 - q.codes.shape[1])]
    assert_array_equal(np.pad(np.asarray(q.codes), missing), want["packed"])
    scales = np.asarray(q.scales)
    if want["scales_are_swizzled"]:
        flat = ifjax.exchange.swizzle_scales(scales)
    else:
        flat = np.pad(scales, [(0, rows - len(x)), (0, columns // q.fmt.block - scales.shape[1])]).ravel()
    assert_array_equal(flat, want["scales_flat"])


@pytest.mark.by_default("if4-*")
@pytest.mark.parametrize(("style", "headroom"), [("stochastic", 1.0), ("stochastic_unbiased", 16 / 17)])
@pytest.mark.parametrize(("name", "rule"), REFERENCE_RUNS[:4])
def test_stochastic_rounding_with_the_references_noise_gives_its_values(golden_dir, name, rule, style, headroom):
    want = fields(golden_dir, "stochastic.npz", f"{name}_{rule}_{style}__")
    x, fmt = fields(golden_dir, "stochastic.npz", "")["x"], record(name, rule)
    noise = [want[f"u{i}_x65536"] / np.float32(65536) - np.float32(0.5) for i in range(len(fmt.candidates))]

    @jax.jit
    def run(x, noise):
        blocks, *noise = (split_blocks(a, fmt.block, -1) for a in (x, *noise))
        codes, scales, amax = codec.encode(blocks, Encoding.of(fmt, rounding=style), axis=-1, noise=noise)
        values = codec.decode(codes, scales[..., None], fmt, amax=amax, headroom=headroom)
        return scales, amax, merge_blocks(values, -1)

    scales, amax, values = run(x, noise)
    assert_array_equal(amax, want["amax"])
    assert_array_equal(scales, want["scales"])
    # Its codes write zeros with an arbitrary sign, so values are compared.
    assert_array_equal(values, oracle.dequantize(want["codes"], want["scales"], want["amax"], fmt.name, headroom))


# --- our own file: no other is needed


PAIRS = [(name, loss) for name, fmt in oracle.FORMATS.items() for loss in fmt.losses]


def our_file(name, loss):
    x = [fields(OURS, "formats.npz", "")["x"], fields(OURS, "formats.npz", f"{name}__")["x"]]
    return np.concatenate(x), fields(OURS, "formats.npz", f"{name}__{loss}__")


@pytest.mark.by_default("if4-*", "mxfp4-*")
@pytest.mark.parametrize(("name", "loss"), PAIRS)
def test_our_own_vectors_are_met(name, loss):
    x, want = our_file(name, loss)
    fmt = ifjax.get_format(name)
    assert_meets(together(x, fmt, loss), want, fmt)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "loss"), [("if4", "mse"), ("nvfp4", "static"), ("mxfp3", "static")])
def test_our_own_vectors_are_met_under_vmap_in_a_jit(name, loss):
    x, want = our_file(name, loss)
    fmt = ifjax.get_format(name)
    assert_meets(in_a_jit(mapped)(x, fmt=fmt, rule=loss), want, fmt)


def test_our_own_file_covers_every_format_that_the_oracle_knows():
    covered = {key.split("__")[0] for key in fields(OURS, "formats.npz", "") if key.endswith("__codes")}
    assert covered == set(oracle.FORMATS)
