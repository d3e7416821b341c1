"""Packed optimizer moments: what is packed, that noise is unbiased and harmless, and that optax's wrappers take it."""

import math
from typing import NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from samples import normal

import ifjax
from ifjax.training.optim import (
    PackedMoment,
    PackedRoot,
    QuantizedMomentsState,
    _decode,
    _encode,
    dequantize_moments,
    quantized_moments,
)


@pytest.fixture(autouse=True)
def _promotion():
    """optax adds Python numbers and integer counters to floats, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


FMT = "nvfp4"  # where any will do: one candidate compiles in half the time


def parameters():
    return {"kernel": normal(32, 64), "bias": normal(64, seed=2), "scale": normal()}


def gradients(step, like):
    leaves, treedef = jax.tree.flatten(like)
    return treedef.unflatten([normal(*x.shape, seed=100 * step + i) for i, x in enumerate(leaves)])


def is_packed(x):
    return isinstance(x, PackedMoment | PackedRoot)


def kinds(tree):
    """The names of the packed classes in a tree, or "array"."""
    return [type(x).__name__ if is_packed(x) else "array" for x in jax.tree.leaves(tree, is_leaf=is_packed)]


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def run(optimizer, steps, params=None, state=None, start=0):
    params = parameters() if params is None else params
    state = optimizer.init(params) if state is None else state
    update = jax.jit(optimizer.update)
    for step in range(start, start + steps):
        updates, state = update(gradients(step, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- what is packed --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_large_moments_are_packed_and_the_rest_is_untouched():
    optimizer = quantized_moments(optax.adamw(1e-3), "if6", min_size=1024)
    params = parameters() | {"stack": normal(2, 16, 32, seed=1)}
    _, state = run(optimizer, 2, params)
    adam = state.inner_state[0]
    names = ["bias", "kernel", "scale", "stack"]
    assert dict(zip(names, kinds(adam.mu), strict=True)) == {
        "bias": "array", "kernel": "PackedMoment", "scale": "array", "stack": "PackedMoment",
    }  # fmt: skip
    assert kinds(adam.nu) == ["array", "PackedRoot", "array", "PackedRoot"]
    assert adam.nu["stack"].values.shape == (2, 16, 32)
    assert (int(adam.count), int(state.count)) == (2, 2)
    plain = optax.adamw(1e-3).init(params)
    assert jax.tree.structure(dequantize_moments(state)) == jax.tree.structure(plain)
    assert [x.dtype for x in jax.tree.leaves(dequantize_moments(state))] == [x.dtype for x in jax.tree.leaves(plain)]


@pytest.mark.by_default("nvfp4-*")
@pytest.mark.parametrize("fmt, bits", [("if6", 6.5), ("nvfp4", 4.5), ("mxfp6_e2m3", 6.25), ("if3", 3.5)])
def test_bytes_are_counted(fmt, bits):
    params = {"kernel": jnp.zeros((64, 256))}
    state = quantized_moments(optax.adam(1e-3), fmt).init(params)
    amax = 0 if fmt.startswith("mx") else 4
    values = 2 * (64 * 256 * bits / 8 + amax)
    assert nbytes(state) == values + nbytes(state.key) + 4 + 4  # two counters
    assert all(x.nbytes <= 64 * 256 * 32 for x in jax.tree.leaves(state))


def test_second_moments_may_have_another_format():
    state = (
        quantized_moments(optax.adam(1e-3), "nvfp4", second_fmt="mxfp6_e2m3")
        .init({"w": jnp.zeros((64, 64))})
        .inner_state[0]
    )
    assert (state.mu["w"].values.fmt.name, state.nu["w"].values.fmt.name) == ("nvfp4", "mxfp6_e2m3")


@pytest.mark.by_default("adagrad", "inject")
@pytest.mark.parametrize(
    "inner, found",
    [
        (lambda: optax.lion(1e-3), ["PackedMoment"]),
        (lambda: optax.sgd(1e-3, momentum=0.9), ["PackedMoment"]),
        (lambda: optax.rmsprop(1e-3), ["PackedRoot"]),
        (lambda: optax.adagrad(1e-3), ["PackedRoot"]),
        (lambda: optax.amsgrad(1e-3), ["PackedMoment", "PackedRoot", "PackedRoot"]),
        (lambda: optax.adan(1e-3), ["PackedMoment", "PackedMoment", "PackedRoot", "PackedMoment"]),
        (lambda: optax.adadelta(1e-3), ["PackedRoot", "PackedRoot"]),
        (lambda: optax.sm3(1e-3), ["PackedMoment"]),
        (lambda: optax.adamw(1e-3, mu_dtype=jnp.bfloat16), ["PackedMoment", "PackedRoot"]),
        (lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)), ["PackedMoment", "PackedRoot"]),
        (lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3), ["PackedMoment", "PackedRoot"]),
    ],
    ids=["lion", "sgd", "rmsprop", "adagrad", "amsgrad", "adan", "adadelta", "sm3", "bf16", "chain", "inject"],
)
def test_moments_of(inner, found):
    params = {"w": normal(32, 64)}
    optimizer = quantized_moments(inner(), FMT, min_size=256)
    params, state = run(optimizer, 2, params)
    assert [kind for kind in kinds(state.inner_state) if kind != "array"] == found
    assert jnp.isfinite(params["w"]).all()
    plain, before = jax.eval_shape(inner().init, params), jax.eval_shape(dequantize_moments, state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(lambda x: (x.shape, x.dtype), plain)


def test_copies_of_parameters_are_no_moments():
    optimizer = quantized_moments(optax.contrib.schedule_free_adamw(1e-3), FMT, min_size=256)
    state = optimizer.init({"w": normal(32, 64)}).inner_state
    assert isinstance(state.z["w"], jax.Array)
    assert kinds(state).count("PackedRoot") == 1
    kept = quantized_moments(optax.adam(1e-3), FMT, min_size=256, keep=("ScaleByAdamState.mu",)).init(
        {"w": normal(32, 64)}
    )
    assert [kind for kind in kinds(kept.inner_state) if kind != "array"] == ["PackedRoot"]


def test_a_second_moment_with_signs_keeps_them():
    """Such as an average of estimates of a Hessian's diagonal, of which optax's Sophia has one."""

    class State(NamedTuple):
        nu: dict

    inner = optax.GradientTransformation(
        lambda params: State(jax.tree.map(jnp.zeros_like, params)), lambda g, state, params=None: (g, State(g))
    )
    g = {"w": normal(32, 64)}
    optimizer = quantized_moments(inner, "nvfp6_e2m3", min_size=256)
    _, state = optimizer.update(g, optimizer.init(g), g)
    kept = dequantize_moments(state).nu["w"]
    assert isinstance(state.inner_state.nu["w"], PackedRoot)
    large = jnp.abs(g["w"]) > 0.1
    np.testing.assert_array_equal(jnp.sign(kept)[large], jnp.sign(g["w"])[large])
    assert jnp.linalg.norm(kept - g["w"]) < 0.15 * jnp.linalg.norm(g["w"])


def test_parameters_may_be_a_bare_array():
    _, state = run(quantized_moments(optax.sgd(0.1, momentum=0.9), FMT, min_size=256), 1, normal(32, 64))
    assert kinds(state.inner_state)[0] == "PackedMoment"


@pytest.mark.by_default("shape1-*", "shape3-*", "shape5-*")
@pytest.mark.parametrize(
    "shape, axis",
    [((64, 256), -1), ((4096, 3), -2), ((8, 512, 20), -2), ((512, 30), -1), ((4100,), -1), ((9, 9, 80), -1)],
)
def test_blocks_lie_along_the_last_axis_unless_it_wastes_room(shape, axis):
    state = quantized_moments(optax.sgd(1.0, momentum=0.5), FMT, min_size=64).init({"w": jnp.zeros(shape)})
    q = jax.tree.leaves(state.inner_state, is_leaf=is_packed)[0].values
    assert q.axis == axis
    assert q.bits_per_value < 6.5 * 9 / 8 + 32 / q.size


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_representable_moments_give_the_inner_steps_bit_for_bit():
    """MX scales are powers of two, and E2M3 holds halves and quarters of the largest value."""
    params = {"w": normal(16, 64)}
    inner = optax.adam(1e-2, b1=0.5, b2=0.0)
    optimizer, plain = quantized_moments(inner, "mxfp6_e2m3", min_size=1), inner
    state, plain_state = optimizer.init(params), plain.init(params)
    for step in range(3):
        signs = {"w": jnp.where(normal(16, 64, seed=step) < 0, -1.0, 1.0)}
        updates, state = optimizer.update(signs, state, params)
        expected, plain_state = plain.update(signs, plain_state, params)
        assert_trees_equal(updates, expected)
        assert_trees_equal(dequantize_moments(state), plain_state)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["nvfp4", "if6"])
def test_moments_are_unbiased_over_seeds(fmt):
    """The mean of n encodings is off by as much as the variance of n samples says, within 4 sigma over all values."""
    x, n = normal(16, 64) * jnp.exp(normal(16, 1, seed=1)), 400

    def encoded(seed):
        return _decode(PackedMoment(_encode(x, jax.random.key(seed), fmt=ifjax.get_format(fmt), axis=-1, root=False)))

    values = np.asarray(jax.jit(jax.vmap(encoded))(jnp.arange(n)), np.float64)
    error = values.mean(0) - np.asarray(x, np.float64)
    gains = (values * np.asarray(x, np.float64)).sum((1, 2)) / (np.asarray(x, np.float64) ** 2).sum()
    choice = 1e-3 if fmt == "if6" else 0  # to choose between draws takes .07 % off here
    assert abs(gains.mean() - 1) < choice + 4 * gains.std() / math.sqrt(n)
    if fmt != "if6":  # which is unbiased in the mean over values, not at each
        expected = values.var(0) / n
        # A sum of squared normal numbers of these variances has the variance 2 * sum(expected^2).
        assert abs((error**2).sum() - expected.sum()) < 4 * math.sqrt(2 * (expected**2).sum())


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["if6", "nvfp4", "mxfp6_e2m3"])
def test_second_moments_beside_large_ones_are_never_zero(fmt):
    nu = jnp.exp(8 * normal(64, 64)).at[0].set(0).at[1, 0].set(1e12).at[2].set(1e-30)
    packed = PackedRoot(_encode(nu, jax.random.key(0), fmt=ifjax.get_format(fmt), axis=-1, root=True))
    back = _decode(packed)
    assert (packed.values.dequantize() == 0).any()  # stored as zero, and yet
    assert (back >= 0).all() and (back[nu > 0] > 0).all() and jnp.isfinite(back).all()
    # No value is above its own by more than the coarsest step next to its block's largest, with room for rounding.
    peak = jnp.repeat(jnp.max(nu.reshape(64, -1, 16), -1), 16, axis=-1)
    if not fmt.startswith("mx"):
        assert (jnp.sqrt(back) <= jnp.sqrt(nu) + 0.6 * jnp.sqrt(peak) + 2e-6 * jnp.sqrt(nu.max())).all()
    zeros = PackedRoot(_encode(jnp.zeros((4, 64)), jax.random.key(0), fmt=ifjax.get_format(fmt), axis=-1, root=True))
    assert (_decode(zeros) == 0).all()


@pytest.mark.slow
def test_updates_stay_bounded_where_second_moments_span_many_orders():
    """Gradients from 1e-6 to 1 in each block: Adam's largest update is 1.0 with float32 moments, 2.2 with if6."""
    scales = 10.0 ** (-6 * jax.random.uniform(jax.random.key(3), (32, 64)))
    inner = optax.scale_by_adam()
    optimizer = quantized_moments(inner, "if6", min_size=1)

    def step(state, key):
        updates, state = optimizer.update(scales * jax.random.normal(key, scales.shape), state)
        return state, jnp.abs(updates).max()

    keys = jax.random.split(jax.random.key(4), 100)
    _, largest = jax.jit(lambda state: jax.lax.scan(step, state, keys))(optimizer.init(scales))
    assert largest.max() < 5  # 28,000 where roots may decode to zero


