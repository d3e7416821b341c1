"""Checkpoints of other names straight into models: renamed, turned, stacked, quantized, each device its part."""

import json
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

import ifjax
from ifjax import NameRule, Rule
from ifjax.files import FileError

ROOT = Path(__file__).parents[2]
LAYERS, EXPERTS, IN, WIDE, HEADS = 2, 3, 64, 96, 4
RNG = np.random.default_rng(0)


def normal(*shape, dtype=ml_dtypes.bfloat16):
    return RNG.standard_normal(shape, np.float32).astype(dtype)


def llama(layers=LAYERS):
    """As transformers stores one: weights are [out, in]; with experts in one half of the layer."""
    tensors = {"model.embed_tokens.weight": normal(16, IN), "model.norm.weight": normal(IN)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        tensors |= {f"{layer}self_attn.{p}_proj.weight": normal(IN, IN) for p in "qkvo"}
        tensors |= {f"{layer}mlp.{p}_proj.weight": normal(WIDE, IN) for p in ("gate", "up")}
        tensors |= {f"{layer}mlp.down_proj.weight": normal(IN, WIDE), f"{layer}input_layernorm.weight": normal(IN)}
        tensors |= {f"{layer}mlp.experts.{e}.w1.weight": normal(WIDE, IN) for e in range(EXPERTS)}
        tensors |= {f"{layer}self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    return tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two shards, their index, a configuration."""
    path, tensors = tmp_path_factory.mktemp("llama"), llama()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: a for name, a in tensors.items() if files[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (path / "config.json").write_text("{}")
    return path, tensors


def names_of(layer, path, stack=()):
    """Rules for a model whose layers are under `path`: "layers/\\1" or, stacked, "layers"."""
    return [
        NameRule(r"model\.embed_tokens\.weight", ("embed/embedding", "head/kernel_t")),
        NameRule(r"model\.norm\.weight", "norm/scale"),
        NameRule(layer + r"self_attn\.([qkv])_proj\.weight", path + r"/attn/\2/kernel", transpose=True, reshape=True,
                 stack=stack),
        NameRule(layer + r"self_attn\.o_proj\.weight", path + "/attn/o/kernel", transpose=True, stack=stack),
        NameRule(layer + r"mlp\.(gate|up|down)_proj\.weight", path + r"/mlp/\2/kernel", transpose=True, stack=stack),
        NameRule(layer + r"mlp\.experts\.(\d+)\.w1\.weight", path + "/experts", transpose=True, stack=(*stack, 2)),
        NameRule(layer + r"input_layernorm\.weight", path + "/norm/scale", stack=stack),
        NameRule(r".*\.inv_freq", None),
    ]  # fmt: skip


LAYER = r"model\.layers\.(\d+)\."
ALONE, STACKED = names_of(LAYER, r"layers/\1"), names_of(LAYER, "layers", (1,))


def floats(tensors, dtype=np.float32):
    """The parameters of a model whose layers are stacked, by hand."""

    def of(name, turn=True):
        many = [np.asarray(tensors[f"model.layers.{i}.{name}"], dtype) for i in range(LAYERS)]
        return np.stack([a.T if turn else a for a in many])

    qkv = {p: {"kernel": of(f"self_attn.{p}_proj.weight").reshape(LAYERS, IN, HEADS, -1)} for p in "qkv"}
    embedding = np.asarray(tensors["model.embed_tokens.weight"], dtype)
    return {
        "embed": {"embedding": embedding}, "head": {"kernel_t": embedding},
        "norm": {"scale": np.asarray(tensors["model.norm.weight"], dtype)},
        "layers": {
            "attn": qkv | {"o": {"kernel": of("self_attn.o_proj.weight")}},
            "mlp": {p: {"kernel": of(f"mlp.{p}_proj.weight")} for p in ("gate", "up", "down")},
            "experts": np.stack([of(f"mlp.experts.{e}.w1.weight") for e in range(EXPERTS)], 1),
            "norm": {"scale": of("input_layernorm.weight", False)},
        },
    }  # fmt: skip


def assert_same(found, expected):
    for (keys, a), (others, b) in zip(*(jax.tree_util.tree_leaves_with_path(t) for t in (found, expected)),
                                      strict=True):  # fmt: skip
        assert keys == others and a.dtype == b.dtype, (keys, others)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(keys))


def quantized(tree, fmt="if4", axis=-2):
    """What rules make of it: every matrix of a stack has its own amax."""
    def packed(path, x):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        if "attn" not in path and "mlp" not in path and "experts" not in path:
            return x
        lead = 2 if "experts" in path else 1
        at = lead - np.ndim(x) if "attn/q" in path or "attn/k" in path or "attn/v" in path else axis
        return ifjax.quantize(x, fmt, axis=at, amax_axes=range(lead) if ifjax.get_format(fmt).has_tensor_scale else ())

    return jax.tree_util.tree_map_with_path(packed, tree)


def abstract(tree):
    return jax.eval_shape(lambda: tree)


def sharded(tree, place):
    """The abstract tree with a sharding for each array: that of `place` from a path and a rank."""
    def one(keys, x):
        spec = place(jax.tree_util.keystr(keys, simple=True, separator="/"), x)
        if isinstance(x, ifjax.QTensor):
            return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), x,
                                ifjax.shardings(x, spec))  # fmt: skip
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec)

    return jax.tree_util.tree_map_with_path(one, abstract(tree), is_leaf=lambda x: isinstance(x, ifjax.QTensor))


