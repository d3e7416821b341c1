"""Quantized training: every product multiplies what its record says, and its gradients are those of the published code.

Recipes are tested by existing: `each_recipe` is all of them.
"""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from numpy.testing import assert_allclose, assert_array_equal

import ifjax
from ifjax.arrays import ms_eden
from ifjax.codec import LOSSES, ROUNDINGS
from ifjax.codec.rounding import seeds
from ifjax.products import BACKENDS
from ifjax.training import RECIPES, Operand, Product, Recipe, get_recipe, quantized_dot_general, quantized_ragged_dot

KEY = jax.random.key(0)
MATRICES = (((1,), (0,)), ((), ()))
each_recipe = pytest.mark.parametrize("name", RECIPES)


def normal(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


X, W, G = normal(48, 64, seed=1), normal(64, 32, seed=2), normal(48, 32, seed=3)

# Noise, both kinds of signs, a reused operand. Compiling a named recipe as a whole takes about ten seconds, so
# those that are go under `-m slow`; one by one, `quantize` is compiled once for all recipes.
SMALL = Recipe(
    "small",
    fprop=Product(rhs=Operand("nvfp4")),
    dgrad=Product(Operand("nvint4", "stochastic_unbiased"), Operand(reuse=True), hadamard=16, signs="fresh"),
    wgrad=Product(rhs=Operand("nvint4", "stochastic_unbiased"), hadamard=16),
)
slowly = pytest.mark.slow
small_or_slow = pytest.mark.parametrize(
    "recipe", [SMALL, pytest.param("quartet2", marks=slowly)],
    ids=lambda recipe: getattr(recipe, "name", recipe),
)  # fmt: skip


def products(x, w, g, key, recipe, dims=MATRICES):
    """y, dx and dw."""
    y, pull = jax.vjp(lambda x, w: quantized_dot_general(x, w, dims, recipe, key), x, w)
    return y, *pull(g)


def nearest(recipe):
    """The recipe without noise."""

    def quiet(product):
        lhs, rhs = (dataclasses.replace(o, rounding="nearest") for o in product.operands)
        return dataclasses.replace(product, lhs=lhs, rhs=rhs)

    return dataclasses.replace(recipe, dgrad=quiet(recipe.dgrad), wgrad=quiet(recipe.wgrad))


def packed(recipe):
    return dataclasses.replace(recipe, residuals="packed")


# --- as published, and as the records say ----------------------------------------------------------------------------


def explicit(recipe, x, w, g, key):
    """Of y, dx and dw the two operands that are multiplied, made one by one; float64."""

    def operand(a, product, i, side, axis, forward=None):
        o, size = product.operands[side], product.hadamard
        a = forward if o.reuse else a
        own, of_signs = seeds(key, 2 * i + side), jax.random.split(key, (3, 3))[i, 2]
        if size:
            lengths = [(0, -a.shape[at] % size if at == axis else 0) for at in (-2, -1)]
            signs = ifjax.random_signs(of_signs, size) if product.signs == "fresh" else product.signs
            settings = {"axis": axis, "size": size, "signs": signs}
            a = jnp.pad(a, lengths)
            if o.rounding == "ms_eden":
                return ms_eden(a, o.fmt, key=own, **settings)
            a = ifjax.hadamard(a, **settings)
        if o.fmt is None:
            return a
        settings = {"axis": axis, "rounding": o.rounding, "block_2d": o.block_2d, "amax": o.amax}
        return ifjax.quantize(a, o.fmt, key=own if o.is_random else None, **settings).dequantize()

    f, d, v = recipe.fprop, recipe.dgrad, recipe.wgrad
    y = qx, qw = operand(x, f, 0, 0, -1), operand(w, f, 0, 1, -2)
    dx = operand(g, d, 1, 0, -1), operand(w, d, 1, 1, -1, forward=qw).T
    dw = operand(x, v, 2, 0, -2, forward=qx).T, operand(g, v, 2, 1, -2)
    return [tuple(np.asarray(a, np.float64) for a in pair) for pair in (y, dx, dw)]


# Products of floats of 24 bits, added up in float32 in some order: each of n terms errs by n roundings at most.
def assert_is_product(got, a, b):
    assert np.all(np.abs(np.asarray(got, np.float64) - a @ b) <= (a.shape[1] + 4) * 2.0**-24 * (np.abs(a) @ np.abs(b)))


@pytest.mark.by_default("w4a4_qat")
@pytest.mark.parametrize("name", [
    name if name in ("nvfp4", "w4a4_qat") else pytest.param(name, marks=pytest.mark.slow)
    for name in ("nvfp4", "w4a4_qat", "if4", "quartet2", "quad", "weight_only_qat", "fouroversix_mseden")
])  # fmt: skip
def test_each_product_multiplies_what_the_record_says(name):
    got = products(X, W, G, KEY, recipe=name)
    for result, (a, b) in zip(got, explicit(RECIPES[name], X, W, G, KEY), strict=True):
        assert_is_product(result, a, b)
    # The squared error of NVFP4 is .9% of the square, 2.4% if it is stochastic, and those of two operands add up.
    for result, want in zip(got, (X @ W, G @ W.T, X.T @ G), strict=True):
        cosine = np.vdot(result, want) / np.linalg.norm(result) / np.linalg.norm(want)
        assert cosine > (0.999999 if name == "bf16" else 0.975)


CONFIGURATIONS = {
    "nvfp4_mse": "fouroversix", "if4_mse": "if4", "nvfp4_static6_wgradnvint4": "nvfp4_wgrad_nvint4",
}  # fmt: skip


@pytest.mark.parametrize(
    "configuration", [c if c == "if4_mse" else pytest.param(c, marks=pytest.mark.slow) for c in CONFIGURATIONS]
)
def test_the_published_layer_is_met(golden_dir, configuration):
    """Forward and backward of the reference's linear layer, bfloat16, gradients rounded to nearest."""
    with np.load(golden_dir / "linear_fwd_bwd.npz") as file:
        x, w, g = (jnp.asarray(file[f"{k}_bf16bits"].view(ml_dtypes.bfloat16)) for k in ("x", "w", "grad_out"))
        wants = [file[f"{configuration}__{k}_bf16bits"].view(ml_dtypes.bfloat16) for k in ("y", "dx", "dw")]
    recipe = nearest(RECIPES[CONFIGURATIONS[configuration]])
    gots = products(x, w, g, None, recipe=recipe, dims=(((2,), (1,)), ((), ())))  # w is [out, in]
    pairs = explicit(recipe, x[0].astype(jnp.float32), w.T.astype(jnp.float32), g[0].astype(jnp.float32), KEY)
    for name, got, want, (a, b) in zip(("y", "dx", "dw"), gots, wants, pairs, strict=True):
        assert got.dtype == jnp.bfloat16 and got.shape == want.shape
        got, want = np.asarray(got, np.float64), want.astype(np.float64)
        magnitudes = np.abs(a) @ np.abs(b)
        magnitudes = (magnitudes if name != "dw" else magnitudes.T).reshape(want.shape)
        off = 2 * a.shape[1] * 2.0**-24  # sums in float32, each in an order of its own
        if "if4" in configuration:
            off += 2 * 5.8e-4  # the reference decodes IF4's integers by way of float16, so much off at most
            assert np.linalg.norm(got - want) < 1.2e-3 * np.linalg.norm(want)
        else:
            assert np.mean(got != want) < 1e-3
        # All this may move the rounding to bfloat16 by one unit.
        assert np.all(np.abs(got - want) <= off * magnitudes + 2.0**-7 * np.abs(want))


# --- unbiased --------------------------------------------------------------------------------------------------------

SINGLE = ["nvfp4_wgrad_nvint4", *(pytest.param(name, marks=slowly) for name in ("nvfp4", "nvint4", "uniform_rht"))]


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE)
def test_gradients_are_unbiased(name):
    """Their mean over keys is the backward pass of the rounded weights and activations and the unrounded gradient."""
    count, recipe = 1024, RECIPES[name]
    x, w, g = normal(32, 32, seed=7), normal(32, 16, seed=8), normal(32, 16, seed=9)
    draw = jax.jit(jax.vmap(lambda key: products(x, w, g, key, recipe=recipe)[1:]))
    exact = explicit(nearest(recipe), x, w, g, KEY)[1:]
    # Where the gradient is left alone it is rotated still, as the other operand is.
    alone = lambda product, side: dataclasses.replace(product, **{side: Operand()})  # noqa: E731
    plain = dataclasses.replace(recipe, dgrad=alone(recipe.dgrad, "lhs"), wgrad=alone(recipe.wgrad, "rhs"))
    wants = [a @ b for a, b in explicit(plain, x, w, g, KEY)[1:]]
    for got, want, rounded in zip(draw(jax.random.split(KEY, count)), wants, exact, strict=True):
        got = np.asarray(got, np.float64)
        noise = got.std(0, ddof=1) / np.sqrt(count)
        along = (got * want).sum((1, 2)) / (want**2).sum()  # one number a key, so independent ones
        assert abs(along.mean() - 1) < 4 * along.std(ddof=1) / np.sqrt(count)
        z = (got.mean(0) - want) / noise
        assert np.abs(z).max() < 5 and 0.8 < np.mean(z**2) < 1.25  # the rate: the error of a mean falls with its count
        assert np.mean((rounded[0] @ rounded[1] - want) ** 2) > 20 * np.mean(noise**2)  # which nearest would not meet