@pytest.mark.slow
def test_the_tensor_scale_is_a_power_of_two():
    for scale in (1.0, 1.5, 3e-20, 7e30):
        x = scale * jnp.clip(normal(8, 64), -1, 1)
        q = _encode(x, jax.random.key(0), fmt=ifjax.get_format("if6"), axis=-1, root=False)
        assert q.amax >= jnp.abs(x).max() > q.amax / 2
        assert math.frexp(float(q.amax))[0] == 0.5


@pytest.mark.slow
def test_a_value_that_is_not_finite_stays_in_its_block():
    x = normal(4, 64).at[1, 20].set(jnp.nan).at[2, 40].set(jnp.inf)
    for kind, root in ((PackedMoment, False), (PackedRoot, True)):
        y = x**2 if root else x
        back = _decode(kind(_encode(y, jax.random.key(0), fmt=ifjax.get_format("if6"), axis=-1, root=root)))
        assert jnp.isnan(back).sum() == 32
        assert jnp.isnan(back[1, 16:32]).all() and jnp.isnan(back[2, 32:48]).all()


def train(make, seeds, steps):
    """The last losses [seeds] of a small MLP on a function of 8 numbers; data and start are shared by all `make`s."""

    def one(seed):
        keys = jax.random.split(jax.random.key(seed), 5)
        shapes = {"a": (8, 32), "b": (32, 32), "c": (32, 1)}
        params = {
            k: jax.random.normal(key, s) / math.sqrt(s[0]) for key, (k, s) in zip(keys, shapes.items(), strict=False)
        }
        teacher = jax.random.normal(keys[3], (8, 4))

        def loss(params, x):
            y = jnp.sin(x @ teacher).sum(-1, keepdims=True)
            return ((jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["c"] - y) ** 2).mean()

        optimizer = make(jax.random.fold_in(keys[4], 1))

        def step(carry, i):
            params, state = carry
            x = jax.random.normal(jax.random.fold_in(keys[4], i + 2), (64, 8))
            value, grads = jax.value_and_grad(loss)(params, x)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        (_, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))
        return losses[:20].mean(), losses[-100:].mean()

    return np.asarray(jax.jit(jax.vmap(one))(jnp.arange(seeds)))


