"""Which way a product goes, and the kernels' layouts: chosen by device kind, told in words, exactly invertible.

That a kernel's own arithmetic is right is its own test's; here it is handed real products, interpreted.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import ifjax
from ifjax.products.backends import blocked_along
from pallas_kernels import tpu_matmul

FOUR_BITS = ["if4", "nvfp4", "fouroversix", "nvint4"]
TARGETS = ["H200", "TPU v6e"]


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32)).astype(dtype)


def assert_same(a, b):
    """Equal trees and equal bytes."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        np.testing.assert_array_equal(one.view(f"u{one.dtype.itemsize}"), other.view(f"u{other.dtype.itemsize}"))


# --- which way --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "path", "reason"),
    [
        ("NVIDIA H200", "hopper", "H200"), ("NVIDIA H100 80GB HBM3", "hopper", "H100"),
        ("NVIDIA A100-SXM4-40GB", "xla", "no kernel for NVIDIA A100"), ("NVIDIA B200", "xla", "two QTensors"),
        ("TPU v5 lite", "tpu", "v5 lite"), ("TPU v6e", "tpu", "v6e"), ("TPU v4", "xla", "no kernel"),
        ("cpu", "xla", "no kernel for cpu"),
    ],
)  # fmt: skip
def test_the_device_kind_decides(target, path, reason):
    x, q = normal(3, 64, dtype=jnp.bfloat16), ifjax.quantize(normal(64, 32, dtype=jnp.bfloat16), axis=0)
    explanation = ifjax.explain_matmul(x, q, target=target)
    assert explanation.path == path
    assert reason in explanation.reason


def test_the_first_device_or_a_platform_stands_for_a_target():
    x, q = normal(3, 64), ifjax.quantize(normal(64, 32), axis=0)
    assert "cpu" in ifjax.explain_matmul(x, q).reason
    assert "no kernel for cuda" in ifjax.explain_matmul(x, q, platform="cuda").reason
    assert ifjax.explain_matmul(x, x.T) == ("xla", "neither operand is packed")


@pytest.mark.parametrize(
    ("rows", "dtype", "path"),
    [
        (4, "float32", "xla_few_rows"), (4, "bfloat16", "xla_few_rows"), (5, "float32", "xla"),
        (63, "bfloat16", "xla"), (64, "bfloat16", "xla_float32"), (64, "float32", "xla"),
    ],
)  # fmt: skip
def test_on_a_cpu_the_rows_decide(rows, dtype, path):
    def explain(n):
        q = jax.eval_shape(lambda w: ifjax.quantize(w, axis=-2), jax.ShapeDtypeStruct((256, n), dtype))
        return ifjax.explain_matmul(jax.ShapeDtypeStruct((rows, 256), dtype), q, platform="cpu").path

    assert explain(256) == path
    assert explain(255) == ("xla" if path == "xla_few_rows" else path)  # too small a matrix


@pytest.mark.parametrize(
    ("settings", "dims", "dtype", "reason"),
    [
        ({"fmt": "if6", "axis": 0}, None, jnp.bfloat16, "codes of 6 bits"),
        ({"axis": 1}, None, jnp.bfloat16, "contracts the axis that blocks lie along"),
        ({"axis": 0}, None, jnp.float32, "float16 or bfloat16"),
        ({"fmt": "mxfp4", "axis": 0}, None, jnp.bfloat16, "block"),
        ({"fmt": "if4_bs8", "axis": 0}, None, jnp.bfloat16, "blocks of 8"),
    ],
    ids=["6 bits", "axis", "float32", "MX", "blocks of 8"],
)
def test_what_the_hopper_kernel_cannot_take_goes_by_xla_and_says_why(settings, dims, dtype, reason):
    x, q = normal(3, 64, dtype=dtype), ifjax.quantize(normal(64, 32, dtype=dtype), **settings)
    explanation = ifjax.explain_matmul(x, q, dims, target="H200")
    assert explanation.path == "xla"
    assert reason in explanation.reason
    # and so it is: no kernel in the program for that platform
    text = lowered(lambda x, q: ifjax.matmul(x, q, target="H200"), x, q, platform="cuda")
    assert "mosaic" not in text