@pytest.mark.slow
def test_noise_of_the_two_backward_products_is_independent():
    # Every block along either axis has a 1, so that its scale puts .83 halfway between two values, 4 and 6.
    eye, g = jnp.eye(32), jnp.full((32, 32), 5 / 6).at[::16].set(1.0).at[:, ::16].set(1.0)
    gradient = Operand("nvfp4", "stochastic")
    recipe = Recipe("mine", dgrad=Product(lhs=gradient), wgrad=Product(rhs=gradient))
    _, dx, dw = products(eye, eye, g, KEY, recipe=recipe)
    assert 0.4 < np.mean((dx == dw)[g < 1]) < 0.6


# --- a drop-in -------------------------------------------------------------------------------------------------------


def test_bf16_is_dot_general_itself():
    def f(product):
        return jax.make_jaxpr(lambda x, w: product(x, w))(X, W)

    plain = functools.partial(lax.dot_general, dimension_numbers=MATRICES)
    assert str(f(functools.partial(quantized_dot_general, dimension_numbers=MATRICES, recipe="bf16"))) == str(f(plain))


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe, dtypes",
    [(SMALL, ("float16", "float16")), (SMALL, ("bfloat16", "float32")), ("quartet2", ("bfloat16", "bfloat16"))],
)
def test_cotangents_have_the_dtypes_of_their_primals(recipe, dtypes):
    x, w, wide = X.astype(dtypes[0]), W.astype(dtypes[1]), jnp.dtype(dtypes[1])
    with jax.numpy_dtype_promotion("standard"):  # else two types are refused, as everywhere in jax
        y, dx, dw = products(x, w, G.astype(wide), KEY, recipe=recipe)
    assert (y.dtype, dx.dtype, dw.dtype) == (wide, x.dtype, w.dtype)
    exact = products(*(a.astype(jnp.float32) for a in (x, w)), G, KEY, recipe="bf16")
    for got, want in zip((y, dx, dw), exact, strict=True):
        assert np.linalg.norm(got.astype(np.float32) - want) < 0.25 * np.linalg.norm(want)