@pytest.mark.slow
def test_training_ends_where_float32_moments_end():
    """The mean difference over seeds is within 3 standard errors, or 2%, of the loss with float32 moments."""
    inner = optax.adamw(3e-3, weight_decay=1e-3)
    first, plain = train(lambda key: inner, 6, 600)
    _, packed = train(lambda key: quantized_moments(inner, "if6", seed=key, min_size=512), 6, 600)
    gap = packed - plain
    assert plain.mean() < 0.6 * first.mean()
    assert abs(gap.mean()) < max(3 * gap.std(ddof=1) / math.sqrt(len(gap)), 0.02 * plain.mean()), (plain, packed)


# --- steps -----------------------------------------------------------------------------------------------------------


def test_a_state_from_bytes_goes_on_as_if_nothing_had_happened(tmp_path):
    optimizer = quantized_moments(optax.adamw(1e-2), FMT, min_size=1024, seed=5)
    params, state = run(optimizer, 2)
    saved = flax.serialization.to_bytes(state)
    # Made with another seed: the noise comes from the state.
    other = quantized_moments(optax.adamw(1e-2), FMT, min_size=1024, seed=6)
    restored = flax.serialization.from_bytes(other.init(params), saved)
    assert_trees_equal(restored, state)
    assert_trees_equal(run(other, 2, params, restored, 2), run(optimizer, 2, params, state, 2))
    assert_trees_equal(run(optimizer, 4), run(optimizer, 2, params, state, 2))


