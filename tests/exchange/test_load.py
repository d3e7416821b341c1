"""Checkpoints of other tools straight into models: the bytes of `import_tensors`, turned, split, stacked, sharded."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_load_names as models
from exchange_cases import F8, tensor
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from numpy.testing import assert_array_equal
from safetensors.numpy import save_file
from test_layouts import stack
from test_readers import needs

import ifjax
from ifjax import NameRule, exchange
from ifjax.models.leaves import value_of

RNG = np.random.default_rng(0)
LAYERS, ROWS, COLUMNS = 2, 16, 512  # columns: eight parts of whole blocks of any layout
SHAPE = ROWS, COLUMNS


def layers(make, name="layers.{}.up.weight"):
    return {name.format(i): make(i) for i in range(LAYERS)}


def matrices(fmt, **settings):
    return layers(lambda i: tensor(fmt, SHAPE, seed=i, **{"amax": 1.0 + i} | settings))


def experts(fmt, shape=(2, *SHAPE), **settings):
    return layers(lambda i: stack(fmt, shape, seed=i, **settings), "layers.{}.experts.up")


GGUF = functools.partial(pytest.param, marks=needs("gguf"))
CASES = [
    ("compressed-tensors", matrices("nvfp4")), ("compressed-tensors", matrices("mxfp4")),
    ("compressed-tensors", matrices("mixfp4")), ("modelopt", matrices("nvfp4")),
    ("modelopt", experts("nvfp4", amax=2.5)), ("gpt-oss", experts("mxfp4")), ("mlx", matrices("nvfp4", amax=2688.0)),
    ("mlx", layers(lambda i: stack("mxfp4", (2, *SHAPE), seed=i))), GGUF("gguf", matrices("nvfp4")),
    GGUF("gguf", layers(lambda i: stack("nvfp4", (2, *SHAPE), seed=i))), GGUF("gguf", matrices("mxfp4")),
]  # fmt: skip


def rule(transpose=True, **settings):
    return NameRule(r"layers\.(\d)\.\w+(\.\w+)?", "w", transpose=transpose, stack=(1,), **settings)


def like_of(q, spec=(), dtype="bfloat16"):
    """The abstract QTensor, sharded over eight devices."""
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    q = jax.eval_shape(lambda: q.replaced(dtype=np.dtype(dtype)))
    places = ifjax.shardings(q, NamedSharding(mesh, PartitionSpec(*spec)))
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), q, places)


def stacked(params, turned=True):
    """What `import_tensors` gives, turned and stacked by hand."""
    qs = [q.swapaxes(-1, -2) if turned else q for q in params.values()]
    amax = None if qs[0].amax is None else jnp.stack([q.amax for q in qs])
    codes, scales = (jnp.stack([getattr(q, name) for q in qs]) for name in ("codes", "scales"))
    return qs[0].replaced(codes=codes, scales=scales, amax=amax)


def assert_bytes(found, expected, dtype="bfloat16"):
    assert found.blocking == expected.replaced(dtype=np.dtype(dtype)).blocking and found.shape == expected.shape
    for part in ("codes", "scales", "amax"):
        a, b = getattr(found, part), getattr(expected, part)
        if b is not None:
            assert_array_equal(np.asarray(a), np.asarray(b).reshape(a.shape), err_msg=part)


@pytest.mark.parametrize("tool, params", CASES)
def test_each_device_gets_its_part_of_the_bytes(tool, params, tmp_path):
    exchange.save(params, tmp_path / "theirs", tool)
    for turned in (True, False):
        expected = stacked(exchange.load(tmp_path / "theirs"), turned)
        last = [None] * (expected.ndim - 1)
        for spec in ((), (*last, "a"), (*last[:-1], "a")):
            like = like_of(expected, spec)
            found = exchange.load(tmp_path / "theirs", like={"w": like}, names=[rule(turned)])["w"]
            assert_bytes(found, expected)
            assert found.codes.sharding.is_equivalent_to(like.codes.sharding, found.ndim)
    # A tree of floats, as a model's own parameters are, gets what is stored.
    dense = jax.ShapeDtypeStruct(expected.shape, "float16")
    assert_bytes(exchange.load(tmp_path / "theirs", like={"w": dense}, names=[rule(False)])["w"], expected, "float16")


@pytest.mark.parametrize("tool, params", CASES)
def test_no_more_is_read_than_devices_hold(tool, params, tmp_path, monkeypatch):
    """What goes through the layout's reader, apart from the first row of each tensor: the part that was asked for."""
    from ifjax.exchange import opened

    exchange.save(params, tmp_path / "theirs", tool)
    expected = stacked(exchange.load(tmp_path / "theirs"))
    stored, sizes = opened._Tensor.stored, []

    def counted(self, rows=None, units=None, batch=()):
        blocks = stored(self, rows, units, batch)
        if batch or not self.batch:
            sizes.append(blocks.codes.size)
        return blocks

    monkeypatch.setattr(opened._Tensor, "stored", counted)
    for spec in ((*[None] * (expected.ndim - 1), "a"), (*[None] * (expected.ndim - 2), "a")):
        like = like_of(expected, spec)
        sizes.clear()
        exchange.load(tmp_path / "theirs", like={"w": like}, names=[rule()])
        parts = [size for size in sizes if size > 512]
        assert not parts or max(parts) == expected.codes.size // LAYERS // 8
        assert sum(sizes) <= 2.5 * expected.codes.size  # once for codes, once for scales, rows that tell sizes


