"""NNX models apply on packed parameters unchanged, nothing trains or overwrites them, and every kernel is found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

nnx = pytest.importorskip("flax.nnx")
optax = pytest.importorskip("optax")

import ifjax  # noqa: E402
from ifjax.flax.nnx import Kernel, PackedParam, kernels_of  # noqa: E402
from ifjax.qtensor import QTensor  # noqa: E402

X = jax.random.normal(jax.random.key(1), (2, 5, 32))


def made(make):
    """The model that `make` makes, with parameters from numpy: compiling initializers would take most of the time."""
    graph, state = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(0)
    return nnx.merge(graph, jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), state))


def linear(**settings):
    return made(lambda: nnx.Linear(32, 16, rngs=nnx.Rngs(0), **settings))


def find(model, path):
    for step in path.split("/") if path else ():
        model = getattr(model, step) if hasattr(model, step) else model[int(step)]
    return model


def pack(model, lead=()):
    """(the model with every kernel packed, the model with the decoded kernels as plain parameters)"""
    plain = nnx.clone(model)
    for kernel in kernels_of(model):
        if kernel.reason is None and kernel.axes:
            name = kernel.parameter.rsplit("/", 1)[-1]
            param = find(model, kernel.parameter)
            q = ifjax.quantize(param[...], "nvfp4", axis=kernel.axes[-1], amax_axes=lead)
            setattr(find(model, kernel.path), name, PackedParam.like(param, q))
            setattr(find(plain, kernel.path), name, nnx.Param(q.dequantize()))
    return model, plain


class Block(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(32, 32, rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.raw = nnx.Param(jax.random.normal(rngs.params(), (32, 32)))
        self.many = nnx.List([nnx.Param(jnp.ones(32)), nnx.Linear(32, 32, use_bias=False, rngs=rngs)])
        self.count = nnx.Variable(jnp.zeros(()))

    def __call__(self, x):
        return self.many[1](self.norm(self.dense(x)) @ self.raw) + x


class Stack(nnx.Module):
    """Three blocks, made by vmap; `run` says how they are applied."""

    def __init__(self, run):
        self.blocks = nnx.vmap(Block)(nnx.Rngs(0).split(3))
        self.run = run

    def __call__(self, x):
        return self.run(self.blocks, x)


def scanned(blocks, x):
    return nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(blocks, x)


def scanned_with_remat(blocks, x):
    return nnx.scan(nnx.remat(lambda block, x: block(x)), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(blocks, x)


def scanned_by_type(blocks, x):
    axes = nnx.StateAxes({(nnx.Param, PackedParam): 0, ...: 0})
    return nnx.scan(lambda block, x: block(x), in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)(blocks, x)


def mapped(blocks, x):
    return nnx.vmap(lambda block, x: block(x), in_axes=(0, None))(blocks, x)


# --- models apply unchanged

MODELS = {
    "Linear": (lambda: nnx.Linear(32, 16, rngs=nnx.Rngs(0)), lambda m: m(X)),
    "Linear in bfloat16": (lambda: nnx.Linear(32, 16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), lambda m: m(X)),
    "LinearGeneral": (lambda: nnx.LinearGeneral((5, 32), (3, 4), axis=(-2, -1), rngs=nnx.Rngs(0)), lambda m: m(X)),
    "LinearGeneral, batch": (lambda: nnx.LinearGeneral(32, 4, batch_axis={0: 2}, rngs=nnx.Rngs(0)), lambda m: m(X)),
    "Einsum": (lambda: nnx.Einsum("nta,hab->nthb", (3, 32, 4), (3, 4), rngs=nnx.Rngs(0)), lambda m: m(X)),
    "Conv": (lambda: nnx.Conv(32, 6, 3, mask=np.ones((3, 32, 6), np.float32), rngs=nnx.Rngs(0)), lambda m: m(X)),
    "ConvTranspose": (lambda: nnx.ConvTranspose(32, 6, 3, transpose_kernel=True, rngs=nnx.Rngs(0)), lambda m: m(X)),
    "Embed": (lambda: nnx.Embed(10, 32, rngs=nnx.Rngs(0)), lambda m: m(jnp.arange(3))),
    "Embed.attend": (lambda: nnx.Embed(10, 32, rngs=nnx.Rngs(0)), lambda m: m.attend(X)),
    "attention": (lambda: nnx.MultiHeadAttention(2, 32, decode=False, rngs=nnx.Rngs(0)), lambda m: m(X)),
    "LSTM": (
        lambda: nnx.OptimizedLSTMCell(32, 16, rngs=nnx.Rngs(0)),
        lambda m: m((jnp.zeros((2, 16)), jnp.zeros((2, 16))), X[:, 0])[1],
    ),
    "LoRALinear": (lambda: nnx.LoRALinear(32, 16, lora_rank=2, rngs=nnx.Rngs(0)), lambda m: m(X)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_module_applies_on_packed_parameters(name):
    make, call = MODELS[name]
    packed, plain = pack(made(make))
    assert any(isinstance(v, PackedParam) for _, v in nnx.to_flat_state(nnx.state(packed)))
    np.testing.assert_array_equal(call(packed), call(plain))


@pytest.mark.parametrize("run", [scanned, scanned_with_remat, scanned_by_type, mapped])
def test_stacked_layers_apply_on_packed_parameters(run):
    packed, plain = pack(made(lambda: Stack(run)), lead=(0,))
    assert packed.blocks.dense.kernel.get_raw_value().amax.shape == (3,)
    # Rounding of the fused program differs.
    np.testing.assert_allclose(packed(X), plain(X), rtol=1e-5, atol=1e-5)


def test_transformations_carry_the_packed_bytes():
    packed, plain = pack(linear())
    expected = plain(X)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(packed, X), expected, rtol=1e-5)
    graph, params, bytes_ = nnx.split(packed, nnx.Param, PackedParam)
    assert [path for path, _ in nnx.to_flat_state(params)] == [("bias",)]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(bytes_)} == {"uint8", "float8_e4m3fn", "float32"}
    np.testing.assert_array_equal(nnx.merge(graph, params, bytes_)(X), expected)
    assert isinstance(nnx.state(packed)["kernel"].get_raw_value(), QTensor)
    assert isinstance(nnx.as_pure(nnx.state(packed))["kernel"], QTensor)
    np.testing.assert_array_equal(nnx.to_pure_dict(nnx.state(packed))["kernel"], plain.kernel[...])
    np.testing.assert_array_equal(nnx.clone(packed)(X), expected)


def test_states_update_packed_models():
    packed, plain = pack(linear())
    other, _ = pack(linear())
    other.kernel.set_value(ifjax.quantize(-other.kernel[...], "nvfp4", axis=-2))
    for state in (nnx.state(packed), nnx.as_pure(nnx.state(packed))):
        into = nnx.clone(other)
        nnx.update(into, state)
        np.testing.assert_array_equal(into(X), plain(X))


def test_abstract_models_need_no_arrays():
    abstract = nnx.eval_shape(lambda: pack(linear())[0])
    assert abstract.kernel[...] == jax.ShapeDtypeStruct((32, 16), jnp.float32)
    assert abstract.kernel.shape == (32, 16)
    assert "QTensor(nvfp4, 32x16 float32" in repr(abstract)
    assert kernels_of(abstract)[1].axes == (-2,)


# --- the variable


def test_a_packed_parameter_reads_as_an_array():
    packed, plain = pack(linear())
    p, x = packed.kernel, plain.kernel[...]
    assert (p.shape, p.ndim, p.size, p.dtype, len(p)) == ((32, 16), 2, 512, jnp.float32, 32)
    for read in (
        p.get_value(),
        p[...],
        jnp.asarray(p),
        p + 0.0,
        1.0 * p,
        -p * -1.0,
        p.T.T,
        p.reshape(-1).reshape(32, 16),
    ):
        np.testing.assert_array_equal(read, x)
    np.testing.assert_array_equal(p[3:5], x[3:5])
    np.testing.assert_array_equal(X @ p, X @ x)
    assert p.astype(jnp.bfloat16).dtype == jnp.bfloat16
    assert "QTensor(nvfp4" in repr(p)
    with pytest.raises(AttributeError, match=r"no 'codes'; its QTensor is param\.get_raw_value\(\)"):
        p.codes  # noqa: B018


def test_it_keeps_the_metadata_of_what_it_replaces():
    param = linear(kernel_metadata={"mine": 3}).kernel
    param.set_metadata(out_sharding=("in", "out"))
    packed = PackedParam.like(param, ifjax.quantize(param[...], axis=-2))
    assert packed.get_metadata() == param.get_metadata()
    assert packed.mine == 3
    spec = nnx.get_partition_spec({"w": packed})["w"].get_raw_value()
    assert (spec.codes, spec.scales, spec.amax) == (P("in", "out"), P("in", "out"), P())
    mxfp4 = PackedParam(ifjax.quantize(param[...], "mxfp4", axis=-2), out_sharding=("in", "out"))
    spec = nnx.get_partition_spec({"w": mxfp4})["w"].get_raw_value()
    assert (spec.codes, spec.amax) == (P("in", "out"), None)


def test_it_is_placed_by_its_axis_names():
    mesh = jax.make_mesh((2, 2), ("in", "out"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    param = linear().kernel
    param.set_metadata(out_sharding=("in", "out"))
    state = {"w": PackedParam.like(param, ifjax.quantize(param[...], axis=-2))}
    placed = jax.device_put(state, nnx.get_named_sharding(state, mesh))["w"].get_raw_value()
    assert placed.codes.sharding.spec == placed.scales.sharding.spec == P("in", "out")
    np.testing.assert_array_equal(placed.dequantize(), state["w"][...])
    with jax.set_mesh(mesh):
        abstract = nnx.as_abstract(nnx.eval_shape(lambda: nnx.Dict(state)))["w"].get_raw_value()
    assert abstract.codes.sharding.spec == P("in", "out")
    assert (abstract.codes.dtype, abstract.amax.shape) == (jnp.uint8, ())


def test_only_a_qtensor_of_the_right_shape_can_be_in_it():
    packed, plain = pack(linear())
    q, x = packed.kernel.get_raw_value(), plain.kernel[...]
    for put in (
        lambda: PackedParam(x),
        lambda: PackedParam.like(plain.kernel, x),
        lambda: packed.kernel.set_value(x),
        lambda: packed.kernel.__setitem__(..., x),
        lambda: packed.kernel.set_raw_value(x),
        lambda: packed.kernel.replace(x),
        lambda: nnx.update(packed, nnx.state(plain)),
        lambda: nnx.update(packed, nnx.as_pure(nnx.state(plain))),
        lambda: nnx.replace_by_pure_dict(nnx.state(packed), nnx.to_pure_dict(nnx.state(packed))),
    ):
        with pytest.raises(TypeError, match=r"holds a QTensor, got .*ifjax\.quantize"):
            put()
    with pytest.raises(TypeError, match="as a whole"):
        packed.kernel[0] = q
    with pytest.raises(ValueError, match=r"shape \(32, 16\), the QTensor \(16, 16\)"):
        packed.kernel.set_value(ifjax.quantize(x[:16], axis=-2))
    with pytest.raises(ValueError, match="quantize this parameter"):
        PackedParam.like(plain.bias, q)
    packed.kernel[...] = ifjax.quantize(x, "mxfp4", axis=-2)
    assert packed.kernel.get_raw_value().fmt.name == "mxfp4"


# --- training


def test_training_leaves_packed_parameters_alone():
    model, _ = pack(made(lambda: nnx.LoRALinear(32, 16, lora_rank=2, rngs=nnx.Rngs(0))))
    before = model.kernel[...]

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(lambda m: jnp.square(m(X) - 1.0).mean())(model)
        optimizer.update(model, gradients)
        return loss, gradients

    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    losses, gradients = zip(*[step(model, optimizer) for _ in range(3)], strict=True)
    assert losses[2] < losses[1] < losses[0]
    assert [path for path, _ in nnx.to_flat_state(gradients[0])] == [("bias",), ("lora", "lora_a"), ("lora", "lora_b")]
    np.testing.assert_array_equal(model.kernel[...], before)


def test_a_gradient_of_packed_values_is_an_error():
    model, _ = pack(linear())

    def loss(model):
        return model(X).sum()

    for gradient in (nnx.grad(loss, argnums=nnx.DiffState(0, PackedParam)), nnx.grad(loss, graph_updates=False)):
        with pytest.raises(TypeError, match="got uint8"):
            gradient(model)


# --- the kernels


def kernels(make):
    """By parameter, of the model that `make` makes; arrays are not needed."""
    return {kernel.parameter: kernel for kernel in kernels_of(nnx.eval_shape(make))}


MODULES = [
    (lambda r: nnx.Linear(4, 3, rngs=r), (-2,)),
    (lambda r: nnx.LinearGeneral(4, (3, 2), rngs=r), (-3,)),
    (lambda r: nnx.LinearGeneral((4, 3), 2, axis=(1, -1), rngs=r), (-3, -2)),
    (lambda r: nnx.LinearGeneral((4, 3), (2, 2), axis=(-1, 1), batch_axis={0: 5}, rngs=r), (-4, -3)),
    (lambda r: nnx.Conv(4, 3, (2, 2), rngs=r), (-2,)),
    (lambda r: nnx.ConvTranspose(4, 3, (2, 2), rngs=r), (-2,)),
    (lambda r: nnx.ConvTranspose(4, 3, (2, 2), transpose_kernel=True, rngs=r), (-1,)),
    (lambda r: type("Mine", (nnx.Linear,), {})(4, 3, rngs=r), (-2,)),
    (lambda r: nnx.LoRALinear(4, 3, lora_rank=1, rngs=r), (-2,)),
]


@pytest.mark.parametrize(("make", "axes"), MODULES)
def test_contraction_axes_follow_from_the_modules(make, axes):
    module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    (kernel,) = [kernel for kernel in kernels_of(module) if kernel.parameter == "kernel"]
    assert kernel == Kernel("kernel", "", type(module).__name__, axes)
    assert kernels_of(module)[0] == Kernel("bias", "", type(module).__name__, (), "a bias is added")


def test_embeddings_are_contracted_along_their_features():
    found = kernels(lambda: nnx.Embed(4, 3, rngs=nnx.Rngs(0)))
    assert found == {"embedding": Kernel("embedding", "", "Embed", (-1,))}


@pytest.mark.parametrize(
    ("equation", "shape", "axes"),
    [
        ("nta,hab->nthb", (2, 3, 4), (-2,)),
        ("...a, ba -> ...b", (4, 3), (-1,)),
        ("thd,hdm->tm", (2, 3, 4), (-3, -2)),
        ("ebk,ekn->ebn", (2, 3, 4), (-2,)),
        ("...a,...ab->...b", (2, 3, 4), (-2,)),
        ("...a,a...->...", (2, 3, 4), (-3,)),
        ("...a,ab...->...b", (2, 3, 4), (-3,)),
    ],
)
def test_contraction_axes_follow_from_the_equation(equation, shape, axes):
    assert kernels(lambda: nnx.Einsum(equation, shape, rngs=nnx.Rngs(0)))["kernel"].axes == axes


def test_equations_without_a_contraction_are_refused_by_name():
    for equation, shape, reason in (("ab,bc->abc", (2, 3), "contracts none"), ("ab,bb->a", (3, 3), "a diagonal")):
        (kernel,) = kernels(lambda e=equation, s=shape: nnx.Einsum(e, s, rngs=nnx.Rngs(0))).values()
        assert kernel.axes == () and equation in kernel.reason and reason in kernel.reason
    module = nnx.eval_shape(lambda: nnx.Einsum("ab,bc->ac", (2, 3), rngs=nnx.Rngs(0)))
    module.einsum_str = None
    assert kernels_of(module)[0][3:] == (None, "its einsum_str comes with each call")


def test_every_parameter_of_a_model_is_told():
    def make():
        r = nnx.Rngs(0)
        dense = nnx.Linear(4, 4, rngs=r)
        return nnx.Dict(
            attention=nnx.MultiHeadAttention(2, 4, normalize_qk=True, rngs=r),
            norms=nnx.List([nnx.BatchNorm(4, rngs=r), nnx.PReLU()]),
            lora=nnx.LoRA(4, 1, 4, base_module=dense, rngs=r),
            again=dense,
            spectral=nnx.SpectralNorm(nnx.Linear(4, 4, use_bias=False, rngs=r), rngs=r),
            weight=nnx.WeightNorm(nnx.Linear(4, 4, use_bias=False, rngs=r), rngs=r),
        )

    found, state = kernels(make), nnx.state(nnx.eval_shape(make), nnx.Param)
    assert list(found) == ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    assert found["attention/out/kernel"] == Kernel("attention/out/kernel", "attention/out", "LinearGeneral", (-3, -2))
    assert found["attention/query/kernel"].axes == (-3,)
    assert found["attention/query/bias"].reason == "a bias is added"
    assert found["attention/query_ln/scale"].reason == "LayerNorm has no matmul"
    assert found["norms/0/scale"] == Kernel("norms/0/scale", "norms/0", "BatchNorm", (), "BatchNorm has no matmul")
    assert found["norms/1/negative_slope"].reason == "PReLU has no matmul"
    assert found["again/kernel"].axes == (-2,) and "lora/base_module/kernel" not in found  # shared: told once
    assert "trained" in found["lora/lora_a"].reason
    assert found["spectral/layer_instance/kernel"].reason == "SpectralNorm rewrites it at every call"
    assert found["weight/layer_instance/kernel"].reason == "WeightNorm rewrites it at every call"


def test_raw_parameters_belong_to_the_module_around_them():
    found = kernels(lambda: Stack(scanned))
    assert found["blocks/raw"] == Kernel("blocks/raw", "blocks", "Block", None)
    assert found["blocks/many/0"] == Kernel("blocks/many/0", "blocks", "Block", None)
    assert found["blocks/many/1/kernel"] == Kernel("blocks/many/1/kernel", "blocks/many/1", "Linear", (-2,))
    assert found["blocks/dense/kernel"].axes == (-2,)  # of [3, 32, 32]
    assert "blocks/count" not in found


def test_what_is_packed_is_said_to_be():
    packed, _ = pack(linear())
    assert kernels_of(packed)[1] == Kernel("kernel", "", "Linear", (-2,), "it is packed already")


def test_a_state_is_no_model():
    with pytest.raises(TypeError, match=r"got State: .*nnx\.merge"):
        kernels_of(nnx.state(linear()))