@pytest.mark.slow
def test_the_preferred_element_type_is_that_of_the_result_and_its_cotangent():
    x, w = X.astype(jnp.bfloat16), W.astype(jnp.bfloat16)
    f = functools.partial(
        quantized_dot_general, dimension_numbers=MATRICES, recipe=SMALL, key=KEY, preferred_element_type=jnp.float32
    )
    y, pull = jax.vjp(f, x, w)
    dx, dw = pull(G)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)


LAYOUTS = {
    "dense": ((4, 12, 64), (64, 32), (((2,), (0,)), ((), ()))),
    "transposed weights": ((48, 64), (32, 64), (((1,), (1,)), ((), ()))),
    "heads in": ((4, 12, 4, 16), (4, 16, 32), (((2, 3), (0, 1)), ((), ()))),
    "heads out": ((48, 64), (64, 2, 16), MATRICES),
    "axes in another order": ((16, 48, 4), (32, 4, 16), (((0, 2), (2, 1)), ((), ()))),
    "negative axes": ((48, 64), (64, 32), (((-1,), (-2,)), ((), ()))),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_axes_are_those_of_matrices(layout):
    x_shape, w_shape, dims = LAYOUTS[layout]
    x, w = normal(*x_shape, seed=10), normal(*w_shape, seed=11)
    (cx, cw), _ = dims
    cx, cw = [i % x.ndim for i in cx], [i % w.ndim for i in cw]
    fx, fw = ([i for i in range(a.ndim) if i not in c] for a, c in ((x, cx), (w, cw)))
    positive = (cx, cw), ((), ())
    shape = lax.dot_general(x, w, positive).shape
    g = G.reshape(shape)
    y, dx, dw = products(x, w, g, KEY, recipe="if4", dims=dims)
    rows, columns = jnp.transpose(x, fx + cx).reshape(48, 64), jnp.transpose(w, cw + fw).reshape(64, 32)
    wants = products(rows, columns, G, KEY, recipe="if4")
    gots = y, jnp.transpose(dx, fx + cx), jnp.transpose(dw, cw + fw)
    assert (y.shape, dx.shape, dw.shape) == (shape, x.shape, w.shape)
    for got, want in zip(gots, wants, strict=True):
        assert_array_equal(got.reshape(want.shape), want)


@pytest.mark.slow
def test_batch_axes_share_one_amax_and_have_noise_of_their_own():
    x, w, g = (jnp.stack([a, a]) for a in (X, W, G))
    dims = ((2,), (1,)), ((0,), (0,))
    y, dx, dw = products(x, w, g, KEY, recipe=SMALL, dims=dims)
    single = products(X, W, G, KEY, recipe=SMALL)
    assert_allclose(y, jnp.stack([single[0]] * 2), rtol=1e-5, atol=1e-5)  # no noise forward; sums in another order
    assert not np.allclose(dx[0], dx[1]) and not np.allclose(dw[0], dw[1])
    # Batch axes in the middle come out in front, as they do of lax.dot_general.
    moved = quantized_dot_general(x.swapaxes(0, 1), w.swapaxes(0, 1), (((2,), (0,)), ((1,), (1,))), SMALL)
    assert_array_equal(moved, quantized_dot_general(x, w, dims, SMALL))


ODD = [
    ("nvfp4", (7, 33, 5)), ("quartet2", (130, 17, 31)),
    pytest.param("if4", (1, 16, 1), marks=slowly),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), ODD)