FP8 = {
    "blocks": ("weight_scale_inv", (2, 4)), "rows": ("weight_scale", (200, 1)), "one": ("weight_scale", (1,)),
}  # fmt: skip


@pytest.mark.parametrize("case", FP8)
def test_fp8_is_decoded_or_quantized_on_the_way(case, tmp_path):
    scale, shape = FP8[case]
    weights = [RNG.normal(size=(200, 512)).astype(F8) for _ in range(LAYERS)]
    scales = [RNG.random(shape, np.float32) for _ in range(LAYERS)]
    arrays = {f"layers.{i}.up.weight": w for i, w in enumerate(weights)}
    arrays |= {f"layers.{i}.up.{scale}": s for i, s in enumerate(scales)}
    save_file(arrays, tmp_path / "m.safetensors", {"quantization_config": json.dumps({"quant_method": "fp8"})})
    floats = np.stack([exchange.load(tmp_path, decode=True)[f"layers.{i}.up.weight"].T for i in range(LAYERS)])
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    for spec in ((), (None, "a"), (None, None, "a")):
        place = NamedSharding(mesh, PartitionSpec(*spec))
        like = jax.ShapeDtypeStruct(floats.shape, np.float32, sharding=place)
        found = exchange.load(tmp_path, like={"w": like}, names=[rule()], decode=True)["w"]
        assert_array_equal(found, floats)
    expected = ifjax.quantize(floats, "if4", axis=-2, amax_axes=(0,))
    found = exchange.load(tmp_path, like={"w": like_of(expected, (), "float32")}, names=[rule()], decode=True)["w"]
    assert_bytes(found, expected, "float32")
    kept = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()}
    for name, a in exchange.load(tmp_path, like=kept).items():
        assert np.asarray(a).tobytes() == arrays[name].tobytes()
    with pytest.raises(ValueError, match=r"'w' is to be quantized, and 'layers\.0\.up\.weight' is F8_E4M3: decode it"):
        rules = [rule(), NameRule(".*", None)]
        rules[0] = NameRule(r"layers\.(\d)\.up\.weight", "w", transpose=True, stack=(1,))
        exchange.load(tmp_path, like={"w": like_of(expected, (), "float32")}, names=rules)


# --- models


def fused_llama(folder):
    """The folder of a model whose query, key and value are one matrix, in two shards; and its tensors."""
    tensors, params = models.llama(), {}
    for name, a in tensors.items():
        if ".q_proj" in name:
            both = np.concatenate([np.asarray(tensors[name.replace("q_proj", f"{p}_proj")]) for p in "qkv"])
            params[name.replace("q_proj", "qkv_proj")] = ifjax.quantize(both, "nvfp4")
        elif any(word in name for word in ("o_proj", "gate_proj", "up_proj", "down_proj")):
            params[name] = ifjax.quantize(a, "nvfp4", amax=8.0)
        elif ".k_proj" not in name and ".v_proj" not in name:
            params[name] = a
    arrays, config = exchange.export_tensors(params, "compressed-tensors")
    folder.mkdir()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(arrays)}
    for file in set(files.values()):
        save_file({name: arrays[name] for name in arrays if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return params


@pytest.mark.slow
def test_a_linen_model_of_scanned_layers_with_a_fused_projection(tmp_path):
    params = fused_llama(tmp_path / "theirs")
    model, tokens = models.Linen(), jnp.arange(8)[None] % 16
    like = jax.eval_shape(model.init, jax.random.key(0), tokens)
    paths = tuple(f"params/layers/{p}/kernel" for p in "qkv")
    split = NameRule(models.LAYER + r"self_attn\.qkv_proj\.weight", paths, transpose=True, split=-1, reshape=True,
                     stack=(1,))  # fmt: skip
    loaded = exchange.load(tmp_path / "theirs", like=like, names=[split, *models.LINEN])
    packed = jax.tree.leaves(loaded, is_leaf=lambda x: isinstance(x, ifjax.QTensor))
    assert sum(isinstance(x, ifjax.QTensor) for x in packed) == 7
    layers, heads = loaded["params"]["layers"], models.HEADS
    for i in range(models.LAYERS):
        whole = params[f"model.layers.{i}.self_attn.qkv_proj.weight"].dequantize(jnp.float32)
        for part, p in zip(np.split(np.asarray(whole), 3), "qkv", strict=True):
            kernel = layers[p]["kernel"]
            assert (kernel.axis, kernel.dtype, kernel.shape[2]) == (-3, np.float32, heads)
            assert_array_equal(kernel.dequantize()[i], part.T.reshape(kernel.shape[1:]))
    floats = jax.tree.map(lambda x: x.dequantize() if isinstance(x, ifjax.QTensor) else x, loaded,
                          is_leaf=lambda x: isinstance(x, ifjax.QTensor))  # fmt: skip
    np.testing.assert_allclose(model.apply(loaded, tokens), model.apply(floats, tokens), rtol=1e-4, atol=1e-4)


def test_an_nnx_model_on_eight_devices(tmp_path):
    params = fused_llama(tmp_path / "theirs")
    mesh = jax.make_mesh((8,), ("out",), axis_types=(jax.sharding.AxisType.Auto,))
    _, state = nnx.split(nnx.eval_shape(lambda: models.NnxModel(nnx.Rngs(0))))
    out = NamedSharding(mesh, PartitionSpec(None, "out"))
    state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=out), state)
    loaded = exchange.load(tmp_path / "theirs", like=state, names=models.NNX)
    for i in range(models.LAYERS):
        kernel = loaded["layers"][i]["up"]["kernel"]
        assert isinstance(kernel, ifjax.PackedParam)
        q = value_of(kernel)
        assert q.codes.sharding.is_equivalent_to(out, 2)
        assert_array_equal(q.dequantize(), params[f"model.layers.{i}.mlp.up_proj.weight"].dequantize(jnp.float32).T)