def test_orbax_restores_the_same_state(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    _, state = run(quantized_moments(optax.adamw(1e-2), FMT, min_size=1024), 1)
    with checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        saver.wait_until_finished()
        restored = saver.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, state))
    assert_trees_equal(restored, state)


def test_noise_hangs_on_seed_and_step_and_moment():
    def codes(seed, steps=1):
        optimizer = quantized_moments(optax.adam(1e-3, b1=0.0), FMT, min_size=256, seed=seed)
        params = {"a": normal(32, 64), "b": normal(32, 64)}
        state = optimizer.init(params)
        for _ in range(steps):
            grads = jax.tree.map(jnp.ones_like, params) | {"a": normal(32, 64, seed=9), "b": normal(32, 64, seed=9)}
            _, state = optimizer.update(grads, state, params)
        return state.inner_state[0].mu

    one = codes(0)
    assert_trees_equal(one, codes(0))
    assert_trees_equal(one, codes(jax.random.key(0)))
    differ = lambda x, y: float((x.values.unpacked_codes() != y.values.unpacked_codes()).mean())  # noqa: E731
    assert differ(one["a"], codes(1)["a"]) > 0.1
    assert differ(one["a"], one["b"]) > 0.1
    assert differ(one["a"], codes(0, 2)["a"]) > 0.1  # b1 = 0: the same moment at another step


