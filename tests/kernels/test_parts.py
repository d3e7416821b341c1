"""Kernels on sharded arrays, on eight virtual devices: the codec's bits, each device on its part, nothing gathered."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_array_equal
from test_gpu_blocks import Interpreted
from test_places import assert_same_numbers
from test_tpu_blocks import Interpreted as tpu_kernels
from test_tpu_blocks import data

import ifjax
from ifjax.arrays import ENCODERS, Encoder, encoders
from ifjax.arrays.ms_eden import ms_eden_operand, ms_eden_packed
from ifjax.arrays.quantize import quantize_rotated
from ifjax.codec import Encoding
from ifjax.numerics import devices
from ifjax.numerics.proofs import by_both
from pallas_kernels import gpu_blocks, tpu_blocks

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


@pytest.fixture
def taken(monkeypatch):
    """Within, CPUs have the GPU's kernels, and are partitioned as accelerators are."""
    monkeypatch.setattr(ENCODERS, "_records", {"mine": Encoder("mine", "cpu", "cpu", lambda: Interpreted)})
    is_manual = lambda: jax.sharding.get_abstract_mesh().manual_axes  # noqa: E731
    monkeypatch.setattr(encoders, "may_be_partitioned", lambda: not is_manual())
    jax.clear_caches()
    with ifjax.kernels("always"):
        yield
    jax.clear_caches()


def sent(compiled):
    return set(re.findall(r"(all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)", compiled.as_text()))


CASES = {
    "columns": ("nvfp4", (32, 64), -1, P("a", "b"), "stochastic"),
    "rows": ("if4", (64, 32), -2, P("a", "b"), "nearest"),
    "squares": ("mxfp4", (128, 64), -1, P("a", "b"), "nearest"),
    "matrices": ("nvfp4", (4, 16, 32), -1, P("a", None, "b"), "stochastic_unbiased"),
    "a sequence": ("mxfp4", (2, 256, 32), -1, P("b", "a"), "stochastic"),
    "blocks that are torn": ("mxfp4", (8, 72), -1, P("a", "b"), "nearest"),
}


@pytest.mark.by_default("*columns", "Explicit-a sequence")
@pytest.mark.parametrize(
    ("kind", "case"), [*(("Auto", case) for case in CASES), ("Explicit", "matrices"), ("Explicit", "a sequence")]
)
def test_devices_encode_and_decode_their_parts(taken, kind, case):
    fmt, shape, axis, spec, rounding = CASES[case]
    kind = AxisType[kind]
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    whole = jnp.asarray(data(shape)).astype(jnp.bfloat16)
    settings = {"axis": axis, "rounding": rounding, "key": None if rounding == "nearest" else jax.random.key(3)}
    settings |= {"block_2d": case == "squares", "amax_axes": (0,) if case == "matrices" else ()}

    def run(x):
        q = ifjax.quantize(x, fmt, **settings)
        return q, q.dequantize(), ifjax.fake_quantize(x, fmt, **settings)

    with jax.set_mesh(mesh):
        x = jax.device_put(whole, NamedSharding(mesh, spec))
        compiled = jax.jit(run).lower(x).compile()
        got = compiled(x)
    with ifjax.kernels("never"):
        expected = jax.jit(run)(whole)
    for a, b in zip(jax.tree.leaves(got[0]), jax.tree.leaves(expected[0]), strict=True):
        assert_array_equal(a, b)
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert_same_numbers(a, b)
    if case == "blocks that are torn":
        return
    has_gathered = kind == AxisType.Explicit and case == "matrices"  # each device has all matrices' amax
    assert sent(compiled) <= {"all-reduce"} | ({"all-gather"} if has_gathered else set())
    for a in (got[0].codes, got[0].scales, *got[1:]):
        assert a.sharding.is_equivalent_to(NamedSharding(mesh, spec), a.ndim)


EDEN = {
    "columns": ((32, 512), -1, P("a", "b")),
    "rows": ((512, 32), -2, P("a", "b")),
    "a sequence": ((2, 256, 64), -1, P("b", "a")),
}


@pytest.mark.by_default("Auto-rows")
@pytest.mark.parametrize("case", EDEN)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_devices_encode_their_parts_by_ms_eden(taken, kind, case):
    shape, axis, spec = EDEN[case]
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType[kind],) * 2)
    whole = jnp.asarray(data(shape)).astype(jnp.bfloat16)

    def run(x, key):
        signs = ifjax.random_signs(jax.random.key(1), 16)
        place = {"axis": axis, "size": 16, "signs": signs, "key": key}
        return ms_eden_packed(x, "nvfp4", **place), ms_eden_operand(x, "nvfp4", in_multiples=True, **place)

    with jax.set_mesh(mesh):
        x = jax.device_put(whole, NamedSharding(mesh, spec))
        lowered = jax.jit(run).lower(x, jax.random.key(3))
        compiled = lowered.compile()
        got = compiled(x, jax.random.key(3))
    assert ("CustomSPMDPartitioning" if kind == "Auto" else "manual_computation") in lowered.as_text()
    with ifjax.kernels("never"):
        expected = jax.jit(run)(whole, jax.random.key(3))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_same_numbers(a, b)
    assert sent(compiled) <= {"all-reduce"}
    for a in (got[0].codes, got[0].scales, got[1].values):
        assert a.sharding.is_equivalent_to(NamedSharding(mesh, spec), a.ndim)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_devices_rotate_their_parts(taken, monkeypatch, kind):
    kernels = tpu_kernels()
    monkeypatch.setattr(ENCODERS, "_records", {"mine": Encoder("mine", "cpu", "cpu", lambda: kernels)})
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType[kind],) * 2)
    whole = jnp.asarray(np.nan_to_num(data((512, 32)), posinf=1, neginf=1)).astype(jnp.bfloat16)

    def run(x):
        return quantize_rotated(x, Encoding.of("nvfp4"), axis=-2, size=16, signs="fixed", key=None)

    with jax.set_mesh(mesh):
        x = jax.device_put(whole, NamedSharding(mesh, P("a", "b")))
        compiled = jax.jit(run).lower(x).compile()
        got = compiled(x)
    assert kernels.calls[:2] == ["rotated_peaks", "encode"]
    with ifjax.kernels("never"):
        expected = jax.jit(run)(whole)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_array_equal(a, b)
    assert sent(compiled) <= {"all-reduce"}


