"""NNX models apply on packed parameters unchanged, nothing trains or overwrites them, and every kernel is found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

nnx = pytest.importorskip("flax.nnx")
optax = pytest.importorskip("optax")
from samples import normal  # noqa: E402

import ifjax  # noqa: E402
from ifjax.arrays import QTensor  # noqa: E402
from ifjax.models.flax.nnx import PackedParam, walk  # noqa: E402
from ifjax.models.sites import Site  # noqa: E402

X = normal(2, 5, 32, seed=1)


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


def pack(model):
    """(the model with every kernel packed, the model with the decoded kernels as plain parameters)"""
    plain = nnx.clone(model)
    for site in walk(model).sites.values():
        if site.axes and site.reason is None:
            name = site.parameter.rsplit("/", 1)[-1]
            param = find(model, site.parameter)
            lead = tuple(range(len(site.stacked)))
            q = ifjax.quantize(param[...], "nvfp4", axis=site.axes[-1], amax_axes=lead)
            setattr(find(model, site.path), name, PackedParam.like(param, q))
            setattr(find(plain, site.path), name, nnx.Param(q.dequantize()))
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


@pytest.mark.by_default("Linear", "ConvTranspose", "*Embed*")
@pytest.mark.parametrize("name", MODELS)
def test_a_module_applies_on_packed_parameters(name):
    make, call = MODELS[name]
    packed, plain = pack(made(make))
    assert any(isinstance(v, PackedParam) for _, v in nnx.to_flat_state(nnx.state(packed)))
    np.testing.assert_array_equal(call(packed), call(plain))


@pytest.mark.by_default("scanned")
@pytest.mark.parametrize("run", [scanned, scanned_with_remat, scanned_by_type, mapped])
def test_stacked_layers_apply_on_packed_parameters(run):
    packed, plain = pack(made(lambda: Stack(run)))
    assert packed.blocks.dense.kernel.get_raw_value().amax.shape == (3,)
    # Rounding of the fused program differs.
    np.testing.assert_allclose(packed(X), plain(X), rtol=1e-5, atol=1e-5)


def test_transformations_carry_the_packed_bytes():
    packed, plain = pack(linear())
    expected = plain(X)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(packed, X), expected, rtol=1e-5)
    graph, params, bytes_ = nnx.split(packed, nnx.Param, PackedParam)
    assert [path for path, _ in nnx.to_flat_state(params)] == [("bias",)]
    assert [leaf.dtype.name for leaf in jax.tree.leaves(bytes_)] == ["uint8", "uint8", "float32"]
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
    assert walk(abstract).sites["kernel"].axes == (-2,)


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


def test_experts_that_a_program_indexes_stay_packed():
    """A mixture that takes one expert's matrix after another from its stack, as tunix's does."""

    class Experts(nnx.Module):
        def __init__(self):
            self.gate = nnx.Param(normal(3, 32, 16))

        def __call__(self, x):
            return sum(jnp.tanh(x @ self.gate[i]) for i in range(3))

    graph, state = nnx.split(Experts())

    def call(state, x):
        return nnx.merge(graph, state)(x)

    packed, report = ifjax.quantize_params(state, ifjax.Rule("gate", "nvfp4"), model=call, sample=(X,))
    assert len(report.check().quantized) == 1
    gate = packed["gate"].get_raw_value().dequantize()
    wanted = sum(jnp.tanh(X @ gate[i]) for i in range(3))
    np.testing.assert_allclose(ifjax.quantized(call)(packed, X), wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(packed["gate"][1], gate[1])
    assert jax.eval_shape(lambda: packed["gate"])[1].shape == (32, 16)


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


def walked(make):
    """What is found in the model that `make` makes; arrays are not needed."""
    return walk(nnx.eval_shape(lambda: make(nnx.Rngs(0))))


def kernels(found):
    """Sites of parameters that a module multiplies by."""
    return {parameter: site for parameter, site in found.sites.items() if site.axes}


def reasons(found):
    """Why the others are none, where it is known."""
    return {parameter: site.reason for parameter, site in found.sites.items() if site.reason and not site.axes}


def kernel_of(parameter, module, shape, axes, stacked=(), packed=False):
    path = parameter.rpartition("/")[0]
    unfit = "NNX modules multiply by themselves: only linen modules can be intercepted"
    training = None
    if module in ("Einsum", "Conv", "ConvTranspose", "Embed"):
        training = f"nnx.{module} has no place for another product, only Linear and LinearGeneral have"
    return Site(
        parameter, path, module, shape, axes, stacked, packed=packed, activations=unfit, training=training
    )  # fmt: skip


MODULES = [
    (lambda r: nnx.Linear(4, 3, rngs=r), (-2,)),
    (lambda r: nnx.LinearGeneral(4, (3, 2), rngs=r), (-3,)),
    (lambda r: nnx.LinearGeneral((4, 3), 2, axis=(1, -1), rngs=r), (-3, -2)),
    (lambda r: nnx.LinearGeneral((4, 3), (2, 2), axis=(-1, 1), batch_axis={0: 5}, rngs=r), (-4, -3)),
    (lambda r: nnx.Einsum("tha,hab->thb", (2, 4, 3), (2, 3), rngs=r), (-2,)),
    (lambda r: nnx.Conv(4, 3, (2, 2), rngs=r), (-2,)),
    (lambda r: nnx.Conv(4, 6, 2, feature_group_count=2, rngs=r), (-2,)),
    (lambda r: nnx.ConvTranspose(4, 3, (2, 2), rngs=r), (-2,)),
    (lambda r: nnx.ConvTranspose(4, 3, (2, 2), transpose_kernel=True, rngs=r), (-1,)),
    (lambda r: type("Mine", (nnx.Linear,), {})(4, 3, rngs=r), (-2,)),
    (lambda r: nnx.LoRALinear(4, 3, lora_rank=1, rngs=r), (-2,)),
]


@pytest.mark.parametrize(("make", "axes"), MODULES)
def test_contraction_axes_follow_from_the_modules(make, axes):
    found, module = walked(make), nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    name = type(module).__name__
    assert kernels(found) == {"kernel": kernel_of("kernel", name, module.kernel.shape, axes)}
    assert reasons(found)["bias"] == "a bias is added"
    assert found.modules[""] == name


@pytest.mark.parametrize(("make", "axes"), MODULES)
def test_more_axes_in_front_are_those_of_layers(make, axes):
    """As nnx.vmap puts them there, once or twice."""
    once = nnx.eval_shape(lambda: nnx.vmap(make)(nnx.Rngs(0).split(7)))
    rank = once.kernel.ndim
    assert walk(once).sites["kernel"][4:6] == (axes, (-rank,))
    twice = nnx.eval_shape(lambda: nnx.vmap(lambda r: nnx.vmap(make)(r.split(8)))(nnx.Rngs(0).split(7)))
    assert twice.kernel.shape == (7, 8, *once.kernel.shape[1:])
    assert walk(twice).sites["kernel"][4:6] == (axes, (-rank - 1, -rank))


def test_a_kernel_of_another_shape_than_its_module_tells_is_not_taken_for_one():
    def behind(r):
        out_axes = nnx.StateAxes({nnx.Param: 1, ...: 0})
        return nnx.vmap(lambda r: nnx.Linear(4, 3, use_bias=False, rngs=r), out_axes=out_axes)(r.split(7))

    def transposed(r):
        module = nnx.Linear(4, 3, use_bias=False, rngs=r)
        module.kernel = nnx.Param(jnp.zeros((3, 4)))
        return module

    for make, shape in ((behind, (4, 7, 3)), (transposed, (3, 4))):
        assert nnx.eval_shape(lambda make=make: make(nnx.Rngs(0))).kernel.shape == shape
        found = walked(make)
        assert (kernels(found), reasons(found)) == ({}, {}) and "kernel" in found.sites


def test_embeddings_are_contracted_along_their_features():
    found = walked(lambda r: nnx.Embed(4, 3, rngs=r))
    assert kernels(found) == {"embedding": kernel_of("embedding", "Embed", (4, 3), (-1,))}


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
    assert walked(lambda r: nnx.Einsum(equation, shape, rngs=r)).sites["kernel"].axes == axes


def test_equations_without_a_contraction_are_refused_by_name():
    for equation, shape in (("ab,bc->abc", (2, 3)), ("ab,bb->a", (3, 3))):
        found = walked(lambda r, e=equation, s=shape: nnx.Einsum(e, s, rngs=r))
        assert kernels(found) == {}
        assert reasons(found)["kernel"] == f"{equation!r} contracts none of its axes, or takes a diagonal"
    module = nnx.eval_shape(lambda: nnx.Einsum("ab,bc->ac", (2, 3), rngs=nnx.Rngs(0)))
    module.einsum_str = None  # it comes with each call
    assert (walk(module).sites["kernel"].axes, walk(module).sites["kernel"].reason) == ((), None)


def test_every_parameter_of_a_model_is_told():
    def make(r):
        dense = nnx.Linear(4, 4, rngs=r)
        return nnx.Dict(
            attention=nnx.MultiHeadAttention(2, 4, normalize_qk=True, rngs=r),
            norms=nnx.List([nnx.BatchNorm(4, rngs=r), nnx.PReLU()]),
            lora=nnx.LoRA(4, 1, 4, base_module=dense, rngs=r),
            again=dense,
            spectral=nnx.SpectralNorm(nnx.Linear(4, 4, use_bias=False, rngs=r), rngs=r),
            weight=nnx.WeightNorm(nnx.Linear(4, 4, use_bias=False, rngs=r), rngs=r),
            dropout=nnx.Dropout(0.5, rngs=r),
        )

    found, state = walked(make), nnx.state(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)
    assert list(found.sites) == ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    sites, why = kernels(found), reasons(found)
    assert set(found.sites) == set(sites) | set(why)
    out = kernel_of("attention/out/kernel", "LinearGeneral", (2, 2, 4), (-3, -2))
    assert sites["attention/out/kernel"] == out
    assert sites["attention/query/kernel"].axes == (-3,)
    assert why["attention/query/bias"] == "a bias is added"
    assert why["attention/query_ln/scale"] == "LayerNorm has no matmul"
    assert why["norms/0/scale"] == "BatchNorm has no matmul"
    assert why["norms/1/negative_slope"] == "PReLU has no matmul"
    assert sites["again/kernel"].axes == (-2,) and "lora/base_module/kernel" not in sites  # shared: told once
    assert "trained" in why["lora/lora_a"]
    assert sites["spectral/layer_instance/kernel"].reason == "SpectralNorm rewrites it at every call"
    assert sites["weight/layer_instance/kernel"].reason == "WeightNorm rewrites it at every call"
    assert found.modules["attention"] == "MultiHeadAttention" and found.modules["dropout"] == "Dropout"
    assert found.modules["norms/0"] == "BatchNorm" and "norms" not in found.modules  # a list is no module
    assert "lora/base_module" not in found.modules


def test_raw_parameters_are_left_to_rules():
    found = walk(nnx.eval_shape(lambda: Stack(scanned)))
    for path in ("blocks/raw", "blocks/many/0"):  # a vector of layers passes for a matrix
        site = found.sites[path]
        assert (site.axes, site.stacked, site.reason) == ((), (), None)
    kernel = found.sites["blocks/many/1/kernel"]
    assert kernel == kernel_of("blocks/many/1/kernel", "Linear", (3, 32, 32), (-2,), (-3,))
    assert found.sites["blocks/dense/kernel"][4:6] == ((-2,), (-3,))  # of [3, 32, 32]
    assert "blocks/count" not in found.sites


def test_what_is_packed_goes_by_its_own_axis():
    packed, plain = pack(linear())
    assert kernels(walk(packed)) == {"kernel": kernel_of("kernel", "Linear", (32, 16), (-2,), packed=True)}
    packed.kernel = PackedParam.like(plain.kernel, ifjax.quantize(plain.kernel[...], axis=-1))
    assert kernels(walk(packed)) == {"kernel": kernel_of("kernel", "Linear", (32, 16), (-1,), packed=True)}
    stacked, _ = pack(made(lambda: Stack(scanned)))
    assert walk(stacked).sites["blocks/dense/kernel"][4:6] == ((-2,), (-3,))


def test_a_state_is_no_model():
    with pytest.raises(TypeError, match=r"got State: .*nnx\.merge"):
        walk(nnx.state(linear()))


# --- quantize_params


class Classifier(nnx.Module):
    """With variables of all kinds."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 16, rngs=rngs)
        self.many = nnx.List([nnx.Linear(16, 8, rngs=rngs), nnx.Param(jnp.ones(8))])
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.raw = nnx.Param(jax.random.normal(rngs.params(), (8, 4)))
        self.count = nnx.Variable(jnp.ones((8, 8)))

    def __call__(self, tokens):
        x = self.many[0](self.embed(tokens)) + self.many[1][None]
        return self.dropout(self.norm(x)) @ self.raw