def test_jitted_and_eager_steps_are_alike():
    optimizer = quantized_moments(optax.sgd(0.5, momentum=0.5), FMT, min_size=256)
    params = parameters()
    state = optimizer.init(params)
    assert_trees_equal(
        optimizer.update(gradients(0, params), state), jax.jit(optimizer.update)(gradients(0, params), state)
    )
    assert_trees_equal(jax.jit(optimizer.init)(params), state)


@pytest.mark.slow
def test_states_can_be_donated():
    key = jax.random.key(7)
    optimizer = quantized_moments(optax.adamw(1e-2), FMT, min_size=1024, seed=key)
    params, (_, expected) = parameters(), run(optimizer, 2)
    step = jax.jit(lambda grads, state, params: optimizer.update(grads, state, params), donate_argnums=1)
    state, start = optimizer.init(params), optimizer.init(params)
    old = state.inner_state[0].mu["kernel"].values.codes
    for i in range(2):
        updates, state = step(gradients(i, params), state, params)
        params = optax.apply_updates(params, updates)
    assert old.is_deleted()
    assert_trees_equal(state, expected)
    assert not key.is_deleted() and not start.key.is_deleted()


def test_masked_parameters_have_no_moments():
    params = parameters() | {"packed": ifjax.quantize(normal(32, 64), "if4")}
    mask = ifjax.trainable_mask(params)
    optimizer = optax.masked(quantized_moments(optax.adamw(1e-3), FMT, min_size=1024), mask)
    state = optimizer.init(params)
    grads = gradients(0, {k: v for k, v in params.items() if k != "packed"}) | {"packed": params["packed"]}
    _, state = optimizer.update(grads, state, params)
    assert isinstance(state.inner_state.inner_state[0].mu["packed"], optax.MaskedNode)
    assert kinds(state.inner_state.inner_state[0].nu).count("PackedRoot") == 1
    inside = quantized_moments(optax.masked(optax.adamw(1e-3), mask), FMT, min_size=1024)
    _, state = inside.update(grads, inside.init(params), params)
    assert kinds(state.inner_state).count("PackedRoot") == 1


def test_partitions_each_have_their_own():
    labels = {"kernel": "packed", "bias": "plain", "scale": "plain"}
    each = {"packed": quantized_moments(optax.adam(1e-2), FMT, min_size=256), "plain": optax.sgd(1e-2)}
    params, state = run(optax.partition(each, labels), 2)
    assert kinds(state).count("PackedRoot") == 1
    around = quantized_moments(optax.partition({"packed": optax.adam(1e-2), "plain": optax.sgd(1e-2)}, labels), FMT)
    assert kinds(around.init({**params, "kernel": normal(64, 64)})).count("PackedRoot") == 1


@pytest.mark.slow
def test_multi_steps_and_injected_settings_go_around():
    optimizer = optax.MultiSteps(quantized_moments(optax.adamw(1e-2), FMT, min_size=1024), every_k_schedule=2)
    params = parameters()
    state = optimizer.init(params)
    seen, update = [], jax.jit(optimizer.update)
    for i in range(4):
        updates, state = update(gradients(i, params), state, params)
        seen.append((bool((updates["kernel"] != 0).any()), int(state.inner_opt_state.count)))
    assert seen == [(False, 0), (True, 1), (False, 1), (True, 2)]

    injected = optax.inject_hyperparams(lambda rate: quantized_moments(optax.adam(rate), FMT, min_size=1024))(rate=1e-2)
    assert_trees_equal(run(injected, 2)[0], run(quantized_moments(optax.adam(1e-2), FMT, min_size=1024), 2)[0])