SLOW = pytest.mark.slow


@pytest.mark.by_default("mxfp4")
@pytest.mark.parametrize("fmt", ["if4", "mxfp4", *(pytest.param(f, marks=SLOW) for f in ("nvfp4", "if3", "if6"))])
def test_what_is_quantized_on_the_way_in_has_the_bytes_of_quantize(fmt, folder):
    path, tensors = folder
    expected = quantized(floats(tensors), fmt)
    assert_same(ifjax.load_file(path, like=abstract(expected), names=STACKED), expected)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_floats_become_of_the_trees_dtype(dtype, folder):
    path, tensors = folder
    expected = floats(tensors, dtype)
    assert_same(ifjax.load_file(path, like=abstract(expected), names=STACKED), expected)


SPECS = {  # of the last axes of kernels [.., in, out]; 8 devices as 2 x 4
    "out": (None, ("a", "b")), "in": ("a", None), "both": ("a", "b"), "layers": ("a",), "one": (),
}  # fmt: skip


@pytest.mark.by_default("both", "one")
@pytest.mark.parametrize("how", SPECS)
def test_each_device_gets_its_part(how, folder):
    path, tensors = folder
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    expected = quantized(floats(tensors))

    def place(name, x):
        spec = SPECS[how]
        if how == "layers":
            spec = spec if name.startswith("layers") else ()
        elif not name.startswith("layers/mlp"):
            spec = ()
        else:
            spec = (*[None] * (x.ndim - len(spec)), *spec)
        return NamedSharding(mesh, PartitionSpec(*spec))

    like = sharded(expected, place)
    loaded = ifjax.load_file(path, like=like, names=STACKED)
    assert_same(loaded, expected)
    jax.tree.map(lambda a, s: np.testing.assert_equal(a.sharding.is_equivalent_to(s.sharding, a.ndim), True),
                 loaded, like)  # fmt: skip