TOKENS = jnp.arange(5)
RULES = (ifjax.Rule("raw", "if4", axis=-2, block=4), ifjax.Rule(".*", "if4", block=4))


def classifier():
    model = Classifier(nnx.Rngs(0))
    model.eval()
    return model


def variables_of(state):
    return {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def test_a_quantized_state_merges_into_a_working_model():
    model = classifier()
    graph, state = nnx.split(model)
    packed, report = ifjax.quantize_params(state, RULES, model=model)
    faked, fake_report = ifjax.fake_quantize_params(state, RULES, model=model)
    assert [e.path for e in report.check().quantized] == ["embed/embedding", "many/0/kernel", "raw"]
    assert [e.module for e in report.entries] == [
        "Embed", "Linear", "Linear", "Classifier", "BatchNorm", "BatchNorm", "Classifier",
    ]  # fmt: skip
    assert {e.path: e.reason for e in report.others} == {
        "many/0/bias": "a bias is added", "many/1": "it is no matrix", "norm/bias": "BatchNorm has no matmul",
        "norm/scale": "BatchNorm has no matmul",
    }  # fmt: skip
    assert [e.sqnr_db for e in fake_report.entries] == [e.sqnr_db for e in report.entries]
    assert jax.tree.structure(faked) == jax.tree.structure(state)
    a, b = nnx.merge(graph, packed), nnx.merge(graph, faked)
    assert isinstance(a.many[0].kernel, PackedParam) and isinstance(b.many[0].kernel, nnx.Param)
    np.testing.assert_array_equal(a.many[0].kernel.get_raw_value().dequantize(), b.many[0].kernel[...])
    np.testing.assert_array_equal(a(TOKENS), b(TOKENS))
    assert isinstance(model.many[0].kernel, nnx.Param)  # what was given is as it was


def test_variables_that_are_no_parameters_are_left_alone_and_not_reported():
    model = classifier()
    state = nnx.state(model)
    packed, report = ifjax.quantize_params(state, RULES, model=model)
    before, after = variables_of(state), variables_of(packed)
    others = {path for path, variable in before.items() if not isinstance(variable, nnx.Param)}
    assert others == {"count", "dropout/rngs/count", "dropout/rngs/key", "norm/mean", "norm/var"}
    assert all(after[path] is before[path] for path in others)
    assert not others & {e.path for e in report.entries}
    _, empty = ifjax.quantize_params(nnx.state(model, nnx.BatchStat), RULES)
    assert empty.entries == ()


def test_parameters_alone_a_whole_model_and_a_plain_dictionary_give_the_same_bytes():
    model = classifier()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    merged = nnx.merge(graph, ifjax.quantize_params(params, RULES, model=model)[0], rest)
    whole, _ = ifjax.quantize_params(model, RULES, model=model)
    plain, _ = ifjax.quantize_params(nnx.to_pure_dict(params), RULES, model=model)
    assert isinstance(whole, Classifier)
    np.testing.assert_array_equal(merged(TOKENS), whole(TOKENS))
    for q in (whole.many[0].kernel.get_raw_value(), plain["many"][0]["kernel"]):
        jax.tree.map(np.testing.assert_array_equal, merged.many[0].kernel.get_raw_value(), q)


def test_without_a_model_the_axis_is_the_rules():
    model = classifier()
    packed, report = ifjax.quantize_params(nnx.state(model), ifjax.Rule("many/0/kernel", "if4", axis=-1, block=4))
    assert variables_of(packed)["many/0/kernel"].get_raw_value().axis == -1
    with pytest.raises(ValueError, match=r"2 of 7 parameters .*\n.*embed/embedding .*no rule matches"):
        report.check()


@pytest.mark.by_default("scanned")
@pytest.mark.parametrize("run", [scanned, scanned_with_remat, mapped])
def test_stacked_layers_are_quantized_each_by_itself(run):
    """Raw parameters too, which nn.scan could not take apart otherwise."""
    model = made(lambda: Stack(run))
    graph, state = nnx.split(model)
    rules = [ifjax.Rule(".*/raw", "if4", axis=-2), ifjax.Rule(".*/many/0", None), ifjax.Rule(".*", "if4")]
    packed, report = ifjax.quantize_params(state, rules, model=model)
    faked, _ = ifjax.fake_quantize_params(state, rules, model=model)
    quantized = [e.path for e in report.check().quantized]
    assert quantized == ["blocks/dense/kernel", "blocks/many/1/kernel", "blocks/raw"]
    for path in quantized:
        layers = variables_of(state)[path][...]
        q = variables_of(packed)[path].get_raw_value()
        np.testing.assert_array_equal(q.amax, abs(layers).max((1, 2)))
        np.testing.assert_array_equal(q[1].dequantize(), ifjax.quantize(layers[1], axis=-2).dequantize())
    # Rounding of the fused program differs.
    np.testing.assert_allclose(nnx.merge(graph, packed)(X), nnx.merge(graph, faked)(X), rtol=1e-5, atol=1e-5)


def test_raw_matrices_that_nobody_decided_about_are_unexpected():
    model = made(lambda: Stack(scanned))
    _, report = ifjax.quantize_params(nnx.state(model), model=model)
    with pytest.raises(ValueError, match=r"2 of 7 .*\n  blocks/many/0 .*\n  blocks/raw .*give the rule axis=-2"):
        report.check()


def test_what_is_packed_stays_as_it_is():
    model = classifier()
    graph, state = nnx.split(model)
    packed, _ = ifjax.quantize_params(state, RULES, model=model)
    for model_or_none in (nnx.merge(graph, packed), None):
        again, report = ifjax.quantize_params(packed, RULES, model=model_or_none)
        assert all(a is b for a, b in zip(variables_of(packed).values(), variables_of(again).values(), strict=True))
        assert {e.note for e in report.check().quantized} == {"was packed before"}
        assert report.totals.bytes_before == report.totals.bytes_after


def test_activations_of_nnx_modules_are_refused_by_name():
    model = linear()
    packed, report = ifjax.quantize_params(nnx.state(model), ifjax.Rule(".*", "if4", act_fmt="if4"), model=model)
    assert isinstance(packed["kernel"], PackedParam)
    assert report.quantized[0].act_fmt is None
    with pytest.raises(ValueError, match="activations are not quantized: NNX modules multiply by themselves"):
        report.check()


def test_rules_of_no_use_on_the_model_are_errors():
    model = classifier()
    for path, message in (
        ("norm", "'norm': BatchNorm has no matmul of its own"),
        ("dropout", "'dropout': Dropout has no matmul of its own"),
        ("many/0/bias", "'many/0/bias': a bias is added"),
        ("many/O", r"matches nothing: the closest paths are 'many/0'"),
    ):
        with pytest.raises(ValueError, match=message):
            ifjax.quantize_params(nnx.state(model), [ifjax.Rule(path), *RULES], model=model)
    other = linear()
    with pytest.raises(ValueError, match=r"embed/embedding.*has not read it"):
        ifjax.quantize_params(nnx.state(model), ifjax.Rule(".*", block=4, axis=-2), model=other)


def test_states_are_quantized_inside_of_transformations():
    model = linear()
    graph, state = nnx.split(model)
    eager, _ = ifjax.quantize_params(state, model=model)
    jitted = jax.jit(lambda s: ifjax.quantize_params(s, model=model)[0])(state)
    jax.tree.map(np.testing.assert_array_equal, eager, jitted)
    abstract = jax.eval_shape(lambda s: ifjax.quantize_params(s, model=model)[0], state)
    assert nnx.merge(graph, abstract).kernel[...] == jax.ShapeDtypeStruct((32, 16), jnp.float32)


def test_optimizers_that_take_a_mask_keep_no_state_for_packed_parameters():
    model = classifier()
    packed, _ = ifjax.quantize_params(nnx.state(model), RULES, model=model)
    mask = ifjax.trainable_mask(packed)
    trained = {p for p, v in nnx.to_flat_state(mask) if v}
    assert trained == {("many", 0, "bias"), ("many", 1), ("norm", "bias"), ("norm", "scale")}
    states = optax.masked(optax.sgd(0.1, momentum=0.9), mask).init(packed)
    assert [a.shape for a in jax.tree.leaves(states)] == [(8,)] * 4
