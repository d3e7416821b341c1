"""The loss, time and memory of training a small language model in 4 bits.

    python benchmarks/train_lm.py [--recipes bf16 nvfp4 if4 ...] [--seeds 0 1 2] [--steps 500] [--out DIR]
    python benchmarks/train_lm.py --time 20 --recipes bf16 if4 --out DIR
    python benchmarks/train_lm.py --summary --out DIR

A decoder-only transformer (linen) is trained on the bytes of Python's standard library. A hash of its name assigns each
file to training or validation. The recipe quantizes all linear layers except those of the last block and the output
head. Embeddings, norms and attention's own products are in --dtype. The seed determines the initial parameters, the
order of the data and the noise. Recipes with the same seed share all three, so that gaps are computed seed by seed.

A run is a pure function of its settings, recipe and seed. Every --every steps a checkpoint is saved with all recorded
figures. If a run is killed and started again with the same arguments on the same machine, it continues and gives the
same losses, bit for bit (on GPUs with XLA_FLAGS="--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0", which
has not been tried). Finished runs are not repeated.

DIR receives a JSON file per run, curves of all runs (curves.png) and the checkpoints. --time times steps of all recipes
in turn, to compare their speed on a shared machine; the summary prefers these times to those of the runs. The defaults
(2.8 million parameters) suit two CPU cores. For a GPU, with 38 million parameters, use:

    --layers 12 --dim 512 --heads 8 --hidden 1408 --batch 64 --length 1024 --steps 5000 --rate 1e-3 --dtype bfloat16

--ngpt trains a normalized transformer instead (arXiv 2605.06067): weights and hidden states have length 1, so that the
amax of the forward pass is fixed at 1 and nothing is rotated. --moments if6 stores AdamW's moments in that format.

Besides ifjax[flax,viz], the benchmark needs `pip install orbax-checkpoint`.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import ifjax
from ifjax import plots
from ifjax.training import RECIPES, Recipe, get_recipe
from ifjax.training.optim import quantized_moments

DEFAULT_RECIPES = ("bf16", "nvfp4", "fouroversix", "nvint4", "if4", "if4_mseden", "nvfp4_mseden")
BYTES = 256


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that all runs of a comparison share; each field is a command-line flag."""

    layers: int = 6  # the last one is never quantized
    dim: int = 192
    heads: int = 6
    hidden: int = 512
    mlp: str = "swiglu"  # "swiglu" or "gelu"
    ngpt: bool = False
    remat: bool = False
    dtype: str = ""  # dtype in which layers compute; by default float32 on CPUs, else bfloat16
    steps: int = 500
    batch: int = 8
    length: int = 256
    rate: float = 2e-3
    warmup: int = 50
    decay: float = 0.1
    clip: float = 1.0
    moments: str = ""  # the format of AdamW's moments, such as if6
    windows: int = 128  # number of validation windows
    every: int = 100

    def __post_init__(self):
        wanted = {
            "layers": (self.layers >= 2, "at least 2: the last block stays in high precision"),
            "heads": (self.heads >= 1 and self.dim % (2 * self.heads) == 0, "a divisor of dim / 2"),
            "mlp": (self.mlp in ("swiglu", "gelu"), "swiglu or gelu"),
            "dtype": (self.dtype in ("", "float32", "bfloat16", "float16"), "float32, bfloat16 or float16"),
            "warmup": (0 <= self.warmup < self.steps, f"less than steps ({self.steps})"),
            "windows": (self.windows >= self.batch and self.windows % self.batch == 0, "a multiple of batch"),
            "every": (self.every >= 1, "at least 1"),
        }
        for field, (fits, needed) in wanted.items():
            if not fits:
                raise ValueError(f"{field} must be {needed}, got {getattr(self, field)!r}")
        if not self.dtype:
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
            object.__setattr__(self, "dtype", dtype)


# --- data ------------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """The concatenated bytes of files, with a zero byte after each, and a hash of both parts."""

    training: np.ndarray
    validation: np.ndarray
    digest: str


