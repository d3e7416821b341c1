"""Quantized training steps on meshes: the losses of one device, and nothing more on the move than without quantization.

On eight devices of one process, and on two processes with four each.
"""

import collections
import functools
import json
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ifjax
from ifjax import Rule

WIDTH, HIDDEN, STEPS = 128, 256, 3


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(WIDTH, name="down")(nn.relu(nn.Dense(HIDDEN, name="up")(x))), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True, "quantize": True}, length=2)
        return layers(name="layers")(x, None)[0]


MODEL = Model()
# Where tokens and the two kernels [layer, in, out] lie. There are more tokens than features, so that sums of gradients
# are cheaper to move than activations.
PLACEMENTS = {
    "data x tensor": ((4, 2), ("data", "tensor"), P("data"), P(None, None, "tensor"), P(None, "tensor")),
    "fsdp": ((8,), ("data",), P("data"), P(None, "data"), P(None, "data")),
}


def batch(i):
    return jax.random.normal(jax.random.key(10 + i), (8, 128, WIDTH))


def initial():
    return MODEL.init(jax.random.key(0), batch(0))["params"]


def step(recipe, params, x, key):
    """(new parameters, loss before)"""
    apply = ifjax.quantized(MODEL.apply, Rule(".*", recipe=recipe)) if recipe != "bf16" else MODEL.apply

    def loss(params):
        return ((apply({"params": params}, x, rngs={"quantize": key}) - jnp.roll(x, 1, -1)) ** 2).mean()

    value, grads = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value


def placed(placement, params=None):
    """Parameters (the first, unless given), batches and keys on the mesh; and the shardings of what a step gives."""
    shape, axes, tokens, up, down = PLACEMENTS[placement]
    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))

    def spec(path, _):
        names = [entry.key for entry in path]
        return NamedSharding(mesh, {"up": up, "down": down}[names[1]] if names[2] == "kernel" else P())

    def put(a, sharding):  # from each process its own part
        a = np.asarray(a)
        return jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])

    params = initial() if params is None else params
    shardings = jax.tree_util.tree_map_with_path(spec, params)
    batches = [put(batch(i), NamedSharding(mesh, tokens)) for i in range(STEPS)]
    return jax.tree.map(put, params, shardings), batches, (shardings, NamedSharding(mesh, P()))


def losses(program, params, batches):
    found = []
    for i, x in enumerate(batches):
        params, value = program(params, x, jax.random.fold_in(jax.random.key(5), i))
        found.append(float(value))
    return found


@functools.cache
def of_one_device(recipe):
    return losses(jax.jit(functools.partial(step, recipe)), initial(), [batch(i) for i in range(STEPS)])


@functools.cache
def compiled(recipe, placement):
    params, batches, shardings = placed(placement)
    program = jax.jit(functools.partial(step, recipe), out_shardings=shardings)
    return program.lower(params, batches[0], jax.random.key(0)).compile()


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe, placement",
    [("if4", "fsdp"), ("quartet2", "data x tensor")],
)
def test_eight_devices_train_as_one(recipe, placement):
    """Each step begins where one device ended the last: sums in another order seldom move a code, whose trace grows."""
    one, params = jax.jit(functools.partial(step, recipe)), initial()
    for i in range(STEPS):
        key = jax.random.fold_in(jax.random.key(5), i)
        shared, batches, _ = placed(placement, params)
        found, loss = compiled(recipe, placement)(shared, batches[i], key)
        updated, wanted = one(params, batch(i), key)
        np.testing.assert_allclose(loss, wanted, rtol=1e-5)
        moves, apart = (
            jnp.concatenate([(a - b).ravel() for a, b in zip(*map(jax.tree.leaves, (to, fro)), strict=True)])
            for to, fro in ((updated, params), (jax.device_get(found), updated))
        )
        assert jnp.linalg.norm(apart) < 0.01 * jnp.linalg.norm(moves)
        params = updated


def collected(compiled):
    """How often a program collects arrays of a type and shape from other devices, sums aside."""
    found = r"= \(?(\w+\[[\d,]*\])\S* (all-gather|all-to-all|collective-permute)(?:-start)?\("
    return collections.Counter(re.findall(found, compiled.as_text()))


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["data x tensor", "fsdp"])
def test_nothing_more_is_gathered_than_without_quantization(placement):
    plain, quantized = (collected(compiled(recipe, placement)) for recipe in ("bf16", "nvfp4"))
    assert plain.total() >= (placement == "fsdp") * 4  # or nothing was looked for
    assert not quantized - plain


def work(address, process):
    """One of two processes. What one device finds is computed here too: pytest's process compiles otherwise."""
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=process)
    found = {"one device": of_one_device("nvfp4")}
    for placement in PLACEMENTS:
        params, batches, shardings = placed(placement)
        found[placement] = losses(jax.jit(functools.partial(step, "nvfp4"), out_shardings=shardings), params, batches)
    print(json.dumps(found))


@pytest.mark.slow
def test_two_processes_train_as_one(two_processes):
    code = f"import {Path(__file__).stem} as test; import sys; test.work(sys.argv[1], int(sys.argv[2]))"
    for out in two_processes(code, timeout=900):
        found = json.loads(out.splitlines()[-1])
        for placement in PLACEMENTS:
            np.testing.assert_allclose(found[placement], found["one device"], rtol=1e-5, err_msg=placement)