def test_odd_lengths_are_filled_up_with_zeros(name, shape):
    m, k, n = shape
    x, w, g = normal(m, k, seed=12), normal(k, n, seed=13), normal(m, n, seed=14)
    got = products(x, w, g, KEY, recipe=name)
    for result, (a, b) in zip(got, explicit(RECIPES[name], x, w, g, KEY), strict=True):
        assert_is_product(result, a, b)


@pytest.mark.parametrize("shape", [(0, 16, 4), (3, 0, 4), (3, 16, 0)])
def test_empty_operands_are_those_of_dot_general(shape):
    m, k, n = shape
    x, w = jnp.ones((m, k)), jnp.ones((k, n))
    y, dx, dw = products(x, w, jnp.ones((m, n)), KEY, recipe="if4")
    assert (y.shape, dx.shape, dw.shape) == ((m, n), (m, k), (k, n))
    assert not y.any() and not dx.any() and not dw.any()


def test_axes_that_do_not_match_are_refused_as_by_dot_general():
    with pytest.raises(TypeError, match="dot_general requires"):
        quantized_dot_general(X, W, (((1,), (1,)), ((), ())), "if4", KEY)


# --- transformations -------------------------------------------------------------------------------------------------

# Compiled into another program, float32 sums may be taken in another order; noise of another draw would be 1e5 larger.
SAME = {"rtol": 1e-5, "atol": 1e-5}