# Tests and generated tables are left out: not all installations have them, and tables would be half of the data.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "encodings", "pydoc_data"}


def is_for_validation(name: str) -> bool:
    """Return whether a file is for validation; by a hash of its name, one in 16 is."""
    return hashlib.sha256(name.encode()).digest()[0] < 16


def split(folder: Path) -> tuple[list[str], list[str]]:
    """Return the sorted names, relative to the folder, of the files for training and of those for validation."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    names = [name for name in names if not _LEFT_OUT & set(name.split("/")) and "_sysconfigdata" not in name]
    return [name for name in names if not is_for_validation(name)], [name for name in names if is_for_validation(name)]


def load(folder: Path | None = None, length: int = 1) -> Data:
    """Load the standard library, or the *.py files of a folder."""
    folder = Path(sysconfig.get_path("stdlib") if folder is None else folder)
    parts = [b"".join((folder / name).read_bytes() + b"\0" for name in names) for names in split(folder)]
    if min(map(len, parts)) <= length:
        raise SystemExit(f"{folder} has too few *.py files to train and validate on {length} bytes: use another --data")
    digest = hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]
    return Data(*(np.frombuffer(part, np.uint8) for part in parts), digest)


def batch_at(training: jax.Array, key: jax.Array, step: jax.Array, settings: Settings) -> jax.Array:
    """Return the training bytes [batch, length + 1] of a step, a pure function of the key and the step."""
    last = training.shape[0] - settings.length - 1
    starts = jax.random.randint(jax.random.fold_in(key, step), (settings.batch,), 0, last + 1)
    return jax.vmap(lambda i: jax.lax.dynamic_slice(training, (i,), (settings.length + 1,)))(starts)


def validation_batches(validation: np.ndarray, settings: Settings) -> np.ndarray:
    """Return the fixed validation bytes [batches, batch, length + 1], spread evenly over the data."""
    starts = np.linspace(0, len(validation) - settings.length - 1, settings.windows).astype(np.int64)
    windows = np.stack([validation[i : i + settings.length + 1] for i in starts])
    return windows.reshape(-1, settings.batch, settings.length + 1)


# --- model -----------------------------------------------------------------------------------------------------------


def unit(x: jax.Array) -> jax.Array:
    """Return x with its rows normalized to length 1."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt((wide * wide).sum(-1, keepdims=True) + 1e-6)).astype(x.dtype)