def test_extra_arguments_reach_the_inner_update():
    inner = optax.GradientTransformationExtraArgs(
        optax.trace(0.5).init, lambda g, state, params=None, *, factor: (jax.tree.map(lambda x: x * factor, g), state)
    )
    optimizer = quantized_moments(inner, FMT, min_size=1)
    updates, _ = optimizer.update(jnp.ones((4, 16)), optimizer.init(jnp.ones((4, 16))), factor=3.0)
    assert (updates == 3).all()


@pytest.mark.slow
def test_moments_are_sharded_like_their_parameters():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P("a", "b"))
    whole = {"w": normal(64, 128)}
    params = jax.device_put(whole, sharding)
    optimizer = quantized_moments(optax.adamw(1e-2), FMT)
    state = optimizer.init(params)

    def check(state):
        for moment in (state.inner_state[0].mu["w"].values, state.inner_state[0].nu["w"].values):
            assert {s.data.shape for s in moment.codes.addressable_shards} == {(16, 32)}
            assert {s.data.shape for s in moment.scales.addressable_shards} == {(16, 4)}

    check(state)
    update = jax.jit(optimizer.update)
    grads = gradients(0, params)
    updates, state = update(jax.device_put(grads, sharding), state, params)
    check(state)
    compiled = update.lower(jax.device_put(grads, sharding), state, params).compile().as_text()
    assert "all-gather" not in compiled and "all-to-all" not in compiled
    alone, alone_state = jax.jit(optimizer.update)(grads, optimizer.init(whole), whole)
    assert_trees_equal(state, alone_state)
    assert_trees_equal(updates, alone)

    # The way that optax has for states: specs of the parameters, put where the moments are.
    def specs(moment, spec):
        return jax.tree.map(lambda _: spec, moment) if not is_packed(moment) else type(moment)(
            ifjax.shardings(moment.values, spec)
        )  # fmt: skip

    placed = optax.tree_map_params(
        optimizer, specs, state, {"w": sharding}, is_leaf=is_packed,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )  # fmt: skip
    check(jax.device_put(state, placed))


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, error, says",
    [
        (lambda: quantized_moments(optax.adam(1e-3), "if5"), ValueError, "unknown format 'if5'; did you mean"),
        (lambda: quantized_moments(optax.adam(1e-3), second_fmt="if5"), ValueError, "unknown format 'if5'"),
        (lambda: quantized_moments(optax.adam, "if6"), TypeError, "must be an optax.GradientTransformation"),
        (
            lambda: quantized_moments(optax.adam(1e-3), FMT, min_size=0),
            ValueError,
            "min_size must be a positive integer",
        ),
        (lambda: quantized_moments(optax.adam(1e-3), FMT, seed=1.5), TypeError, "seed must be an integer or a key"),
        (lambda: quantized_moments(optax.adam(1e-3), FMT, seed=jnp.zeros(2, jnp.uint32)), TypeError, "seed must be"),
        (lambda: quantized_moments(optax.adam(1e-3), second="nu"), TypeError, r"second must be .* write \('nu',\)"),
        (lambda: quantized_moments(optax.adam(1e-3), FMT, keep="nu"), TypeError, "keep must be a collection"),
        (lambda: quantized_moments(optax.sgd(1e-3)).init(parameters()), ValueError, "keeps no float arrays"),
        (lambda: quantized_moments(optax.adam(1e-3)).init(parameters()), ValueError, "largest moment has 2048 values"),
        (lambda: dequantize_moments(optax.adam(1e-3).init(parameters())), TypeError, "state of quantized_moments"),
    ],
)
def test_errors_say_what_to_do(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_without_parameters_there_is_nothing_to_refuse():
    state = quantized_moments(optax.adam(1e-3)).init({"w": optax.MaskedNode()})
    assert isinstance(state, QuantizedMomentsState)