def test_shapes_suffice():
    x = jax.ShapeDtypeStruct((3, 64), jnp.bfloat16)
    q = jax.eval_shape(lambda w: ifjax.quantize(w, axis=-2), jax.ShapeDtypeStruct((64, 32), jnp.bfloat16))
    assert ifjax.explain_matmul(x, q, target="H200").path == "hopper"


@pytest.mark.slow
def test_two_nvfp4_matrices_multiply_by_their_scales_on_blackwell():
    def explain(a, b, axis=-2):
        shapes = jax.ShapeDtypeStruct((8, 64), jnp.bfloat16), jax.ShapeDtypeStruct((64, 32), jnp.bfloat16)
        a, b = (jax.eval_shape(lambda w, s=s: ifjax.quantize(w, **s), w)
                for w, s in zip(shapes, ({"fmt": a}, {"fmt": b, "axis": axis}), strict=True))  # fmt: skip
        return ifjax.explain_matmul(a, b, target="NVIDIA B200")

    assert explain("nvfp4", "fouroversix").path == "scaled_matmul"
    assert "marks in their signs" in explain("nvfp4", "if4").reason
    assert "if4" in explain("if4", "nvfp4").reason
    assert "along their blocks" in explain("nvfp4", "nvfp4", axis=-1).reason
    squares = jax.eval_shape(lambda w: ifjax.quantize(w, "nvfp4", block_2d=True), jnp.ones((64, 32)))
    assert ifjax.explain_matmul(jax.eval_shape(lambda x: ifjax.quantize(x, "nvfp4"), jnp.ones((8, 64))), squares,
                                target="B200").path == "scaled_matmul"  # fmt: skip
    a, b = ifjax.quantize(normal(8, 64), "nvfp4"), ifjax.quantize(normal(64, 32), "fouroversix", axis=0)
    product = functools.partial(ifjax.matmul, target="B200")
    np.testing.assert_allclose(product(a, b), a.dequantize() @ b.dequantize(), rtol=1e-5, atol=1e-5)
    assert "scaled" in lowered(product, a, b, platform="cuda").lower()
    assert "scaled" not in lowered(product, a, b, platform="cpu").lower()
    forced = functools.partial(ifjax.matmul, impl="scaled_matmul")
    assert "scaled" in lowered(forced, a, b, platform="cuda").lower()
    with pytest.raises(ValueError, match=r"'scaled_matmul' cannot take this product: .* marks in their signs"):
        forced(a, ifjax.quantize(b.dequantize(), axis=0))
    with pytest.raises(ValueError, match="'scaled_matmul' cannot take this product: it multiplies two QTensors"):
        forced(a.dequantize(), b)


def test_a_matrix_with_batch_axes_goes_by_xla():
    x = normal(2, 3, 64, dtype=jnp.bfloat16)
    q = ifjax.quantize(normal(2, 64, 32, dtype=jnp.bfloat16), axis=1)
    assert "batch axes" in ifjax.explain_matmul(x, q, target="H200").reason


# --- one function for every platform ----------------------------------------------------------------------------------


def lowered(f, *args, platform):
    return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.slow
@pytest.mark.parametrize(("target", "platform"), [("H200", "cuda"), ("TPU v6e", "tpu")])
@pytest.mark.parametrize("is_prepacked", [False, True])
def test_the_kernel_is_in_its_platforms_program_only(target, platform, is_prepacked):
    x, q = normal(3, 256, dtype=jnp.bfloat16), ifjax.quantize(normal(256, 128, dtype=jnp.bfloat16), axis=0)
    q = ifjax.prepack(q, target) if is_prepacked else q
    product = functools.partial(ifjax.matmul, target=target)
    call = {"cuda": "mosaic_gpu", "tpu": "tpu_custom_call"}[platform]
    assert call in lowered(product, x, q, platform=platform)
    assert call not in lowered(product, x, q, platform="cpu")
    expected = np.asarray(x).astype(np.float32) @ np.asarray(q.dequantize(jnp.float32))
    np.testing.assert_allclose(np.asarray(product(x, q)).astype(np.float32), expected, rtol=2e-2, atol=2e-1)
    # the gradient too, with the product the other way round by XLA
    jax.grad(lambda x: product(x, q).astype(jnp.float32).sum())(x)