def rotary(x: jax.Array) -> jax.Array:
    """Return x [batch, length, heads, features], with features rotated by angles that grow with the position."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequencies[None]
    cos, sin = (f(angles)[None, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Block(nn.Module):
    """Attention and an MLP, of nGPT if the settings say so; it returns a pair, as nn.scan requires."""

    settings: Settings

    @nn.compact
    def __call__(self, x, _=None):
        s = self.settings
        head = s.dim // s.heads
        y = self._dense("qkv", 3 * s.dim)(self._normed("attention_norm", x))
        q, k, v = (y.reshape(*y.shape[:2], 3, s.heads, head)[:, :, i] for i in range(3))
        if s.ngpt:
            scale = self._gain("qk_gain", s.heads, head)
            q, k = (unit(a) * scale for a in (q, k))
        else:
            q, k = (self._normed(f"{name}_norm", a) for name, a in (("query", q), ("key", k)))
        scale = head**0.5 if s.ngpt else head**-0.5
        y = jax.nn.dot_product_attention(rotary(q), rotary(k), v, scale=scale, is_causal=True)
        x = self._joined("attention", x, self._out("out")(self._inner(y.reshape(x.shape))))

        swiglu = s.mlp == "swiglu"
        y = self._dense("up", (1 + swiglu) * s.hidden)(self._normed("mlp_norm", x))
        if s.ngpt:
            y = y * (self._gain("up_gain", y.shape[-1]) * s.dim**0.5).astype(y.dtype)
        if swiglu:
            gate, y = jnp.split(y, 2, axis=-1)
            y = nn.silu(gate) * y
        else:
            y = nn.gelu(y)
        return self._joined("mlp", x, self._out("down")(self._inner(y))), None

    def _dense(self, name, features, **options):
        return nn.Dense(features, use_bias=False, dtype=self.settings.dtype, name=name, **options)

    def _out(self, name):
        # The initial variance of the sum over all blocks is that of a single block.
        init = nn.initializers.variance_scaling(0.5 / self.settings.layers, "fan_in", "normal")
        return self._dense(name, self.settings.dim, kernel_init=init)

    def _normed(self, name, x):
        return x if self.settings.ngpt else nn.RMSNorm(dtype=self.settings.dtype, name=name)(x)

    def _inner(self, y):
        return unit(y) if self.settings.ngpt else y

    def _gain(self, name, *shape):
        """Return a gain that starts as ones; its parameter is small, because AdamW's steps do not scale with it."""
        start = self.settings.dim**-0.5
        gain = self.param(name, nn.initializers.constant(start), shape) / start
        return gain.reshape((1,) * (3 - len(shape) + (len(shape) > 1)) + shape[-2:]).astype(self.settings.dtype)

    def _joined(self, name, x, update):
        if not self.settings.ngpt:
            return x + update
        rate = 0.05 * jnp.abs(self._gain(f"{name}_rate", x.shape[-1]))
        x = unit(x)
        return unit(x + rate * (unit(update) - x))


class Transformer(nn.Module):
    """A model from bytes [batch, length] to float32 logits; the last block is a module that rules can match."""

    settings: Settings

    @nn.compact
    def __call__(self, tokens):
        s = self.settings
        x = nn.Embed(BYTES, s.dim, dtype=s.dtype, name="embed")(tokens)
        block = nn.remat(Block, prevent_cse=False) if s.remat else Block
        layers = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True, "quantize": True}, length=s.layers - 1
        )
        x, _ = layers(s, name="layers")(x, None)
        x, _ = (nn.remat(Block) if s.remat else Block)(s, name="last")(x)
        x = x if s.ngpt else nn.RMSNorm(dtype=s.dtype, name="norm")(x)
        logits = nn.Dense(BYTES, use_bias=False, dtype=s.dtype, name="head")(x).astype(jnp.float32)
        if not s.ngpt:
            return logits
        start = s.dim**-0.5
        return logits * (self.param("head_gain", nn.initializers.constant(start), (BYTES,)) / start).reshape(1, 1, -1)


def on_sphere(params: Any) -> Any:
    """Return nGPT's parameters, with the matrices' vectors along the model's dimension normalized to length 1."""

    def project(path, a):
        names = [entry.key for entry in path]
        if names[-1] not in ("kernel", "embedding"):
            return a
        axis = -1 if names[-1] == "embedding" or names[-2] in ("out", "down") else -2
        return jnp.moveaxis(unit(jnp.moveaxis(a, axis, -1)), -1, axis)

    return jax.tree_util.tree_map_with_path(project, params)


def bounded(recipe: Recipe) -> Recipe:
    """Return the recipe for nGPT: x and w have a fixed amax of 1, gradients a measured one, and nothing is rotated.

    Raises:
        ValueError: the recipe uses MS-EDEN, which needs rotated operands.
    """
    products = (recipe.fprop, recipe.dgrad, recipe.wgrad)
    if any(operand.rounding == "ms_eden" for product in products for operand in product.operands):
        plain = [name for name in DEFAULT_RECIPES if "mseden" not in name]
        raise ValueError(f"--ngpt rotates nothing, and {recipe.name} must: use one of {', '.join(plain)}")

    def at_one(operand):
        return operand if operand.fmt is None else dataclasses.replace(operand, amax=1.0)

    fprop, dgrad, wgrad = (dataclasses.replace(product, hadamard=None, signs="fixed") for product in products)
    return dataclasses.replace(
        recipe,
        fprop=dataclasses.replace(fprop, lhs=at_one(fprop.lhs), rhs=at_one(fprop.rhs)),
        dgrad=dataclasses.replace(dgrad, rhs=at_one(dgrad.rhs)),
        wgrad=dataclasses.replace(wgrad, lhs=at_one(wgrad.lhs)),
    )


