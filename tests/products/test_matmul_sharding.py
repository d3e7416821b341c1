"""Products of sharded packed weights: what one device computes, and no weights on the move. On eight devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ifjax

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

N, K = 128, 512
# The mesh's axes that N and K of the weights are divided by.
PLACEMENTS = {"N": ("a", None), "K": (None, "a"), "N and K": ("b", "a"), "K by both": (None, ("a", "b"))}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


@pytest.fixture(scope="module", params=[-1, -2], ids=["[N, K]", "[K, N]"])
def weights(request):
    w = normal(N, K, seed=1)
    return ifjax.quantize(w if request.param == -1 else w.T, axis=request.param)


def spec_of(weights):
    return "mk,nk->mn" if weights.axis == -1 else "mk,kn->mn"


def placed(weights, mesh, n, k):
    return ifjax.device_put(weights, NamedSharding(mesh, P(n, k) if weights.axis == -1 else P(k, n)))


def gathered(text):
    """What a compiled program collects from other devices, sums aside."""
    return re.findall(r"= (\S+ (?:all-gather|all-to-all|collective-permute))(?:-start)?\(", text)


@pytest.mark.by_default("?N, K?-K-many rows")
@pytest.mark.parametrize("rows", [3, 64], ids=["few rows", "many rows"])
@pytest.mark.parametrize(("n", "k"), PLACEMENTS.values(), ids=PLACEMENTS)
def test_sharded_weights_give_the_same_product_and_stay_where_they_are(mesh, weights, n, k, rows):
    x = normal(rows, K)
    product = functools.partial(ifjax.einsum, spec_of(weights))
    q = placed(weights, mesh, n, k)
    x_placed = jax.device_put(x, NamedSharding(mesh, P(None, k)))
    compiled = jax.jit(product).lower(x_placed, q).compile()
    assert not gathered(compiled.as_text())
    # K-shards are added up in another order.
    np.testing.assert_allclose(compiled(x_placed, q), product(x, weights), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k"), PLACEMENTS.values(), ids=PLACEMENTS)
def test_the_gradient_gathers_no_weights(mesh, weights, n, k):
    x, g = normal(64, K), normal(64, N, seed=2)

    def pull(x, q, g):
        return jax.vjp(lambda x: ifjax.einsum(spec_of(weights), x, q), x)[1](g)[0]

    q = placed(weights, mesh, n, k)
    x_placed, g_placed = (jax.device_put(a, NamedSharding(mesh, P(None, s))) for a, s in ((x, k), (g, n)))
    compiled = jax.jit(pull).lower(x_placed, q, g_placed).compile()
    assert not gathered(compiled.as_text())
    np.testing.assert_allclose(compiled(x_placed, q, g_placed), pull(x, weights, g), rtol=1e-4, atol=1e-4)


@pytest.mark.by_default("?N, K?-*")
@pytest.mark.parametrize(("n", "k"), PLACEMENTS.values(), ids=PLACEMENTS)
def test_under_shard_map(mesh, weights, n, k):
    x = normal(5, K)
    q = placed(weights, mesh, n, k)
    specs = jax.tree.map(lambda s: s.spec, ifjax.shardings(q, q.codes.sharding))

    def product(x, q):
        y = ifjax.einsum(spec_of(weights), x, q)
        return y if k is None else lax.psum(y, k)

    mapped = jax.jit(jax.shard_map(product, mesh=mesh, in_specs=(P(None, k), specs), out_specs=P(None, n)))
    np.testing.assert_allclose(mapped(x, q), ifjax.einsum(spec_of(weights), x, weights), rtol=1e-4, atol=1e-4)
    # differentiates there too
    loss = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(mapped(x, q)))))
    want = jax.grad(lambda x: jnp.sum(jnp.sin(ifjax.einsum(spec_of(weights), x, weights))))(x)
    np.testing.assert_allclose(loss(x), want, rtol=1e-3, atol=1e-3)


def test_meshes_with_explicit_axes(weights):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        x = jax.device_put(normal(8, K), P("b", None))
        q = placed(weights, mesh, "a", None)
        y = jax.jit(functools.partial(ifjax.einsum, spec_of(weights)))(x, q)
        assert jax.typeof(y).sharding.spec == P("b", "a")
    np.testing.assert_allclose(y, ifjax.einsum(spec_of(weights), normal(8, K), weights), rtol=1e-4, atol=1e-4)


@pytest.mark.by_default("False-*")
@pytest.mark.parametrize(
    ("by_recipe", "w_spec"),
    [(True, P(None, "b")), (True, P("a", "b")), (False, P()), (False, P(None, "b")), (False, P("b", "a"))], ids=str,
)  # fmt: skip
def test_gradients_on_explicit_axes_are_placed_as_those_of_a_plain_product(by_recipe, w_spec):
    """By recipe also blocks of 16 along an axis of 32 that four devices share, and squares that are cut through."""
    numbers = ((2,), (0,)), ((), ())
    x, w = normal(4, 2, 32), normal(32, 8)

    def quantized(x, w):
        if by_recipe:
            return ifjax.quantized_dot_general(x, w, numbers, "nvfp4", jax.random.key(0))
        return ifjax.dot_general(x, ifjax.quantize(w, "nvfp4", axis=0), numbers)

    def gradients(product, x, w):
        return jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.sin(product(x, w))), (0, 1)))(x, w)

    want = gradients(quantized, x, w)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, P() if "b" in w_spec else P("b"))
        w = jax.device_put(w, w_spec)
        plain = gradients(functools.partial(jax.lax.dot_general, dimension_numbers=numbers), x, w)
        got = gradients(quantized, x, w)
        assert [jax.typeof(a).sharding for a in got] == [jax.typeof(a).sharding for a in plain]
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


BATCHED = [  # which operand's batch axis leads is JAX's choice, by the order of the result
    ("bmk,bnk->mbn", P(None, None, None), P("b", None, None), None),
    ("bmk,bnk->mbn", P("a", None, "b"), P(None, None, None), None),
    ("bmk,bnk->bmn", P(None, "a", None), P("a", None, None), None),
    ("mk,nk->mn", P(None, "a"), P(None, "a"), P("b", None)),
    ("mk,nk,m->mn", P("a", None), P("b", None), None),
    ("mk,nk->n", P("a", None), P("b", None), None),
]


@pytest.mark.by_default("mk,nk->mn-*", "bmk,bnk->mbn-P(None, None, None)-P('b', None, None)-None")
@pytest.mark.parametrize(("spec", "x_spec", "w_spec", "out"), BATCHED, ids=str)
def test_einsum_on_explicit_axes_places_as_jax_does(spec, x_spec, w_spec, out):
    x, w = normal(*(8, 4, 64)[3 - len(x_spec) :]), normal(*(8, 16, 64)[3 - len(w_spec) :], seed=1)
    q, others = ifjax.quantize(w, "nvfp4"), [normal(4)] * spec.count(",m->")
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)

    def both(x, q):
        y, pull = jax.vjp(lambda x: ifjax.einsum(spec, x, q, *others, out_sharding=out), x)
        return y, *pull(y)

    with jax.set_mesh(mesh):
        x_placed, w = jax.device_put(x, x_spec), jax.device_put(w, w_spec)
        q_placed = ifjax.device_put(q, NamedSharding(mesh, w_spec))
        plain = jax.eval_shape(functools.partial(jnp.einsum, spec, out_sharding=out), x_placed, w, *others)
        y, dx = jax.eval_shape(both, x_placed, q_placed)
        assert (y.sharding, dx.sharding) == (plain.sharding, jax.typeof(x_placed).sharding)
        got = both(x_placed, q_placed) if x_spec == P("a", None, "b") else ()  # one of them computed
    for one, other in zip(got, both(x, q) if got else (), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)


def test_matmul_on_explicit_axes_places_as_jax_does():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    x, w = normal(4, 3, 64), normal(4, 64, 8, seed=1)
    q = ifjax.quantize(w, "if4", axis=-2)
    with jax.set_mesh(mesh):
        x, w = jax.device_put(x, P("a", None, "b")), jax.device_put(w, P("a", "b"))
        q = ifjax.device_put(q, NamedSharding(mesh, P("a", "b")))
        for out in (P("a"), P(None, None, "b")):
            of_both = [functools.partial(f, out_sharding=out) for f in (ifjax.matmul, jnp.matmul)]
            assert jax.eval_shape(of_both[0], x, q).sharding == jax.eval_shape(of_both[1], x, w).sharding
        with pytest.raises(Exception, match="out_sharding"):  # JAX's own words
            ifjax.matmul(x, q)
    with pytest.raises(ValueError, match="explicit axes"):
        ifjax.matmul(normal(2, 64), ifjax.quantize(normal(64, 8), axis=0), out_sharding=P("a"))


# --- two processes ----------------------------------------------------------------------------------------------------

WORKER = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
import jax.numpy as jnp, numpy as np, ifjax
from jax.sharding import NamedSharding, PartitionSpec as P
rng = np.random.default_rng(0)
w, x = rng.standard_normal((64, 256), np.float32), rng.standard_normal((5, 256), np.float32)
mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
one = ifjax.quantize(w)  # each process by itself
for spec in (P("a"), P(None, "a")):
    sharding = NamedSharding(mesh, spec)
    whole = jax.make_array_from_callback(w.shape, sharding, lambda index: w[index])
    q = jax.jit(ifjax.quantize)(whole)
    for leaf, expected in ((q.codes, one.codes), (q.scales, one.scales)):
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(expected)[shard.index])
    rows = jax.make_array_from_callback(x.shape, NamedSharding(mesh, P(None, *spec[1:])), lambda index: x[index])
    everywhere = NamedSharding(mesh, P())
    y = jax.jit(lambda x, q: ifjax.einsum("mk,nk->mn", x, q), out_shardings=everywhere)(rows, q)
    expected = ifjax.einsum("mk,nk->mn", x, one)
    np.testing.assert_allclose(np.asarray(y.addressable_shards[0].data), expected, rtol=1e-4, atol=1e-4)
print("equal")
"""


@pytest.mark.slow
def test_two_processes_do_what_one_does(two_processes):
    for out in two_processes(WORKER):
        assert out.strip().endswith("equal")