def test_parts_that_cut_blocks_are_cut_of_whole_ones(folder):
    """Shardings that no rule of ours made: 96 rows of codes in 8 parts, 6 blocks of scales in 2."""
    path, tensors = folder
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec(None, "a"))
    expected = quantized(floats(tensors))
    like = abstract(expected)
    down = like["layers"]["mlp"]["down"]["kernel"]
    assert down.codes.shape == (LAYERS, WIDE // 2, IN) and WIDE // 16 % 8
    like["layers"]["mlp"]["down"]["kernel"] = down.replaced(
        codes=jax.ShapeDtypeStruct(down.codes.shape, np.uint8, sharding=rows))  # fmt: skip
    assert_same(ifjax.load_file(path, like=like, names=STACKED), expected)


def test_nothing_is_read_twice_more_than_needed_and_no_float_stack_is_made(folder, monkeypatch):
    """Each matrix is read once for its amax and once to be encoded; no part is longer than a device's."""
    from ifjax.files import placed

    path, tensors = folder
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    expected = quantized(floats(tensors))["layers"]["mlp"]
    place = lambda name, x: NamedSharding(mesh, PartitionSpec(None, None, "a"))  # noqa: E731
    like = {"layers": {"mlp": sharded(expected, place)}}
    read, parts = placed._Stack.read, []

    def counted(self, index):
        x = read(self, index)
        parts.append(x.size)
        return x

    monkeypatch.setattr(placed._Stack, "read", counted)
    rules = [rule for rule in STACKED if rule.path and "mlp" in rule.path]
    loaded = ifjax.load_file(path, like=like, names=[*rules, NameRule(".*", None)])
    assert_same(loaded["layers"]["mlp"], expected)
    whole = sum(a.size for name, a in tensors.items() if "mlp" in name and "experts" not in name)
    assert sum(parts) == 2 * whole and max(parts) == IN * WIDE // 8


# --- models ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(use_bias=False, name="norm")(x)
        q, k, v = (nn.DenseGeneral((HEADS, IN // HEADS), use_bias=False, name=p)(y) for p in "qkv")
        y = nn.dot_product_attention(q, k, v).reshape(*x.shape)
        x = x + nn.Dense(IN, use_bias=False, name="o")(y)
        gate, up = (nn.Dense(WIDE, use_bias=False, name=p)(x) for p in ("gate", "up"))
        return x + nn.Dense(IN, use_bias=False, name="down")(nn.silu(gate) * up), None


class Linen(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(16, IN, name="embed")(tokens)
        layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        x, _ = layers(name="layers")(x)
        return nn.LayerNorm(use_bias=False, name="norm")(x)


OTHERS = [NameRule(r".*\.(experts|rotary_emb)\..*", None)]
LINEN = [
    *OTHERS, NameRule(r"model\.embed_tokens\.weight", "params/embed/embedding"),
    NameRule(r"model\.norm\.weight", "params/norm/scale"),
    NameRule(LAYER + r"input_layernorm\.weight", "params/layers/norm/scale", stack=(1,)),
    NameRule(LAYER + r"\w+\.(\w+)_proj\.weight", r"params/layers/\2/kernel", transpose=True, reshape=True, stack=(1,)),
]  # fmt: skip


@pytest.mark.slow
def test_a_linen_model_of_scanned_layers(folder):
    path, _ = folder
    model, tokens = Linen(), jnp.arange(8)[None] % 16
    like = jax.eval_shape(model.init, jax.random.key(0), tokens)
    params = ifjax.load_file(path, like=like, names=LINEN)
    rules = [Rule(".*embed.*", None, optional=True), Rule(".*", "if4")]
    quantize = lambda p: ifjax.quantize_params(p, rules, model=model, sample=tokens)[0]  # noqa: E731
    expected = quantize(params)
    loaded = ifjax.load_file(path, like=jax.eval_shape(quantize, like), names=LINEN)
    assert_same(loaded, expected)
    packed = [x for x in jax.tree.leaves(loaded, is_leaf=lambda x: isinstance(x, ifjax.QTensor))
              if isinstance(x, ifjax.QTensor)]  # fmt: skip
    assert len(packed) == 7 and all(q.amax.shape == (LAYERS,) for q in packed)
    np.testing.assert_array_equal(model.apply(loaded, tokens), model.apply(expected, tokens))


class NnxLayer(nnx.Module):
    def __init__(self, rngs):
        self.up, self.gate = (nnx.Linear(IN, WIDE, use_bias=False, rngs=rngs) for _ in range(2))
        self.down = nnx.Linear(WIDE, IN, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.silu(self.gate(x)) * self.up(x))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([NnxLayer(rngs) for _ in range(LAYERS)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


NNX = [NameRule(LAYER + r"mlp\.(gate|up|down)_proj\.weight", r"layers/\1/\2/kernel", transpose=True),
       NameRule(".*", None)]  # fmt: skip


@pytest.mark.slow
def test_an_nnx_model_on_eight_devices(folder):
    path, tensors = folder
    mesh = jax.make_mesh((8,), ("out",), axis_types=(jax.sharding.AxisType.Auto,))
    graph, state = nnx.split(nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0))))
    out = NamedSharding(mesh, PartitionSpec(None, "out"))
    state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=out), state)
    params = ifjax.load_file(path, like=state, names=NNX)
    kernel = params["layers"][0]["up"]["kernel"].get_value()
    np.testing.assert_array_equal(kernel, tensors["model.layers.0.mlp.up_proj.weight"].T)
    assert kernel.sharding == out
    rules = Rule(".*", "if4", axis=-2)
    expected = ifjax.quantize_params(params, rules)[0]
    like = jax.eval_shape(lambda s: ifjax.quantize_params(s, rules)[0], state)
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(
        a.shape, a.dtype, sharding=out if a.ndim else NamedSharding(mesh, PartitionSpec())), like)  # fmt: skip
    loaded = ifjax.load_file(path, like=like, names=NNX)
    assert_same(loaded, expected)
    assert isinstance(loaded["layers"][1]["down"]["kernel"], ifjax.PackedParam)
    x = jnp.asarray(normal(3, IN, dtype=np.float32))
    np.testing.assert_array_equal(nnx.merge(graph, loaded)(x), nnx.merge(graph, expected)(x))


# --- what the checkpoint holds packed --------------------------------------------------------------------------------


@pytest.mark.by_default("mxfp4")
@pytest.mark.parametrize("fmt", ["if4", "mxfp4"])
def test_packed_tensors_are_renamed_turned_and_stacked_as_bytes(fmt, tmp_path):
    theirs = {f"layers.{i}.up.weight": ifjax.quantize(normal(WIDE, IN, dtype=np.float32), fmt) for i in range(LAYERS)}
    path = ifjax.save_file(theirs, tmp_path / "m.safetensors")
    rule = NameRule(r"layers\.(\d+)\.up\.weight", "up", transpose=True, stack=(1,))
    values = np.stack([np.asarray(q.dequantize()).T for q in theirs.values()])
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    columns = NamedSharding(mesh, PartitionSpec(None, None, "a"))
    dense = jax.ShapeDtypeStruct((LAYERS, IN, WIDE), np.float32, sharding=columns)
    axes = range(1) if ifjax.get_format(fmt).has_tensor_scale else ()
    packed = abstract(ifjax.quantize(values, fmt, axis=-2, amax_axes=axes))
    for like in (dense, packed):
        q = ifjax.load_file(path, like={"up": like}, names=[rule])["up"]
        assert (q.axis, q.shape) == (-2, (LAYERS, IN, WIDE))
        np.testing.assert_array_equal(q.dequantize(), values)
    assert ifjax.load_file(path, like={"up": dense}, names=rule)["up"].codes.sharding.is_equivalent_to(columns, 3)
    with pytest.raises(ValueError, match=r"has fmt nvfp4, and 'layers\.0\.up\.weight' is packed with fmt"):
        ifjax.load_file(path, like={"up": abstract(ifjax.quantize(values, "nvfp4", axis=-2))}, names=[rule])
    with pytest.raises(ValueError, match=r"tears or joins blocks of (16|32) along axis -1 of the packed 'la"):
        wide = jax.ShapeDtypeStruct((LAYERS, IN, 3, WIDE // 3), np.float32)
        ifjax.load_file(path, like={"up": wide}, names=[NameRule(rule.name, "up", stack=(1,), reshape=True)])


@pytest.mark.slow
@pytest.mark.parametrize("axis", [pytest.param(-1, marks=SLOW), -2])
def test_squares_come_in_as_well(axis, tmp_path):
    x = normal(40, 72, dtype=np.float32)
    save_file({"w": x}, tmp_path / "m.safetensors")
    expected = ifjax.quantize(x, "if4", axis=axis, block_2d=True)
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for names in ((), (None, "b"), ("a",)):
        like = abstract(expected)
        spec = NamedSharding(mesh, PartitionSpec(*names))
        fits = all(n % 8 == 0 for n in (*like.codes.shape, *like.scales.shape))
        if names and not fits:
            like = like.replaced(codes=jax.ShapeDtypeStruct(like.codes.shape, np.uint8, sharding=spec))
        assert_same(ifjax.load_file(tmp_path, like={"w": like}, names=[NameRule("w", "w")])["w"], expected)


# --- what is refused -------------------------------------------------------------------------------------------------

TREE = {"up": {"kernel": jax.ShapeDtypeStruct((2, IN, WIDE), np.float32)}}
GOOD = NameRule(r"l\.(\d)\.w", "up/kernel", transpose=True, stack=(1,))
FILE = {"l.0.w": np.zeros((WIDE, IN), np.float32), "l.1.w": np.zeros((WIDE, IN), np.float32)}
Q = jax.eval_shape(lambda: ifjax.quantize(jnp.zeros((2, IN, WIDE)), axis=-2, amax_axes=(0,)))
REFUSED = {
    "no rule": (FILE | {"x": np.zeros(3)}, TREE, [GOOD], r"'x' of the checkpoint is matched by no rule: Name"),
    "not in the tree": (FILE, TREE, [NameRule(".*", "down")], "'l.0.w' goes to 'down', which is not in the tree"),
    "no tensor": (FILE, TREE | {"b": TREE["up"]["kernel"]}, [GOOD], "'b' of the tree gets no tensor"),
    "two tensors": (FILE, TREE, [NameRule(".*", "up/kernel")], "gets 'l.1.w' and 'l.0.w': stack= tells which is which"),
    "two rules": (FILE, TREE, [NameRule(r"l\.(0)\.w", "up/kernel", stack=(1,)), GOOD], "gets tensors by two rules"),
    "a gap": ({"l.0.w": FILE["l.0.w"], "l.2.w": FILE["l.1.w"]}, TREE, [GOOD], r"of 3 tensors, and number \(1,\) is"),
    "no number": (FILE, TREE, [NameRule(r"(l)\.\d\.w", "up/kernel", stack=(1,))], r"counts by groups \(1,\).*\['l'\]"),
    "a shape": (FILE, TREE, [NameRule(GOOD.name, "up/kernel", stack=(1,))], r"gives \(2, 96, 64\): reshape=True lays"),
    "another size": (FILE, {"up": {"kernel": jax.ShapeDtypeStruct((2, 8), np.float32)}}, [GOOD],
                     r"has the shape \(2, 8\), and 'l.0.w' gives \(2, 64, 96\)$"),
    "another size reshaped": (
        FILE, {"up": {"kernel": jax.ShapeDtypeStruct((2, 8), np.float32)}},
        [NameRule(GOOD.name, "up/kernel", stack=(1,), reshape=True)], "that is no other shape of it"),
    "joined": (FILE, {"up": {"kernel": jax.ShapeDtypeStruct((2, IN * WIDE), np.float32)}},
               [NameRule(GOOD.name, "up/kernel", transpose=True, stack=(1,), reshape=True)], "joins axes of the trans"),
    "vectors": ({"b": np.zeros(3, np.float32)}, {"b": jax.ShapeDtypeStruct((3,), np.float32)},
                [NameRule("b", "b", transpose=True)], r"is to be transposed, and 'b' has shape \(3,\)"),
    "not alike": (FILE | {"l.1.w": np.zeros((WIDE, IN), np.float16)}, TREE, [GOOD], "tensors that are not alike"),
    "integers": ({"n": np.zeros(3, np.int32)}, {"n": jax.ShapeDtypeStruct((3,), np.float32)}, [NameRule("n", "n")],
                 "is float32, and 'n' is int32"),
    "codes": ({"l.0.w": np.zeros((WIDE, IN), ml_dtypes.float8_e4m3fn)}, {"up": {"kernel": jax.eval_shape(
        lambda: ifjax.quantize(jnp.zeros((1, IN, WIDE)), axis=-2))}}, [GOOD], "is F8_E4M3: decode it first, by `ifjax"),
    "drawn": (FILE, {"up": {"kernel": Q.replaced(headroom=16 / 17)}}, [GOOD], "was rounded stochastically in the tree"),
    "amax": (FILE, {"up": {"kernel": Q.replaced(amax=jax.ShapeDtypeStruct((2, 1, WIDE), np.float32))}}, [GOOD],
             "beyond axis -2 of its blocks: load floats, and quantize"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_said(case, tmp_path):
    arrays, like, names, message = REFUSED[case]
    ifjax_file = tmp_path / "m.safetensors"
    from ifjax.files import safetensors as files

    slots = [files.Slot(n, files.CODES[a.dtype.name], a.shape) for n, a in arrays.items()]
    with files.safetensors_writer(ifjax_file, slots, lambda sums: {}) as write:
        for name, a in arrays.items():
            write(name, a)
    with pytest.raises(ValueError, match=message):
        ifjax.load_file(ifjax_file, like=like, names=names)


@pytest.mark.parametrize("make, message", [
    (lambda: NameRule("(", "a"), "is not a regular expression"),
    (lambda: NameRule("a", r"\1"), "does not fit it: invalid group reference"),
    (lambda: NameRule("a", r"b/\g<n>"), "does not fit it: unknown group name"),
    (lambda: NameRule(r"(\d)", "a", stack=(2,)), "stack must be of the groups 1 to 1, got"),
    (lambda: NameRule(r"(\d)", "a", stack=(0,)), "stack must be of the groups 1 to 1, got"),
])  # fmt: skip
def test_rules_check_themselves(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_other_arguments_are_checked(folder):
    with pytest.raises(ValueError, match="pass it as like="):
        ifjax.load_file(folder[0], names=STACKED)
    with pytest.raises(TypeError, match=r"names must be ifjax\.NameRule records, got str"):
        ifjax.load_file(folder[0], like=TREE, names=["a"])
    many = {f"x{i}": jax.ShapeDtypeStruct((1,), np.float32) for i in range(30)}
    with pytest.raises(ValueError, match="and 10 more"):
        ifjax.load_file(folder[0], like=many, names=NameRule(".*", None))


def test_a_file_that_is_damaged_or_changed_is_told(tmp_path):
    x = {"a": np.ones((4, 16), np.float32)}
    path, like = ifjax.save_file(x, tmp_path / "m.safetensors"), {"b": jax.ShapeDtypeStruct((4, 16), np.float32)}
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(FileError, match="is damaged"):
        ifjax.load_file(path, like=like, names=[NameRule("a", "b")])
    opened = ifjax.open_file(path)
    ifjax.save_file(x, path)
    with pytest.raises(FileError, match="changed since it was opened"):
        opened.mapped("a")


# --- memory ----------------------------------------------------------------------------------------------------------

MEMORY = """
import resource, sys
import jax, numpy as np
import ifjax

jax.config.update("jax_num_cpu_devices", 8)
from jax.sharding import NamedSharding, PartitionSpec

path, n, layers, kind = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
rule = lambda count: ifjax.NameRule(rf"l\\.([0-{count - 1}])\\.w", "w", transpose=True, stack=(1,))

def load(layers):
    like = jax.eval_shape(lambda: ifjax.quantize(jax.numpy.zeros((layers, n, n)), "nvfp4", axis=-2, amax_axes=(0,)))
    if kind == "floats":
        like = jax.ShapeDtypeStruct((layers, n, n), np.float32)
        place = NamedSharding(mesh, PartitionSpec(None, None, "a"))
    else:
        place = ifjax.shardings(like, NamedSharding(mesh, PartitionSpec(None, None, "a")))
    like = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), like, place)
    rest = ifjax.NameRule(".*", None)
    return jax.block_until_ready(ifjax.load_file(path, like={"w": like}, names=[rule(layers), rest]))

load(1)  # programs are compiled
before = peak()
loaded = load(layers)
print(peak() - before, sum(a.nbytes for a in jax.tree.leaves(loaded)))
"""


def test_no_float_copy_of_the_model_is_ever_in_memory(tmp_path):
    """Eight matrices of 8 MiB in bfloat16, 64 MiB of them, become 18 MiB: what is in memory beside is one matrix."""
    n, layers = 2048, 8
    save_file({f"l.{i}.w": normal(n, n) for i in range(layers)}, tmp_path / "m.safetensors")
    command = [sys.executable, "-c", MEMORY, str(tmp_path), str(n), str(layers), "packed"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    grown, packed = map(int, ran.stdout.split())
    assert packed == layers * (n * n // 2 + n * n // 16 + 4)
    # A float32 copy of the stack would take 128 MiB, one in bfloat16 64 MiB.
    assert grown < 2 * packed + 12 * 2**20, f"{grown / 2**20:.1f} MiB"


# --- several hosts ---------------------------------------------------------------------------------------------------

HOSTS = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
import tempfile, numpy as np, ifjax
from pathlib import Path
from safetensors.numpy import save_file
from jax.sharding import NamedSharding, PartitionSpec as P
from ifjax.files import placed

rng = np.random.default_rng(0)  # each host has the same file
w = [rng.standard_normal((64, 128), np.float32) * (1 + 9 * (i == 1)) for i in range(2)]
w[0][3, 5] = 50.0  # the amax lies with one host, and the other one has to know it
path = Path(tempfile.mkdtemp()) / "m.safetensors"
save_file({f"l.{i}.w": a for i, a in enumerate(w)}, path)
expected = ifjax.quantize(np.stack([a.T for a in w]), "nvfp4", axis=-2, amax_axes=(0,))
mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
read, sizes = placed._Stack.read, []

def counted(self, index):
    x = read(self, index)
    sizes.append(x.size)
    return x

placed._Stack.read = counted
for spec in (P(None, None, "a"), P(None, "a")):
    like = jax.eval_shape(lambda: expected)
    like = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), like,
                        ifjax.shardings(like, NamedSharding(mesh, spec)))
    sizes.clear()
    rule = ifjax.NameRule(r"l\\.(\\d)\\.w", "w", transpose=True, stack=(1,))
    q = ifjax.load_file(path, like={"w": like}, names=rule)["w"]
    for leaf, want in ((q.codes, expected.codes), (q.scales, expected.scales), (q.amax, expected.amax)):
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(want)[shard.index])
    assert sum(sizes) == 2 * 64 * 128 * 2 // 2, sizes  # its half, for the amax and for the codes
print("equal")
"""


@pytest.mark.slow
def test_each_host_reads_its_share(two_processes):
    for out in two_processes(HOSTS):
        assert out.strip().endswith("equal")