def rules(recipe: str, settings: Settings) -> tuple[ifjax.Rule, ...]:
    """Return rules that apply the recipe to all linear layers except those of the last block and the head."""
    record = bounded(get_recipe(recipe)) if settings.ngpt else get_recipe(recipe)
    return ifjax.Rule("last/.*|head", None), ifjax.Rule(".*", recipe=record)


# --- training --------------------------------------------------------------------------------------------------------


def optimizer(settings: Settings, key: jax.Array | int = 0) -> optax.GradientTransformation:
    """Return AdamW with warm-up, cosine decay to a tenth of the rate, and clipping.

    Weight decay applies to matrices only, and not to nGPT. The key seeds the noise of --moments and is kept in the
    state.
    """
    s = settings
    schedule = optax.warmup_cosine_decay_schedule(0.0, s.rate, s.warmup, s.steps, end_value=s.rate / 10)

    def matrices(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)

    adamw = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.0 if s.ngpt else s.decay, mask=matrices)
    if s.moments:
        adamw = quantized_moments(adamw, fmt=s.moments, seed=key)
    return optax.chain(optax.clip_by_global_norm(s.clip), adamw)


class Program:
    """The compiled step and validation of one recipe, for any seed; the seed is part of the state.

    Attributes:
        initial: returns the state at step 0 from a seed.
        step: returns the next state from (state, training bytes); it donates the state.
        validate: returns nats per byte from (state, validation batches), by the quantized forward pass.
        seconds: the seconds of the step's compilation.
    """

    def __init__(self, recipe: str, settings: Settings, training: jax.Array):
        self.settings = settings
        self._model, self._optimizer = Transformer(settings), optimizer(settings)
        self._apply = ifjax.quantized(self._model.apply, rules(recipe, settings))
        self.initial = jax.jit(self._initial)
        self.validate = jax.jit(self._validate)
        start = time.perf_counter()
        self.step = jax.jit(self._step, donate_argnums=0).lower(self.abstract(), training).compile()
        self.seconds = time.perf_counter() - start

    @property
    def temporary_bytes(self) -> int | None:
        """The bytes of a step's temporaries; None if XLA does not report them."""
        analysis = self.step.memory_analysis()
        return None if analysis is None else int(analysis.temp_size_in_bytes)

    def abstract(self) -> dict[str, Any]:
        """Return the state's shapes and dtypes, placed on the first device."""
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.eval_shape(self._initial, jnp.int32(0))
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), shapes)

    def _initial(self, seed):
        s, seed = self.settings, jnp.asarray(seed, jnp.int32)
        params = self._model.init(_key(seed, "parameters"), jnp.zeros((1, s.length), jnp.int32))["params"]
        params = on_sphere(params) if s.ngpt else params
        recorded = {"losses": jnp.full(s.steps, jnp.nan), "validation": jnp.full(-(-s.steps // s.every), jnp.nan)}
        counters = {"seed": seed, "step": jnp.int32(0)}
        opt = optimizer(s, _key(seed, "moments")).init(params)
        return {"params": params, "optimizer": opt, **counters, **recorded}

    def _loss(self, params, tokens, key):
        tokens = tokens.astype(jnp.int32)
        logits = self._apply({"params": params}, tokens[:, :-1], rngs={"quantize": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def _step(self, state, training):
        step, params = state["step"], state["params"]
        tokens = batch_at(training, _key(state["seed"], "data"), step, self.settings)
        noise = jax.random.fold_in(_key(state["seed"], "noise"), step)
        loss, grads = jax.value_and_grad(self._loss)(params, tokens, noise)
        updates, opt = self._optimizer.update(grads, state["optimizer"], params)
        params = optax.apply_updates(params, updates)
        params = on_sphere(params) if self.settings.ngpt else params
        losses = state["losses"].at[step].set(loss)
        return state | {"params": params, "optimizer": opt, "step": step + 1, "losses": losses}

    def _validate(self, state, batches):
        key = jax.random.fold_in(_key(state["seed"], "noise"), self.settings.steps)  # no training step has this number
        return jax.lax.map(lambda tokens: self._loss(state["params"], tokens, key), batches).mean()


def _key(seed, purpose: str) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), ("parameters", "data", "noise", "moments").index(purpose))


@functools.lru_cache(maxsize=16)
def _compiled(recipe: str, settings: Settings, size: int) -> Program:
    """Return the program of a recipe for training data of `size` bytes."""
    return Program(recipe, settings, jax.ShapeDtypeStruct((size,), jnp.uint8))


def name_of(recipe: str, seed: int) -> str:
    return f"{recipe}-seed{seed}"


def train(
    recipe: str, seed: int, settings: Settings, data: Data, out: Path, *,
    watch: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[str, Any]:
    """Return the record of a run, `out`/RECIPE-seedN.json.

    If the file exists, it is read. Otherwise the run starts, or continues from its last checkpoint.

    Args:
        watch: called after each step with the number of steps done and the loss.

    Raises:
        ValueError: `out` contains this run with other settings or data.
        FloatingPointError: a loss is not finite.
    """
    import orbax.checkpoint as ocp
    from codec import machine

    about = {"recipe": recipe, "seed": seed, "settings": dataclasses.asdict(settings), "data": data.digest}
    out.mkdir(parents=True, exist_ok=True)
    file, folder = out / f"{name_of(recipe, seed)}.json", out.absolute() / "checkpoints" / name_of(recipe, seed)
    if file.exists():
        record = json.loads(file.read_text())
        _check_same(about, {key: record[key] for key in about}, file)
        return record

    training = jnp.asarray(data.training)
    batches = jnp.asarray(validation_batches(data.validation, settings))
    program = _compiled(recipe, settings, training.size)
    # Saving is synchronous, because the next step reuses the memory of the state that is being saved.
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder, options=options, metadata=about) as manager:
        latest = manager.latest_step()
        if latest is None:
            state, done = program.initial(seed), 0
        else:
            _check_same(about, dict(manager.metadata().custom_metadata or {}), folder)
            state, done = manager.restore(latest, args=ocp.args.StandardRestore(program.abstract())), latest
        parameters = sum(a.size for a in jax.tree.leaves(state["params"]))
        seconds = []
        while done < settings.steps:
            start = time.perf_counter()
            state = program.step(state, training)
            loss = float(state["losses"][done])
            seconds.append(time.perf_counter() - start)
            done += 1
            if not math.isfinite(loss):
                raise FloatingPointError(f"{name_of(recipe, seed)}: the loss of step {done} is {loss}: lower --rate")
            watch(done, loss)
            if done % settings.every == 0 or done == settings.steps:
                at = -(-done // settings.every) - 1
                state["validation"] = state["validation"].at[at].set(program.validate(state, batches))
                manager.save(done, args=ocp.args.StandardSave(state))

    validation = _numbers(state["validation"])
    points = [min((i + 1) * settings.every, settings.steps) for i in range(len(validation))]
    record = about | {
        "parameters": parameters, "validation loss": validation[-1],
        "seconds a step": float(np.median(seconds)) if seconds else None, "seconds to compile": program.seconds,
        "temporary bytes": program.temporary_bytes, "machine": machine(),
        "validation": dict(zip(map(str, points), validation, strict=True)), "losses": _numbers(state["losses"]),
    }  # fmt: skip
    _write(file, json.dumps(record))
    return record


def _numbers(a) -> list[float]:
    """Return float32 numbers as floats with the fewest digits that round-trip."""
    return [float(str(x)) for x in np.asarray(a, np.float32)]


def _check_same(wanted: dict, found: dict, where: Path) -> None:
    wanted, found = ({"data": a.get("data"), **a.get("settings", {})} for a in (wanted, found))
    others = [f"{key} {found.get(key)!r}, not {wanted.get(key)!r}" for key in wanted if wanted[key] != found.get(key)]
    if others:
        raise ValueError(f"{where} is of a run with {'; '.join(others)}: remove it, or write to another --out")


def _write(file: Path, text: str) -> None:
    """Write a text file atomically."""
    part = file.with_suffix(".part")
    part.write_text(text)
    os.replace(part, file)


def measure(recipes: Iterable[str], settings: Settings, data: Data, out: Path, rounds: int) -> dict[str, Any]:
    """Return the seconds of a step of each recipe, timed in turn, and write them to `out`/times.json."""
    from codec import alternate, machine

    about = machine()
    training = jnp.asarray(data.training)
    programs = {recipe: _compiled(recipe, settings, training.size) for recipe in dict.fromkeys(["bf16", *recipes])}
    states = {recipe: program.initial(0) for recipe, program in programs.items()}

    def step(recipe):
        states[recipe] = programs[recipe].step(states[recipe], training)
        return states[recipe]["losses"]

    taken = alternate({recipe: functools.partial(step, recipe) for recipe in programs}, rounds)
    times = {
        recipe: {
            "seconds a step": float(np.median(seconds[:, 0])),
            "processor seconds a step": float(np.median(seconds[:, 1])),
            "times bf16": float(np.median(seconds[:, 0] / taken["bf16"][:, 0])),
            "temporary bytes": programs[recipe].temporary_bytes,
        }
        for recipe, seconds in taken.items()
    }
    out.mkdir(parents=True, exist_ok=True)
    record = {"settings": dataclasses.asdict(settings), "rounds": rounds, "machine": about, "times": times}
    _write(out / "times.json", json.dumps(record))
    return record


# --- results ---------------------------------------------------------------------------------------------------------


def read(out: Path) -> tuple[dict[str, dict[int, dict]], dict[str, dict]]:
    """Return the runs by recipe and seed, and the times by recipe.

    Raises:
        ValueError: there are no runs, or they cannot be compared because settings or data differ.
    """
    runs: dict[str, dict[int, dict]] = {}
    first = None
    for file in sorted(out.glob("*-seed*.json")):
        record = json.loads(file.read_text())
        first = first or record
        _check_same(first, record, file)
        runs.setdefault(record["recipe"], {})[record["seed"]] = record
    if first is None:
        raise ValueError(f"{out} has no runs: run without --summary first, with the same --out")
    times = {}
    if (out / "times.json").exists():
        timed = json.loads((out / "times.json").read_text())
        if timed["settings"] != first["settings"]:
            raise ValueError(f"{out / 'times.json'} is of other settings than the runs: remove it, or repeat --time")
        times = timed["times"]
    order = {recipe: i for i, recipe in enumerate(DEFAULT_RECIPES)}
    return dict(sorted(runs.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))), times


def gap(runs: dict[str, dict[int, dict]], recipe: str, against: str = "bf16") -> tuple[float, float] | None:
    """Return the mean difference in validation loss over the seeds that both recipes have, and its standard error."""
    seeds = sorted(runs[recipe].keys() & runs.get(against, {}).keys())
    if not seeds:
        return None
    gaps = np.array([runs[recipe][seed]["validation loss"] - runs[against][seed]["validation loss"] for seed in seeds])
    return float(gaps.mean()), float(gaps.std(ddof=1) / len(gaps) ** 0.5) if len(gaps) > 1 else math.nan


def rows(runs: dict[str, dict[int, dict]], times: dict[str, dict]) -> list[dict[str, str]]:
    """Return the rows of the summary's table."""

    def seconds(recipe):
        if recipe in times:
            return times[recipe]["seconds a step"]
        measured = [run["seconds a step"] for run in runs.get(recipe, {}).values() if run["seconds a step"]]
        return float(np.median(measured)) if measured else math.nan

    def number(value, form):
        return "" if value is None or math.isnan(value) else format(value, form)

    table = []
    for recipe, by_seed in runs.items():
        mean = float(np.mean([run["validation loss"] for run in by_seed.values()]))
        difference, error = gap(runs, recipe) or (math.nan, math.nan)
        if recipe == "bf16":
            difference = error = math.nan
        ratio = times[recipe]["times bf16"] if recipe in times else seconds(recipe) / seconds("bf16")
        temporary = next(iter(by_seed.values()))["temporary bytes"]
        table.append(
            {
                "recipe": recipe, "seeds": " ".join(map(str, sorted(by_seed))), "validation loss": number(mean, ".4f"),
                "gap to bf16": number(difference, "+.4f"), "its standard error": number(error, ".4f"),
                "steps a second": number(1 / seconds(recipe), ".3g"), "speed / bf16": number(1 / ratio, ".2f"),
                "temporary MB": "" if temporary is None else f"{temporary / 1e6:.0f}",
            }
        )  # fmt: skip
    return table


def verdict(runs: dict[str, dict[int, dict]]) -> str:
    """Return a text that states which differences between recipes are significant.

    The model of a loss is recipe + seed + noise. The noise's variance is estimated from all recipes together, because
    three differences alone would leave it nearly unknown. The bound holds for all pairs at once (Bonferroni).
    """
    scope = "Other models, data and lengths of training may order them otherwise, whatever seeds say."
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in runs.values())))
    if len(runs) < 2 or len(seeds) < 2:
        return f"With {len(runs)} recipes on {len(seeds)} common seeds nothing can be told about their order. {scope}"
    from scipy.special import stdtrit  # jax depends on it

    losses = np.array([[by_seed[seed]["validation loss"] for seed in seeds] for by_seed in runs.values()])
    rest = losses - losses.mean(0, keepdims=True) - losses.mean(1, keepdims=True) + losses.mean()
    freedom = (len(runs) - 1) * (len(seeds) - 1)
    names, means = list(runs), losses.mean(1)
    order = [int(i) for i in np.argsort(means, kind="stable")]
    pairs = [(i, j) for k, i in enumerate(order) for j in order[k + 1 :]]
    bound = stdtrit(freedom, 1 - 0.05 / 2 / len(pairs)) * math.sqrt(2 * (rest**2).sum() / freedom / len(seeds))
    alike = [f"{names[i]} and {names[j]}" for i, j in pairs if means[j] - means[i] <= bound]
    ranking = ", ".join(names[i] for i in order)
    cannot = f"cannot order {'; '.join(alike)}, which does not make them equal" if alike else "order them all"
    return (
        f"{len(seeds)} common seeds, paired, tell validation losses apart that differ by more than {bound:.4f} nats "
        f"(95 % for all {len(pairs)} pairs at once, one variance for all): from the lowest loss up ({ranking}) they "
        f"{cannot}. {scope}"
    )