@pytest.mark.parametrize(("target", "platform"), [("H200", "cuda"), ("TPU v6e", "tpu")])
def test_a_product_exports_for_a_platform(target, platform):
    pytest.importorskip("flatbuffers", reason="jax.export serializes with it")
    x, q = normal(3, 256, dtype=jnp.bfloat16), ifjax.quantize(normal(256, 128, dtype=jnp.bfloat16), axis=0)
    product = jax.jit(functools.partial(ifjax.matmul, target=target))
    assert export.deserialize(export.export(product, platforms=(platform,))(x, q).serialize()).platforms == (platform,)


def test_a_forced_kernel_refuses_what_it_cannot_take():
    x, q = normal(3, 64, dtype=jnp.bfloat16), ifjax.quantize(normal(64, 32, dtype=jnp.bfloat16), axis=0)
    with pytest.raises(ValueError, match="prepacked for hopper"):
        ifjax.matmul(x, ifjax.prepack(q, "H200"), impl="tpu")
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        ifjax.matmul(x.astype(jnp.float32), q.astype(np.float32), impl="hopper")


# --- prepacking -------------------------------------------------------------------------------------------------------


@pytest.mark.by_default("nvfp4-*", "nvint4-*")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("name", "shape", "axis"),
    [("if4", (70, 40), 0), ("if4", (70, 3, 20), 0), ("if4", (3, 70, 20), 1), *((n, (40, 70), 1) for n in FOUR_BITS)],
)
def test_unpacking_is_the_exact_inverse(target, name, shape, axis):
    q = ifjax.quantize(normal(*shape), name, axis=axis)
    prepacked = ifjax.prepack(q, target)
    assert (prepacked.shape, prepacked.ndim, prepacked.dtype) == (q.shape, q.ndim, q.dtype)
    assert_same(prepacked.unpack(), q)
    np.testing.assert_array_equal(prepacked.dequantize(), q.dequantize())


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_layers_stay_layers(target):
    q = ifjax.quantize(normal(3, 64, 32), axis=1, amax_axes=(0,))
    prepacked = ifjax.prepack(q, target)
    assert prepacked.shape == q.shape
    assert_same(prepacked.unpack(), q)
    _, sliced = jax.lax.scan(lambda _, layer: (None, layer.dequantize()), None, prepacked)
    np.testing.assert_array_equal(sliced, q.dequantize())
    x = normal(5, 64)
    got = jax.lax.scan(lambda x, w: (ifjax.einsum("mk,kn,ln->ml", x, w, jnp.eye(64, 32)), None), x, prepacked)[0]
    want = jax.lax.scan(lambda x, w: (x @ w @ jnp.eye(64, 32).T, None), x, q.dequantize())[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", TARGETS)
def test_a_large_matrix_stays_at_four_and_a_half_bits(target):
    shape = jax.ShapeDtypeStruct((2048, 2048), jnp.float32)
    prepacked = jax.eval_shape(lambda w: ifjax.prepack(ifjax.quantize(w), target), shape)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(prepacked)) == 2048 * 2048 * 4.5 / 8 + 4


# --- through a kernel -------------------------------------------------------------------------------------------------


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU kernel's products, interpreted; the list of the shapes it was called with."""
    calls, matmul = [], tpu_matmul.matmul

    def record(x, *args, **settings):
        calls.append(x.shape)
        return matmul(x, *args, **settings, interpret=True)

    monkeypatch.setattr(tpu_matmul, "matmul", record)
    jax.clear_caches()  # programs of other cases call other records
    return calls


PRODUCTS = {
    "rows times [K, N]": ("mk,kn->mn", (5, 70), (70, 40), 0),
    "rows times [N, K]": ("mk,nk->mn", (5, 70), (40, 70), 1),
    "one row": ("k,nk->n", (70,), (40, 70), 1),
    "many axes": ("akb,nkd->abnd", (2, 70, 3), (4, 70, 5), 1),
    "packed on the left": ("nk,mk->nm", (40, 70), (5, 70), 1),
}