def layer(x, w, key, recipe):
    return jnp.tanh(quantized_dot_general(x, w, MATRICES, recipe, key))


@pytest.mark.slow
@small_or_slow
def test_jit_scan_remat_and_vmap_change_nothing(recipe):
    x, ws, keys = normal(16, 32, seed=15), normal(3, 32, 32, seed=16) / 5, jax.random.split(KEY, 3)

    def loop(ws, x):
        for w, key in zip(ws, keys, strict=True):
            x = layer(x, w, key, recipe)
        return (x**2).sum()

    def scanned(ws, x, wrap=lambda f: f):
        step = wrap(lambda x, of_layer: (layer(x, *of_layer, recipe), None))
        return (lax.scan(step, x, (ws, keys))[0] ** 2).sum()

    want = jax.value_and_grad(loop)(ws, x)
    rematted = functools.partial(scanned, wrap=jax.checkpoint)
    for f in (rematted,) if recipe is SMALL else (scanned, rematted):
        jax.tree.map(functools.partial(assert_allclose, **SAME), jax.jit(jax.value_and_grad(f))(ws, x), want)

    xs = jnp.stack([x, 2 * x])
    each = jax.vmap(lambda x, key: products(x, ws[0], x, key, recipe=recipe))(xs, keys[:2])
    for i in range(2):
        alone = products(xs[i], ws[0], xs[i], keys[i], recipe=recipe)
        jax.tree.map(lambda a, b, i=i: assert_allclose(a[i], b, **SAME), each, alone)