def summary(out: Path, markdown: Path | None = None) -> None:
    """Print the table and the verdict, and write them as Markdown to a file if `markdown` is given."""
    from rich.console import Console
    from rich.table import Table

    runs, times = read(out)
    table, text = rows(runs, times), verdict(runs)
    run = next(iter(next(iter(runs.values())).values()))
    settings = ", ".join(f"{key} {value}" for key, value in run["settings"].items() if value not in ("", False))
    about = f"{run['parameters'] / 1e6:.2f} million parameters, {settings}"
    clock = "--time, recipes in turn" if times else "the runs, maybe at different hours"
    note = f"Loss in nats a byte, by the forward pass as it was trained. Steps a second are those of {clock}."
    shown = Table(*table[0], title="benchmarks/train_lm.py")
    for row in table:
        shown.add_row(*row.values())
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(shown)
    for line in (about, note, text):
        console.print(line, highlight=False, markup=False)
    if markdown:
        machine = ", ".join(f"{key} {value}" for key, value in run["machine"].items())
        lines = [" | ".join(row) for row in [list(table[0]), ["---"] * len(table[0]), *(r.values() for r in table)]]
        body = "\n".join(f"| {line} |" for line in lines)
        _write(markdown, f"# train_lm.py\n\n{machine}\n\n{about}\n\n{body}\n\n{note}\n\n{text}\n")


