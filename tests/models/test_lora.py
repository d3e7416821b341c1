"""LoRA beside a packed base: values and gradients of the sum, in linen, NNX and plain functions; training; merging."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from samples import initialized, normal

import ifjax
from ifjax import Rule
from ifjax.training import Operand, Product, Recipe

PLAIN = Recipe("plain", Product(Operand("mxfp4"), Operand("mxfp4")), dgrad=Product(Operand("mxfp4"), Operand("mxfp4")))
X = normal(4, 32, seed=1)


def filled(adapters):
    """Adapters whose updates are not zero."""
    return {
        path: ifjax.lora.Adapter(a.a, normal(*a.b.shape, seed=i) * 0.1, a.scale)
        for i, (path, a) in enumerate(sorted(adapters.items()))
    }


def decoded(params, adapters):
    """Floats: base and updates, joined by hand."""
    def one(keys, leaf):
        path = "/".join(key.key for key in keys)
        value = leaf.dequantize() if isinstance(leaf, ifjax.QTensor) else leaf
        if path in adapters:
            a = adapters[path]
            value = value + a.scale * (a.a * a.b).sum(-1)
        return value

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda leaf: isinstance(leaf, ifjax.QTensor))


def check(fn, packed, adapters, *inputs, like=None, atol=2e-5):
    """fn on adapted parameters, and its gradient for the adapters, are those of the floats."""
    run = ifjax.quantized(fn)

    def loss(adapters, *inputs):
        return (run(ifjax.lora.attach(packed, adapters), *inputs) ** 2).mean()

    def exact(adapters, *inputs):
        return ((like or fn)(decoded(packed, adapters), *inputs) ** 2).mean()

    got, wanted = (jax.jit(jax.value_and_grad(f))(adapters, *inputs) for f in (loss, exact))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=atol, rtol=1e-4)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(got[1]))


def plain(params, x):
    x = jax.nn.relu(x @ params["up"])
    x = jnp.einsum("bk,hkd->bhd", x, params["heads"].swapaxes(1, 2))
    x = jax.checkpoint(lambda x, w: jnp.einsum("bhd,hdo->bo", x, w))(x, params["out"])

    def layer(x, w):
        return jnp.tanh(x @ w.astype(jnp.float32).T), None

    return jax.lax.scan(layer, x, params["layers"])[0] + (params["sliced"][:32] @ jnp.ones(32))[None]


def plain_params():
    shapes = {"up": (32, 48), "heads": (3, 16, 48), "out": (3, 16, 32), "layers": (2, 32, 32), "sliced": (40, 32)}
    return {n: normal(*s, seed=i) * s[-2] ** -0.5 for i, (n, s) in enumerate(shapes.items())}


@pytest.mark.slow
def test_values_and_gradients_of_a_plain_function():
    params = plain_params()
    packed, report = ifjax.quantize_params(params, Rule(".*", "mxfp4", block=16), model=plain, sample=X)
    assert report.totals.quantized == 5
    adapters = filled(ifjax.lora.init(jax.random.key(2), packed, rank=2, alpha=6.0, model=plain, sample=X))
    shapes = {path: (a.a.shape, a.b.shape) for path, a in adapters.items()}
    assert shapes["out"] == ((3, 16, 1, 2), (1, 1, 32, 2))
    assert shapes["heads"] == ((1, 1, 48, 2), (3, 16, 1, 2))  # heads are features of its product
    assert shapes["layers"] == ((2, 1, 32, 2), (2, 32, 1, 2))
    assert adapters["up"].scale == 3.0
    check(plain, packed, adapters, X)
    check(plain, params, adapters, X)  # a base in floats
    program = str(jax.make_jaxpr(ifjax.quantized(lambda p, x: x @ p["up"]))(ifjax.lora.attach(packed, adapters), X))
    assert "f32[4,2]" in program or "f32[2,4]" in program  # by way of the rank


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(48)(x))
        return nn.DenseGeneral(8, axis=(-2, -1))(nn.DenseGeneral((3, 16))(x))


@pytest.mark.slow
def test_linen_and_a_recipe_over_a_packed_base():
    model = Model()
    params = initialized(model, X)
    packed, _ = ifjax.quantize_params(params, "mxfp4", model=model, sample=X)
    adapters = filled(ifjax.lora.init(jax.random.key(2), packed, ".*kernel", rank=2, model=model, sample=X))
    assert set(adapters) == {f"{name}/kernel" for name in ("Dense_0", "DenseGeneral_0", "DenseGeneral_1")}
    dense = {f"params/{path}": a for path, a in adapters.items()}
    like = lambda p, x: model.apply(decoded(packed, dense) if p is None else p, x)  # noqa: E731

    def loss(fn, adapters, x):
        return (fn(ifjax.lora.attach(packed, adapters), x) ** 2).mean()

    def exact(adapters, x):
        return (like(decoded(packed, {f"params/{p}": a for p, a in adapters.items()}), x) ** 2).mean()

    by_packed, by_recipe = ifjax.quantized(model.apply), ifjax.quantized(model.apply, PLAIN)
    grad = jax.jit(jax.grad(functools.partial(loss, by_packed)))(adapters, X)
    for one, other in zip(jax.tree.leaves(grad), jax.tree.leaves(jax.grad(exact)(adapters, X)), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-4)
    # By the recipe what the packed weights are multiplied with is rounded, forward and backward; the weights are not.
    value, quantized = jax.jit(jax.value_and_grad(functools.partial(loss, by_recipe)))(adapters, X)
    assert 0.01 < abs(float(value / loss(by_packed, adapters, X)) - 1) < 0.3
    first = quantized["Dense_0/kernel"].b
    cosine = (first * grad["Dense_0/kernel"].b).sum() / jnp.linalg.norm(first) / jnp.linalg.norm(
        grad["Dense_0/kernel"].b)
    assert 0.8 < float(cosine) < 0.9999
    one = nn.Dense(8)
    q = {"params": {"kernel": ifjax.quantize(jnp.eye(32, 8), "mxfp4", axis=-2), "bias": jnp.zeros(8)}}
    y = ifjax.quantized(one.apply, PLAIN)(q, X)
    np.testing.assert_allclose(y, ifjax.fake_quantize(X, "mxfp4") @ q["params"]["kernel"], atol=1e-6)


def test_the_rest_trains_beside_a_packed_base():
    model = Model()
    params = initialized(model, X)
    packed, _ = ifjax.quantize_params(params, Rule(".*", "mxfp4", block=16), model=model, sample=X)
    trainable, frozen = ifjax.partition(packed)
    assert len(jax.tree.leaves(trainable)) == 3  # biases
    assert jax.tree.structure(ifjax.combine(trainable, frozen)) == jax.tree.structure(packed)
    only, _ = ifjax.partition(packed, lambda path, value: path.endswith("Dense_0/bias"))
    assert len(jax.tree.leaves(only)) == 1
    with pytest.raises(ValueError, match="in both"):
        ifjax.combine(trainable, packed)
    optimizer = optax.adam(1e-2)
    apply = ifjax.quantized(model.apply)

    @jax.jit
    def step(trainable, state):
        loss, grads = jax.value_and_grad(lambda t: (apply(ifjax.combine(t, frozen), X) ** 2).mean())(trainable)
        with jax.numpy_dtype_promotion("standard"):  # optax promotes its counts
            updates, state = optimizer.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    state, losses = optimizer.init(trainable), []
    for _ in range(5):
        trainable, state, loss = step(trainable, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_nnx():
    model = nnx.Sequential(nnx.Linear(32, 48, rngs=nnx.Rngs(0)), nnx.Linear(48, 8, rngs=nnx.Rngs(1)))
    graph, state = nnx.split(model)
    packed, _ = ifjax.quantize_params(state, Rule(".*", "mxfp4"), model=model)
    adapters = filled(ifjax.lora.init(jax.random.key(2), packed, rank=2, model=model))
    assert len(adapters) == 2
    run = ifjax.quantized(lambda model, x: model(x))

    def loss(adapters):
        return (run(nnx.merge(graph, ifjax.lora.attach(packed, adapters)), X) ** 2).mean()

    def exact(adapters):
        first, second = (
            q.get_value() + a.scale * (a.a * a.b).sum(-1)
            for q, a in ((packed["layers"][i]["kernel"], adapters[f"layers/{i}/kernel"]) for i in (0, 1))
        )
        return (((X @ first) @ second) ** 2).mean()

    got, wanted = (jax.value_and_grad(f)(adapters) for f in (loss, exact))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-4)
    merged = ifjax.lora.merge(packed, adapters)
    q = merged["layers"][0]["kernel"].get_raw_value()
    assert isinstance(q, ifjax.QTensor) and nnx.merge(graph, merged)(X).shape == (4, 8)


@pytest.mark.slow
def test_merged_is_quantized_as_the_base_was():
    packed, _ = ifjax.quantize_params(plain_params(), Rule(".*", "nvfp4"), model=plain, sample=X)
    adapters = filled(ifjax.lora.init(jax.random.key(2), packed, "layers|up", rank=2, model=plain, sample=X))
    merged = ifjax.lora.merge(packed, adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(packed)
    whole = packed["layers"].dequantize() + (adapters["layers"].a * adapters["layers"].b).sum(-1)
    wanted = ifjax.quantize(whole, "nvfp4", axis=-1, amax_axes=(0,))
    np.testing.assert_allclose(merged["layers"].dequantize(), wanted.dequantize(), atol=0.05)
    assert merged["out"] is packed["out"]
    floats = ifjax.lora.merge(plain_params(), adapters)
    np.testing.assert_allclose(
        floats["up"], plain_params()["up"] + (adapters["up"].a * adapters["up"].b).sum(-1), atol=1e-6
    )


def test_refusals():
    packed = {"w": ifjax.quantize(jnp.ones((3, 16, 16)), "mxfp4"), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match="pass model= and sample="):
        ifjax.lora.init(jax.random.key(0), packed)
    with pytest.raises(ValueError, match=r"matches no path; paths are b, w"):
        ifjax.lora.init(jax.random.key(0), packed, "x")
    with pytest.raises(ValueError, match="rank"):
        ifjax.lora.init(jax.random.key(0), packed, rank=0)
    adapters = ifjax.lora.init(jax.random.key(0), {"w": ifjax.quantize(jnp.ones((16, 16)), "mxfp4")})
    with pytest.raises(ValueError, match="another shape"):
        ifjax.lora.attach(packed, adapters)
    with pytest.raises(ValueError, match="not there: w"):
        ifjax.lora.attach({"b": jnp.ones(3)}, adapters)
    attached = ifjax.lora.attach({"w": ifjax.quantize(jnp.ones((16, 16)), "mxfp4")}, adapters)
    with pytest.raises(TypeError, match=r"ifjax\.quantized"):
        np.asarray(attached["w"])


def test_sharded_as_the_base_is():
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = lambda *spec: jax.NamedSharding(mesh, jax.P(*spec))  # noqa: E731
    params = {"w": ifjax.quantize(normal(32, 64), "mxfp4", axis=-2)}
    adapters = filled(ifjax.lora.init(jax.random.key(2), params, rank=4))
    run = ifjax.quantized(lambda params, x: x @ params["w"])
    grad = jax.jit(jax.grad(lambda a, p, x: (run(ifjax.lora.attach(p, a), x) ** 2).mean()))
    alone = grad(adapters, params, X)
    shared = {"w": ifjax.device_put(params["w"], place(None, "model"))}
    own = {"w": ifjax.lora.Adapter(jax.device_put(adapters["w"].a, place()),
                                   jax.device_put(adapters["w"].b, place(None, "model")))}
    together = grad(own, shared, jax.device_put(X, place("data")))
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6, rtol=1e-5)
    assert together["w"].b.sharding.is_equivalent_to(place(None, "model"), 3)


@pytest.mark.slow
def test_a_small_language_model_learns_beside_a_4_bit_base_as_beside_floats():
    """Loss after 40 steps of Adam on the adapters alone, of texts of another kind than the base was trained on."""
    words, dim = 32, 64

    def lm(params, ids):
        x = params["embed"][ids]
        context = jnp.cumsum(x, 1) / jnp.arange(1, ids.shape[1] + 1, dtype=x.dtype)[None, :, None]
        x = x + jax.nn.gelu(jnp.concatenate([x, context], -1) @ params["up"]) @ params["down"]
        return x @ params["head"]

    def nll(fn, params, ids):
        logits = jax.nn.log_softmax(fn(params, ids[:, :-1]))
        return -jnp.take_along_axis(logits, ids[:, 1:, None], -1).mean()

    def texts(key, step):
        start = jax.random.randint(key, (16, 1), 0, words)
        return (start + step * jnp.arange(17)[None]) % words

    shapes = {"embed": (words, dim), "up": (2 * dim, 128), "down": (128, dim), "head": (dim, words)}
    params = {n: normal(*s, seed=i) * s[0] ** -0.5 for i, (n, s) in enumerate(shapes.items())}

    def train(loss, tree, step, count, rate):
        optimizer = optax.adam(rate)

        def one(carry, key):
            tree, state = carry
            value, grads = jax.value_and_grad(loss)(tree, texts(key, step))
            with jax.numpy_dtype_promotion("standard"):  # optax promotes its counts
                updates, state = optimizer.update(grads, state, tree)
            return (optax.apply_updates(tree, updates), state), value

        (tree, state), losses = jax.jit(lambda c: jax.lax.scan(one, c, jax.random.split(jax.random.key(1), count)))(
            (tree, optimizer.init(tree)))
        return tree, state, losses

    params, _, _ = train(functools.partial(nll, lm), params, 1, 100, 1e-2)
    rules = [Rule("embed|head", None), Rule(".*", "nvfp4")]
    ids = texts(jax.random.key(2), 3)
    packed, _ = ifjax.quantize_params(params, rules, model=lm, sample=ids)
    adapters = ifjax.lora.init(jax.random.key(3), packed, rank=8, model=lm, sample=ids)
    run = ifjax.quantized(lm)
    ends = {}
    for name, base in (("packed", packed), ("floats", params)):
        adapted = lambda a, ids, base=base: nll(run, ifjax.lora.attach(base, a), ids)  # noqa: E731
        _, state, losses = train(adapted, adapters, 3, 40, 1e-2)
        ends[name] = float(losses[0]), float(losses[-5:].mean())
    assert ends["packed"][1] < 0.5 * ends["packed"][0], ends
    assert abs(ends["packed"][1] - ends["floats"][1]) < 0.1, ends  # the stated gap, in nats
    # What is held: 4.5 bits a weight and 12 bytes an adapter's value, where full training holds 12 bytes a weight.
    weights = sum(params[n].size for n in ("up", "down"))
    held = sum(packed[n].nbytes for n in ("up", "down")) + sum(a.nbytes for a in jax.tree.leaves((adapters, state)))
    assert held < 0.3 * 12 * weights