@pytest.mark.parametrize("name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("if4", "quartet2")), "w4a4_qat"])
def test_the_key_decides(name):
    first, again = products(X, W, G, KEY, recipe=name), products(X, W, G, KEY, recipe=name)
    other = products(X, W, G, jax.random.key(1), recipe=name)
    jax.tree.map(assert_array_equal, first, again)
    assert_array_equal(first[0], other[0])
    assert (not np.array_equal(first[1], other[1])) == RECIPES[name].needs_key
    assert (not np.array_equal(first[2], other[2])) == RECIPES[name].needs_key


@pytest.mark.slow
@small_or_slow
def test_a_mesh_of_eight_devices_changes_nothing(recipe):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x, w, g = normal(8, 16, 64, seed=17), normal(64, 32, seed=18), normal(8, 16, 32, seed=19)
    dims = ((2,), (0,)), ((), ())
    want = products(x, w, g, KEY, recipe=recipe, dims=dims)
    specs = ("data",), (None, "model"), ("data", None, "model")
    placed = [jax.device_put(a, NamedSharding(mesh, PartitionSpec(*s))) for a, s in zip((x, w, g), specs, strict=True)]
    got = jax.jit(functools.partial(products, recipe=recipe, dims=dims))(*placed, KEY)
    jax.tree.map(functools.partial(assert_allclose, **SAME), got, want)


@pytest.mark.slow
def test_shard_map_takes_its_gradients():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, w = normal(128, 32, seed=20), normal(32, 16, seed=21)
    spec = PartitionSpec("data")

    def gradient(x, w, total=lambda y: y):
        return jax.grad(lambda w: total(quantized_dot_general(x, w, MATRICES, SMALL, KEY).sum()))(w)

    over_mesh = functools.partial(gradient, total=lambda y: lax.psum(y, "data"))
    over_mesh = jax.shard_map(over_mesh, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=PartitionSpec())
    parts = [gradient(part, w) for part in jnp.split(x, 8)]
    assert_allclose(jax.jit(over_mesh)(x, w), sum(parts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["if4", "w4a4_qat"])
def test_the_second_derivative_is_refused(name):
    def gradient(w):
        return (jax.grad(lambda w: quantized_dot_general(X, w, MATRICES, name, KEY).sum())(w) ** 2).sum()

    with pytest.raises(ValueError, match="differentiable once"):
        jax.grad(gradient)(W)


# --- keys and residuals ----------------------------------------------------------------------------------------------


def test_a_recipe_with_noise_asks_for_a_key_when_it_is_differentiated():
    quantized_dot_general(X, W, MATRICES, "if4")  # nothing random in its forward pass
    with pytest.raises(ValueError, match=r"recipe 'if4' draws noise: pass key=.*fold_in"):
        jax.grad(lambda x: quantized_dot_general(x, W, MATRICES, "if4").sum())(X)
    noisy = Recipe("noisy", Product(Operand("if4", "stochastic")))
    with pytest.raises(ValueError, match="'noisy' draws noise"):
        quantized_dot_general(X, W, MATRICES, noisy)
    assert not RECIPES["w4a4_qat"].needs_key and RECIPES["quartet2"].needs_key
    jax.grad(lambda x: quantized_dot_general(x, W, MATRICES, "w4a4_qat").sum())(X)


def kept_bytes(recipe):
    """What the backward pass of a product finds, x and w themselves left out."""
    x, w = normal(512, 256, seed=22), normal(256, 256, seed=23)
    _, pull = jax.vjp(lambda x, w: quantized_dot_general(x, w, MATRICES, recipe, KEY), x, w)
    return sum(a.nbytes for a in jax.tree.leaves(pull) if a.dtype != KEY.dtype)


PACKED = ["if4", *(pytest.param(name, marks=slowly) for name in ("uniform_rht", "nvfp4_wgrad_nvint4"))]


@pytest.mark.parametrize("name", PACKED)
def test_packed_residuals_change_no_gradient(name):
    want, got = (products(X, W, G, KEY, recipe=recipe) for recipe in (RECIPES[name], packed(RECIPES[name])))
    jax.tree.map(functools.partial(assert_allclose, **SAME), got, want)


@pytest.mark.slow
def test_packed_residuals_take_four_and_a_half_bits_a_value():
    x, w, small = 512 * 256, 256 * 256, 64  # `small`: amax values
    assert kept_bytes(RECIPES["bf16"]) == 4 * (x + w)
    assert 4 * x + 4.5 / 8 * w <= kept_bytes(RECIPES["if4"]) <= 4 * x + 4.5 / 8 * w + small
    assert 4.5 / 8 * (x + w) <= kept_bytes(packed(RECIPES["if4"])) <= 4.5 / 8 * (x + w) + small
    assert kept_bytes(RECIPES["quartet2"]) <= 4.5 / 8 * (x + w) + small
    assert kept_bytes(RECIPES["weight_only_qat"]) <= 4 * x + 4.5 / 8 * w + small


@pytest.mark.slow
@pytest.mark.parametrize("product", ["dense", "experts"])
def test_policies_keep_results_by_their_name(product, capsys):
    x, w = jnp.ones((16, 32)), jnp.ones((3, 32, 32))

    def layers(w, x):
        for layer in w:
            if product == "dense":
                x = quantized_dot_general(x, layer, (((1,), (0,)), ((), ())), "w4a4_qat")
            else:
                x = quantized_ragged_dot(x, layer[None], jnp.array([16]), "w4a4_qat")
            x = jnp.tanh(x)
        return x.sum()

    names = jax.checkpoint_policies.save_only_these_names("quantized_product")
    for policy, kept in ((None, 0), (jax.checkpoint_policies.dots_saveable, 0), (names, 3)):
        jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(layers, policy=policy), w, x)
        lines = [line for line in capsys.readouterr().out.splitlines() if "argument" not in line]
        assert len([line for line in lines if line.startswith("f32[16,32]")]) == kept
    for one, other in zip(
        *(jax.grad(f, (0, 1))(w, x) for f in (layers, jax.checkpoint(layers, policy=names))), strict=True
    ):
        np.testing.assert_array_equal(one, other)


# --- records ---------------------------------------------------------------------------------------------------------


@each_recipe
def test_named_recipes_are_hashable_state_their_source_and_are_found(name):
    recipe = RECIPES[name]
    assert get_recipe(name) is recipe and get_recipe(recipe) is recipe
    assert recipe.name == name and recipe.source
    assert hash(recipe) == hash(dataclasses.replace(recipe))


@pytest.mark.slow
def test_named_formats_are_equal_by_name_and_by_record():
    assert Operand(ifjax.FORMATS["if4"]) == Operand("if4")
    assert Operand("if4", ROUNDINGS["stochastic"], loss=LOSSES["mae"]) == Operand("if4", "stochastic", loss="mae")
    mine = dataclasses.replace(ifjax.FORMATS["if4"], name="mine", block=32)
    y = quantized_dot_general(X, W, MATRICES, Recipe("mine", Product(Operand(mine), Operand(mine))))
    assert_is_product(y, *explicit(Recipe("mine", Product(Operand(mine), Operand(mine))), X, W, G, KEY)[0])


@pytest.mark.by_default("200-quartet2")
@pytest.mark.parametrize("name", ["nvfp4", "fouroversix", "nvidia_nvfp4", "quartet2", "nvfp4_mseden"])
@pytest.mark.parametrize("tokens", [256, 200])
def test_a_blackwell_multiplies_all_three_products_natively(monkeypatch, tokens, name):
    """In programs lowered for it with the device known, the kernel is handed both operands of each product.

    200 tokens are padded to whole runs of the rotation by 128.
    """
    modules = [importlib.import_module(f"ifjax.{name}") for name in ("products.dot_general", "training.product")]
    found = []
    jax.clear_caches()  # of products that were lowered before

    def matmul(a, b, dtype):
        found.append((a.axis, b.axis))
        return jnp.zeros([q.shape[-3 - q.axis] for q in (a, b)], dtype)

    for module in modules:
        monkeypatch.setattr(module, "device_kind", lambda target=None: target or "NVIDIA B200")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(BACKENDS["scaled_matmul"].load, "matmul", staticmethod(matmul))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((tokens, 128), (128, 384), (tokens, 384))]
    run = jax.jit(lambda x, w, g: products(x, w, g, KEY, recipe=name))
    run.trace(*arrays).lower(lowering_platforms=("cuda",))
    assert set(found) == {(-1, -2), (-1, -1), (-2, -2)}