@pytest.mark.by_default("many axes")
@pytest.mark.parametrize(("spec", "left", "right", "axis"), PRODUCTS.values(), ids=PRODUCTS)
def test_products_reach_the_kernel_and_return(interpreted, spec, left, right, axis):
    a, b = normal(*left), normal(*right, seed=1)
    if spec.startswith("nk"):
        a = ifjax.quantize(a, axis=axis)
    else:
        b = ifjax.quantize(b, axis=axis)
    got = ifjax.einsum(spec, a, b, impl="tpu")
    values = [q.dequantize() if isinstance(q, ifjax.QTensor) else q for q in (a, b)]
    np.testing.assert_allclose(got, jnp.einsum(spec, *values), rtol=1e-5, atol=1e-4)
    assert len(interpreted) == 1


@pytest.mark.slow
def test_vmap_folds_rows_and_loops_over_weights(interpreted):
    xs, q = normal(3, 2, 70), ifjax.quantize(normal(3, 40, 70, seed=1), amax_axes=(0,))
    product = functools.partial(ifjax.einsum, "mk,nk->mn", impl="tpu")
    got = jax.vmap(product, (0, None))(xs, q[0])
    np.testing.assert_allclose(got, xs @ q[0].dequantize().T, rtol=1e-5, atol=1e-4)
    assert interpreted[-1] == (6, 80)
    got = jax.vmap(product)(xs, q)
    np.testing.assert_allclose(got, jnp.einsum("lmk,lnk->lmn", xs, q.dequantize()), rtol=1e-5, atol=1e-4)
    assert interpreted[-1] == (2, 80)


@pytest.mark.parametrize(("target", "call"), [("H200", "mosaic_gpu"), ("TPU v6e", "tpu_custom_call")])
def test_vmap_over_weights_keeps_the_kernel(target, call):
    xs, q = (jax.ShapeDtypeStruct((3, *shape), jnp.bfloat16) for shape in ((2, 256), (128, 256)))
    q = jax.eval_shape(functools.partial(ifjax.quantize, amax_axes=(0,)), q)
    product = jax.vmap(functools.partial(ifjax.einsum, "mk,nk->mn", target=target))
    assert call in lowered(product, xs, q, platform={"H200": "cuda"}.get(target, "tpu"))


@pytest.mark.slow
def test_both_operands_packed(interpreted):
    a, b = ifjax.quantize(normal(5, 70)), ifjax.quantize(normal(40, 70, seed=1))
    got = ifjax.einsum("mk,nk->mn", a, b, impl="tpu")
    np.testing.assert_allclose(got, a.dequantize() @ b.dequantize().T, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_the_gradient_of_a_kernels_product(interpreted):
    x, q = normal(5, 70), ifjax.prepack(ifjax.quantize(normal(40, 70, seed=1)), "TPU v6e")
    got = jax.grad(lambda x: jnp.sin(ifjax.einsum("mk,nk->mn", x, q, impl="tpu")).sum())(x)
    want = jax.grad(lambda x: jnp.sin(x @ q.dequantize().T).sum())(x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", [-1, -2])
def test_square_blocks_are_those_of_either_axis(axis):
    q = ifjax.quantize(normal(40, 24), "nvfp4", axis=axis, block_2d=True)
    other = blocked_along(q, -3 - axis)
    assert other.axis == -3 - axis
    np.testing.assert_array_equal(other.dequantize(), q.dequantize())
    again = ifjax.quantize(normal(40, 24), "nvfp4", axis=-3 - axis, block_2d=True)
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("rows", "path"), [(8, "hopper"), (256, "xla")])
def test_many_packed_rows_are_not_for_a_kernel_that_decodes_the_weights_only(rows, path):
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((rows, 64), (64, 32)))
    x, w = jax.eval_shape(ifjax.quantize, x), jax.eval_shape(lambda w: ifjax.quantize(w, axis=-2), w)
    explanation = ifjax.explain_matmul(x, w, target="H200")
    assert explanation.path == path
    assert ("both are decoded" in explanation.reason) == (path == "xla")