def plot(out: Path) -> Path:
    """Plot to `out`/curves.png the gaps of training losses to bf16, means over seeds; without bf16 the losses."""
    runs, _ = read(out)
    reference = runs.get("bf16", {})
    common = {name: [seed for seed in by_seed if seed in reference] for name, by_seed in runs.items() if name != "bf16"}
    if any(common.values()):
        ylabel = "training loss - that of bf16, nats a byte"
        losses = {
            name: np.mean([np.subtract(runs[name][k]["losses"], reference[k]["losses"]) for k in seeds], axis=0)
            for name, seeds in common.items() if seeds
        }  # fmt: skip
    else:
        ylabel = "training loss, nats a byte"
        losses = {name: np.mean([run["losses"] for run in seeds.values()], axis=0) for name, seeds in runs.items()}
    steps = len(next(iter(losses.values())))
    width = max(1, min(50, steps // 10))
    curves = {
        name: (np.arange(width, steps + 1), np.convolve(values, np.ones(width) / width, "valid"))
        for name, values in losses.items()
    }
    title = f"Mean of {width} steps and of all seeds; lower is better"
    plots.plot_curves(curves, xlabel="step", ylabel=ylabel, title=title).savefig(out / "curves.png", dpi=120)
    return out / "curves.png"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=DEFAULT_RECIPES, choices=sorted(RECIPES), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--out", type=Path, default=Path("build/train_lm"), help="folder of the runs")
    parser.add_argument("--data", type=Path, help="folder of *.py files in place of the standard library")
    parser.add_argument("--summary", action="store_true", help="print the table of the runs in --out")
    parser.add_argument("--markdown", type=Path, help="with --summary: file to write it to, too")
    parser.add_argument("--time", type=int, metavar="ROUNDS", help="only time steps of the recipes, in turn")
    for field in dataclasses.fields(Settings):
        flag = f"--{field.name}"
        if field.type is bool:
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=field.type, default=field.default, help=f"default {field.default!r}")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
        if args.summary:
            plot(args.out)
            return summary(args.out, args.markdown)
        for recipe in args.recipes:
            rules(recipe, settings)  # raises now for settings that the recipe does not support
        data = load(args.data, settings.length)
        if args.time:
            for recipe, row in measure(args.recipes, settings, data, args.out, args.time)["times"].items():
                print(recipe, row)
            return None
        run_all(args, settings, data)
    except ValueError as error:
        parser.error(str(error))
    return None


def run_all(args: argparse.Namespace, settings: Settings, data: Data) -> None:
    """Run every recipe with every seed; the outer loop is over seeds, so that partial results can be compared."""
    from rich.progress import MofNCompleteColumn, Progress, TextColumn

    columns = [*Progress.get_default_columns(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}")]
    with Progress(*columns) as progress:
        for seed in args.seeds:
            for recipe in args.recipes:
                task = progress.add_task(name_of(recipe, seed), total=settings.steps, loss="compiling")

                def watch(step, loss, task=task):
                    progress.update(task, completed=step, loss=f"loss {loss:.3f}")

                record = train(recipe, seed, settings, data, args.out, watch=watch)
                loss = f"validation {record['validation loss']:.4f}"
                progress.update(task, completed=settings.steps, loss=loss)
                plot(args.out)
    summary(args.out)


if __name__ == "__main__":
    main()