def test_a_fixed_amax_is_the_one_that_is_used():
    q = Operand("nvfp4", amax=1.0)
    x, w = (a / jnp.abs(a).max() / 2 for a in (X, W))
    recipe = Recipe("normalized", Product(q, q))
    assert_is_product(products(x, w, G, None, recipe=recipe)[0], *explicit(recipe, x, w, G, KEY)[0])


if4, again = Operand("if4"), Operand(reuse=True)
eden = Operand("nvfp4", "ms_eden")
WRONG = {
    "rounding": (lambda: Operand("if4", "up"), "Operand: unknown rounding 'up'; did you mean .*nearest"),
    "format": (lambda: Operand("if5"), "unknown format 'if5'; did you mean"),
    "rounding of nothing": (lambda: Operand(rounding="stochastic"), "no effect with fmt=None.*or name a fmt"),
    "squares of nothing": (lambda: Operand(block_2d=True), "block_2d=True has no effect"),
    "loss": (lambda: Operand("if4", loss="rmse"), "loss must be one of"),
    "amax": (lambda: Operand("if4", amax=-1.0), "amax must be a finite number > 0"),
    "amax of mx": (lambda: Operand("mxfp4", amax=1.0), "mxfp4 has no tensor scale"),
    "a flag": (lambda: Operand("if4", block_2d=1), "block_2d must be True or False, got 1"),
    "squares of eden": (lambda: Operand("nvfp4", "ms_eden", block_2d=True), "1-D blocks"),
    "eden unrotated": (lambda: Product(eden, if4), "rotated operands only: write hadamard=16"),
    "eden of mx": (lambda: Product(Operand("mxfp4", "ms_eden"), hadamard=32), "corrects E4M3 scales"),
    "eden of two scales": (lambda: Product(Operand("fouroversix", "ms_eden"), hadamard=16), "use nvfp4"),
    "size": (lambda: Product(if4, if4, hadamard=12), r"hadamard must be None or one of \(16, 32"),
    "signs": (lambda: Product(if4, if4, hadamard=16, signs="random"), "signs must be 'fixed', 'fresh' or None"),
    "signs of nothing": (lambda: Product(if4, if4, signs="fresh"), "no effect without hadamard"),
    "rotated floats": (lambda: Product(hadamard=16), "no effect on operands in high precision"),
    "a name for an operand": (lambda: Product("if4"), r"lhs must be an Operand, as in Operand\('if4'\)"),
    "a pair for a product": (lambda: Recipe("r", (if4, if4)), "fprop must be a Product"),
    "reuse forward": (lambda: Recipe("r", Product(again)), "fprop.lhs has nothing to reuse"),
    "reuse of the gradient": (lambda: Recipe("r", Product(if4, if4), Product(again)), "dgrad.lhs has nothing to reuse"),
    "reuse of floats": (lambda: Recipe("r", dgrad=Product(rhs=again)), "cannot reuse what fprop multiplies"),
    "reuse of the rotated": (
        lambda: Recipe("r", Product(if4, if4, hadamard=16), Product(rhs=again)), "or is rotated",
    ),
    "residuals": (lambda: Recipe("r", residuals="int8"), "residuals must be 'float' or 'packed'"),
    "packed nothing": (
        lambda: Recipe("r", Product(if4, if4), residuals="packed"), "packs nothing.*write residuals='float'",
    ),
    "unknown recipe": (lambda: get_recipe("nvfp5"), "unknown recipe 'nvfp5'; did you mean .*nvfp4"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused(case):
    make, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_a_recipe_is_a_name_or_a_record():
    with pytest.raises(TypeError, match=r"recipe must be a name or an ifjax\.recipes\.Recipe, got Format"):
        get_recipe(ifjax.FORMATS["if4"])


def carried(amax, recipe="ue5m3"):
    """y, dx, dw and what comes back for amax."""
    f = functools.partial(quantized_dot_general, dimension_numbers=MATRICES, recipe=recipe, key=KEY)
    y, pull = jax.vjp(lambda x, w, amax: f(x, w, amax=amax), X, W, amax)
    return y, *pull(G)


@pytest.mark.slow
def test_carried_maxima_stand_for_those_at_hand_and_those_come_back():
    maxima = jnp.stack([jnp.max(jnp.abs(a)) for a in (X, W, G)])
    want = products(X, W, G, KEY, "ue5m3")
    for amax in (maxima, jnp.zeros(3)):
        *got, back = carried(amax)
        for a, b in zip(got, want, strict=True):
            assert_array_equal(a, b)
        assert_array_equal(back, maxima)
    # Half of them saturate what is larger: each product goes by its operands' own.
    y, dx, dw, back = carried(maxima / 2)
    assert_array_equal(back, maxima)
    qx, qw = (ifjax.fake_quantize(a, "nvfp4_ue5m3", axis=axis, amax=jnp.max(jnp.abs(a)) / 2) for a, axis in
              ((X, -1), (W, -2)))  # fmt: skip
    assert_allclose(y, qx @ qw, rtol=1e-5, atol=1e-5)
    assert all((a != b).any() for a, b in zip((y, dx, dw), want, strict=True))


def test_carried_maxima_are_three():
    with pytest.raises(ValueError, match=r"amax must be of shape \(3,\)"):
        quantized_dot_general(X, W, MATRICES, "ue5m3", KEY, amax=jnp.ones(2))


@slowly
def test_carried_maxima_are_left_out_where_they_say_nothing():
    """Rotated products have other maxima, and this format has none."""
    assert_array_equal(carried(jnp.full(3, 0.1), "hifloat4")[0], products(X, W, G, KEY, "hifloat4")[0])