MEMORY = """
import sys
import jax, numpy as np
import ifjax
from ifjax import exchange

jax.config.update("jax_num_cpu_devices", 8)
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

def peak():  # of this process, not of the one that made it
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024

path, n, layers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))

def load(layers):
    like = jax.eval_shape(lambda: ifjax.quantize(jax.numpy.zeros((layers, n, n)), "nvfp4", axis=-2, amax_axes=(0,)))
    place = ifjax.shardings(like, NamedSharding(mesh, PartitionSpec(None, None, "a")))
    like = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), like, place)
    rule = ifjax.NameRule(rf"l\\.([0-{layers - 1}])\\.weight", "w", transpose=True, stack=(1,))
    return jax.block_until_ready(exchange.load(path, like={"w": like}, names=[rule, ifjax.NameRule(".*", None)]))

load(1)
before = peak()
loaded = load(layers)
print(peak() - before, sum(a.nbytes for a in jax.tree.leaves(loaded)))
"""


@pytest.mark.parametrize("tool", ["modelopt", GGUF("gguf")])
def test_memory_holds_the_model_and_one_part(tool, tmp_path):
    """Eight matrices of 2.25 MiB: what is in memory beside them is little, and far from 64 MiB of bfloat16."""
    n, many = 2048, 8
    exchange.save({f"l.{i}.weight": tensor("nvfp4", (n, n)) for i in range(many)}, tmp_path / "theirs", tool)
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "theirs"), str(n), str(many)]
    ran = subprocess.run(command, cwd=models.ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    grown, packed = map(int, ran.stdout.split())
    assert packed == many * (n * n // 2 + n * n // 16 + 4)
    assert grown < packed + 12 * 2**20, f"{grown / 2**20:.1f} MiB"


HOSTS = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
import tempfile, numpy as np, ifjax
from jax.sharding import NamedSharding, PartitionSpec as P
from ifjax import exchange
from ifjax.exchange import opened

rng = np.random.default_rng(0)  # each host has the same file
qs = [ifjax.quantize(rng.standard_normal((64, 512), np.float32), "nvfp4") for _ in range(2)]
path = tempfile.mkdtemp() + "/theirs"
exchange.save({f"l.{i}.weight": q for i, q in enumerate(qs)}, path, "modelopt")
mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
read, sizes = opened._Part.__getitem__, []

def counted(self, box):
    x = read(self, box)
    sizes.append(x.size)
    return x

opened._Part.__getitem__ = counted
rule = ifjax.NameRule(r"l\\.(\\d)\\.weight", "w", transpose=True, stack=(1,))
for spec in (P(None, None, "a"), P(None, "a")):
    sizes.clear()
    like = jax.ShapeDtypeStruct((2, 512, 64), np.float32, sharding=NamedSharding(mesh, spec))
    found = exchange.load(path, like={"w": like}, names=rule)["w"]
    for name in ("codes", "scales"):
        want = np.stack([np.asarray(getattr(q, name)).T for q in qs])
        for shard in getattr(found, name).addressable_shards:
            np.testing.assert_array_equal(shard.data, want[shard.index])
    assert sum(sizes) == sum(q.codes.size + q.scales.size for q in qs) // 2, sizes  # its half
print("equal")
"""


@pytest.mark.slow
def test_each_host_reads_its_share(two_processes):
    for out in two_processes(HOSTS):
        assert out.strip().endswith("equal")