@pytest.mark.by_default("Auto")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
def test_members_of_a_vmap_steps_of_a_scan_and_gradients(taken, kind):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    fake = lambda x: ifjax.fake_quantize(x, "mxfp4")  # noqa: E731

    def run(x):
        y, _ = jax.lax.scan(jax.checkpoint(lambda c, _: (2 * fake(c), None)), jax.vmap(fake)(x), None, length=2)
        return (y**2).sum()

    whole = jnp.asarray(np.nan_to_num(data((4, 16, 32)), posinf=1, neginf=1))
    with jax.set_mesh(mesh):
        x = jax.device_put(whole, NamedSharding(mesh, P("a")))
        compiled = jax.jit(jax.grad(run)).lower(x).compile()
        got = compiled(x)
    assert sent(compiled) <= {"all-reduce"}
    with ifjax.kernels("never"):
        assert_array_equal(got, jax.jit(jax.grad(run))(whole))


@pytest.mark.parametrize("kernels", [gpu_blocks, tpu_blocks])
def test_kernels_are_traced_inside_shard_map_as_it_is_by_default(taken, monkeypatch, kernels):
    """JAX checks that their results vary over the axes over which operands do. It cannot interpret them there."""
    monkeypatch.setattr(ENCODERS, "_records", {"mine": Encoder("mine", "cpu", "cpu", lambda: kernels)})
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    x, w, key = jnp.zeros((64, 128), jnp.bfloat16), jnp.zeros((128, 128), jnp.bfloat16), jax.random.key(3)
    packed = jax.eval_shape(lambda w: ifjax.quantize(w, "nvfp4", axis=0), w)

    def run(x, w, packed, key):
        q = ifjax.quantize(x, "if4")
        noisy = ifjax.fake_quantize(x, "nvfp4", rounding="stochastic", key=key)
        eden = ms_eden_packed(x, "nvfp4", axis=-1, size=16, signs=ifjax.random_signs(key, 16), key=key)
        y = ifjax.quantized_dot_general(x, w, (((1,), (0,)), ((), ())), "nvfp4", key)
        products = [ifjax.dot_general(x, packed, (((1,), (0,)), ((), ())), impl=impl) for impl in ("hopper", "tpu")]
        return q.codes, q.dequantize(), noisy, eden.codes, y, products

    specs = {"in_specs": (P("a"), P(), P(), P()), "out_specs": P("a")}
    traced = jax.jit(jax.shard_map(run, mesh=mesh, **specs)).trace(x, w, packed, key)
    assert str(traced.jaxpr).count("pallas_call") >= 6


def test_programs_of_several_devices_are_exported_without_kernels(taken):
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    x = jax.device_put(jnp.asarray(data((64, 32))), NamedSharding(mesh, P("a")))
    run = jax.jit(lambda x: ifjax.quantize(x, "mxfp4").dequantize())
    assert "CustomSPMDPartitioning" in run.lower(x).as_text()
    exported = jax.export.export(run)(x)
    assert "CustomSPMDPartitioning" not in exported.mlir_module()
    assert_same_numbers(exported.call(x), run(x))


def test_what_devices_cannot_do_is_left_to_xla(taken, monkeypatch):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    x = jax.ShapeDtypeStruct((4, 2, 256, 64), jnp.bfloat16, sharding=NamedSharding(mesh, P(None, "b")))
    with jax.set_mesh(mesh):
        assert "cannot be merged" in ifjax.explain_quantize(x, target="cpu").reason
        monkeypatch.setitem(ENCODERS._records, "mine", Encoder("mine", "tpu", "cpu", lambda: Interpreted))
        x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16, sharding=NamedSharding(mesh, P("a")))
        assert ifjax.explain_quantize(x, target="cpu").path == "mine"
    reason = ifjax.explain_quantize(jax.ShapeDtypeStruct((64, 64), jnp.bfloat16), target="cpu").reason
    assert "AxisType.Explicit" in reason  # libtpu knows no custom partitioning


def test_checks_of_kernels_run_on_one_device(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="tpu")])
    assert devices.may_be_partitioned()
    seen = []
    by_both(lambda: seen.append(devices.may_be_partitioned()))
    assert seen[0] is False
