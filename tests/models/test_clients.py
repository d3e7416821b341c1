"""Models that others wrote, of a few small layers with random weights: found, packed, rounded, trained, generating.

Needs the extra `clients`, and google-research/vmoe with vision_transformer on the path; what is missing is skipped.
"""

import contextlib
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ifjax

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
IDS = jnp.arange(12).reshape(2, 6) % 50


@contextlib.contextmanager
def their_settings():
    """Some of these models rely on implicit promotion, and T5 on a name of `jnp.clip`'s that JAX has given up."""
    clip = jnp.clip

    def as_before(x, *bounds, a_max=None, **others):
        return clip(x, *bounds, **others, **({} if a_max is None else {"max": a_max}))

    jnp.clip = as_before
    try:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            yield
    finally:
        jnp.clip = clip


@pytest.fixture(autouse=True)
def as_in_their_own_tests():
    with their_settings():
        yield


def of_arrays(fn, params, dtype=jnp.generic):
    """Return fn as a function of (arrays, *others), for the leaves of params that are arrays of a dtype, and these."""
    leaves, tree = jax.tree.flatten(params)
    places = [i for i, a in enumerate(leaves) if hasattr(a, "dtype") and jnp.issubdtype(a.dtype, dtype)]

    def run(arrays, *others):
        whole = list(leaves)
        for i, array in zip(places, arrays, strict=True):
            whole[i] = array
        return fn(jax.tree.unflatten(tree, whole), *others)

    return run, [leaves[i] for i in places]


def gradient_of(fn, params, x):
    """Return the gradient function of the mean square of fn's result for the float leaves, and those leaves."""
    run, values = of_arrays(fn, params, jnp.floating)
    return jax.grad(lambda values: jnp.square(run(values, x)).mean()), values


# --- the models: each returns (function of parameters and inputs, parameters, inputs, an object with `generate`).
# `wrap` is called with their modules and, for those of NNX, the modules' inputs, and returns the module to use.


def same(module, *inputs):
    return module


def transformers_model(name, config, wrap, **options):
    transformers = pytest.importorskip("transformers")
    try:
        model, settings = getattr(transformers, name), getattr(transformers, config)
    except AttributeError:
        pytest.skip("transformers 5 has no Flax models")
    made = model(settings(**options))
    if wrap is not same:
        made._module = wrap(made.module)
        made._params = jax.jit(lambda: made.init_weights(made.key, made.input_shape))()
    return made


TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": 64}


def gpt2(wrap=same):
    model = transformers_model(
        "FlaxGPT2LMHeadModel", "GPT2Config", wrap, **TOKENS, n_positions=32, n_embd=32, n_layer=2, n_head=2
    )
    return lambda p, x: model(x, params=p).logits, model.params, IDS, model


def llama(wrap=same):
    model = transformers_model(
        "FlaxLlamaForCausalLM", "LlamaConfig", wrap, **TOKENS, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return lambda p, x: model(x, params=p).logits, model.params, IDS, model


def t5(wrap=same):
    model = transformers_model(
        "FlaxT5ForConditionalGeneration", "T5Config", wrap, vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2,
        num_heads=2, decoder_start_token_id=0,
    )  # fmt: skip
    return lambda p, x: model(x, decoder_input_ids=x, params=p).logits, model.params, IDS, model


def bart(wrap=same):
    model = transformers_model(
        "FlaxBartForConditionalGeneration", "BartConfig", wrap, **TOKENS, d_model=32, encoder_layers=2,
        decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_position_embeddings=32, decoder_start_token_id=0, forced_eos_token_id=1,
    )  # fmt: skip
    return lambda p, x: model(x, decoder_input_ids=x, params=p).logits, model.params, IDS, model


def bert(wrap=same):
    model = transformers_model(
        "FlaxBertForMaskedLM", "BertConfig", wrap, vocab_size=64, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    return lambda p, x: model(x, params=p).logits, model.params, IDS, model


def whisper(wrap=same):
    model = transformers_model(
        "FlaxWhisperForConditionalGeneration", "WhisperConfig", wrap, vocab_size=64, d_model=32, encoder_layers=2,
        decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        num_mel_bins=16, max_source_positions=8, max_target_positions=16, decoder_start_token_id=0, pad_token_id=1,
        bos_token_id=0, eos_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    sound = jnp.sin(jnp.arange(2 * 16 * 16, dtype=jnp.float32)).reshape(2, 16, 16)
    return lambda p, x: model(x, decoder_input_ids=IDS, params=p).logits, model.params, sound, model


def vit(wrap=same):
    model = transformers_model(
        "FlaxViTForImageClassification", "ViTConfig", wrap, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, image_size=16, patch_size=8,
    )  # fmt: skip
    x = jnp.cos(jnp.arange(2 * 3 * 16 * 16, dtype=jnp.float32)).reshape(2, 3, 16, 16)
    return lambda p, x: model(x, params=p).logits, model.params, x, model


def equinox(wrap=same):
    del wrap  # it has no Flax module
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 3)

    class Net(eqx.Module):
        attention: eqx.nn.MultiheadAttention
        mlp: eqx.nn.MLP

        def __call__(self, x):
            return jax.vmap(self.mlp)(self.attention(x, x, x))

    net = Net(eqx.nn.MultiheadAttention(2, 32, key=keys[0]), eqx.nn.MLP(32, 32, 64, 2, key=keys[1]))
    return lambda net, x: jax.vmap(net)(x), net, jax.random.normal(keys[2], (2, 6, 32)), None


def haiku(wrap=same):
    del wrap  # it has no Flax module
    hk = pytest.importorskip("haiku")

    def forward(ids):
        x = hk.Embed(64, 32)(ids)
        for _ in range(2):
            h = hk.LayerNorm(-1, True, True)(x)
            x = x + hk.MultiHeadAttention(2, 16, model_size=32, w_init=hk.initializers.VarianceScaling())(h, h, h)
            x = x + hk.nets.MLP([64, 32])(x)
        return hk.Linear(64, name="lm_head")(x)

    made = hk.without_apply_rng(hk.transform(forward))
    return made.apply, made.init(jax.random.key(0), IDS), IDS, None


def tunix(module, name, wrap, **options):
    """tunix's decoders differ in their layers, not in how they are made and called."""
    made = pytest.importorskip(f"tunix.models.{module}.model")
    nnx = pytest.importorskip("flax.nnx")
    config = made.ModelConfig(
        num_layers=2, vocab_size=64, embed_dim=32, hidden_dim=64, num_heads=2, head_dim=16, num_kv_heads=1,
        rope_theta=10000, norm_eps=1e-5, **options,
    )  # fmt: skip
    mask = jnp.broadcast_to(jnp.tri(6, dtype=bool), (2, 6, 6))
    places = jnp.broadcast_to(jnp.arange(6), (2, 6))
    model = getattr(made, name)(config, rngs=nnx.Rngs(0))
    graph, state = nnx.split(wrap(model, IDS, places, None, mask))
    return lambda state, x: nnx.merge(graph, state)(x, places, None, mask)[0], state, IDS, None


def tunix_llama(wrap=same):
    return tunix("llama3", "Llama3", wrap)


def tunix_qwen(wrap=same):
    return tunix("qwen3", "Qwen3", wrap)


def tunix_qwen_moe(wrap=same):  # each expert's matrix is indexed out of a stack
    return tunix("qwen3", "Qwen3", wrap, num_experts=4, num_experts_per_tok=2)


def unet(wrap=same):
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, "FlaxUNet2DConditionModel"):
        pytest.skip("this diffusers has no Flax models")
    model = wrap(diffusers.FlaxUNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ))  # fmt: skip
    times, text = jnp.ones(2, jnp.int32), jnp.sin(jnp.arange(2 * 3 * 32, dtype=jnp.float32)).reshape(2, 3, 32)
    x = jnp.cos(jnp.arange(2 * 4 * 8 * 8, dtype=jnp.float32)).reshape(2, 4, 8, 8)
    params = jax.jit(model.init)(jax.random.key(0), x, times, text)["params"]
    return lambda p, x: model.apply({"params": p}, x, times, text).sample, params, x, None


def gemma(wrap=same):
    modules = pytest.importorskip("gemma.gm.nn._modules")
    table = modules.Embedder(vocab_size=64, embed_dim=32)
    block = wrap(modules.Block(
        num_heads=2, num_kv_heads=1, embed_dim=32, head_dim=16, hidden_dim=64, use_post_attn_norm=True,
        use_post_ffw_norm=True, attn_type=modules.AttentionType.GLOBAL, query_pre_attn_scalar=0.25,
        transpose_gating_einsum=False,
    ))  # fmt: skip
    mask = jnp.broadcast_to(jnp.tri(6, dtype=bool), (2, 6, 6))
    places = jnp.broadcast_to(jnp.arange(6), (2, 6))

    def fn(p, x):
        h = table.apply({"params": p["table"]}, x, method="encode")
        for layer in p["layers"]:
            _, h = block.apply({"params": layer}, h, places, None, mask)
        return table.apply({"params": p["table"]}, h, method="decode")

    x = jnp.ones((2, 6, 32))
    layers = [block.init(jax.random.key(i), x, places, None, mask)["params"] for i in range(2)]
    return fn, {"table": table.init(jax.random.key(2), IDS, method="encode")["params"], "layers": layers}, IDS, None


def vmoe(wrap=same):
    """A vision transformer with a layer of experts, which Flax's documents name; Flax has no such example itself."""
    made = pytest.importorskip("vmoe.nn.vit_moe")
    router = {"num_selected_experts": 2, "noise_std": 0.0}
    router["dispatcher"] = {"name": "einsum", "capacity": 4, "batch_priority": False}
    experts = {"layers": (1,), "num_experts": 4, "group_size": 5, "split_rngs": True, "router": router}
    model = wrap(made.VisionTransformerMoe(
        num_classes=8, patch_size=(4, 4), hidden_size=32, deterministic=True, head_kernel_zero_init=False,
        encoder={"num_layers": 2, "mlp_dim": 64, "num_heads": 2, "moe": experts},
    ))  # fmt: skip
    x = jnp.cos(jnp.arange(2 * 8 * 8 * 3, dtype=jnp.float32)).reshape(2, 8, 8, 3)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    return lambda p, x: model.apply({"params": p}, x)[0], params, x, None


# Matmul kernels counted by hand, without embeddings and heads: of a layer, times layers.
CLIENTS = {
    gpt2: 4 * 2,  # c_attn, c_proj, c_fc, c_proj
    llama: 7 * 2,  # q, k, v, o, gate, up, down
    t5: (4 + 2 + 4 + 4 + 2) * 2,  # encoder: attention, wi, wo; decoder: two attentions, wi, wo
    bart: (6 + 10) * 2,  # encoder: attention, fc1, fc2; decoder: two attentions, fc1, fc2
    bert: 6 * 2,  # query, key, value, output, intermediate, output
    whisper: (6 + 10) * 2 + 2,  # as BART; two convolutions
    vit: 6 * 2,  # query, key, value, output, intermediate, output
    equinox: 4 + 3,
    haiku: 6 * 2,  # query, key, value, linear, two of the MLP
    tunix_llama: 7 * 2,
    tunix_qwen: 7 * 2,
    tunix_qwen_moe: 7 * 2,  # q, k, v, o; gate, up, down of all experts, each in one stack
    # Block down: a residual block of 3, a transformer of 12, convolution; one of 4 with its shortcut. In the middle: 3,
    # 12, 3. Up: two of 4, convolution; two of 4, two transformers. Last convolution. The first has 4 channels, and the
    # two layers of the time embedding stay by their names.
    unet: (3 + 12 + 1) + 4 + (3 + 12 + 3) + (2 * 4 + 1) + (2 * 4 + 2 * 12) + 1,
    vmoe: 6 * 2,  # query, key, value, out; two of the MLP, those of all experts each in one stack
    gemma: 5 * 2,  # q, kv and the output's einsum, gating einsum, linear
}


@pytest.mark.parametrize("make", CLIENTS)
def test_models_of_others_are_found_packed_rounded_and_trained(make):
    fn, params, x, _ = make()
    packed, report = ifjax.quantize_params(params, "if4", model=fn, sample=(x,))
    assert len(report.check().quantized) == CLIENTS[make]
    faked, _ = ifjax.fake_quantize_params(params, "if4", model=fn, sample=(x,))
    weights = ifjax.quantized(fn)(packed, x)
    np.testing.assert_allclose(weights, fn(faked, x), rtol=1e-3, atol=1e-3)
    both = ifjax.quantized(fn, ifjax.default_rules("if4", "if4"))(packed, x)
    assert both.shape == weights.shape
    assert 1e-4 < float(jnp.abs(both - weights).max() / jnp.abs(weights).max()) < 1

    # The UNet has 80 products, which if4 would compile six encoders each for.
    recipe = ifjax.recipes.get_recipe("w4a4_qat" if make is unet else "if4")
    (gradient, values), (wanted, _) = (
        gradient_of(f, params, x) for f in (ifjax.quantized(fn, recipe, key=jax.random.key(0)), fn)
    )
    alike, total = 0, 0
    for g, w in zip(gradient(values), wanted(values), strict=True):
        assert bool(jnp.isfinite(g).all())
        total += float(jnp.square(w).sum())
        alike += float((g * w).sum())
    assert 0.5 < alike / total < 2


@pytest.mark.parametrize("make", CLIENTS)
def test_models_of_others_come_back_from_files(make, tmp_path):
    fn, params, x, _ = make()
    packed, _ = ifjax.quantize_params(params, "if4", model=fn, sample=(x,))
    arrays = jax.tree.map(lambda a: a if hasattr(a, "dtype") else None, packed)  # Equinox' modules hold functions, too
    ifjax.save_file(arrays, tmp_path / "model.safetensors")
    again = ifjax.load_file(tmp_path / "model.safetensors", like=arrays)
    assert jax.tree.structure(again) == jax.tree.structure(arrays)
    for got, wanted in zip(jax.tree.leaves(again), jax.tree.leaves(arrays), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_generation_of_transformers_runs_packed_and_compiles_once(make, caplog):
    fn, params, x, model = make()
    packed, _ = ifjax.quantize_params(params, "if4", model=fn, sample=(x,))
    faked, _ = ifjax.fake_quantize_params(params, "if4", model=fn, sample=(x,))
    traced = []

    def generate(p, x):
        traced.append(1)
        return model.generate(x, params=p, max_length=10, do_sample=False).sequences

    run = ifjax.quantized(generate)
    np.testing.assert_array_equal(run(packed, x), generate(faked, x))
    traced.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        run(packed, x)
    assert not traced and "ompil" not in caplog.text


@pytest.mark.parametrize("make", [gpt2, t5, vit, equinox, haiku, tunix_llama, unet])
def test_programs_that_rules_leave_alone_stay_equal_equation_by_equation(make):
    fn, params, x, _ = make()
    params = {"model": params, "other": jnp.ones((32, 32))}

    def program(fn):
        run, arrays = of_arrays(fn, params)
        return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(lambda *args: run(*args))(arrays, x)))

    before = program(lambda p, x: fn(p["model"], x))
    assert program(ifjax.quantized(lambda p, x: fn(p["model"], x), ifjax.Rule("other"))) == before


# Products whose change is folded, of all that are packed: the values of attention go straight into the output's
# projection. Scales do not pass GPT-2's GELU, which its c_proj of the MLP reads.
FOLDED = {(gpt2, "smooth", 0.5): (6, 8), (gpt2, "rotate", 16): (2, 8),
          (llama, "smooth", 0.5): (14, 14), (llama, "rotate", 16): (2, 14),
          (tunix_llama, "smooth", 0.5): (14, 14), (tunix_llama, "rotate", 16): (2, 14)}  # fmt: skip


@pytest.mark.parametrize(("make", "how", "value"), FOLDED)
def test_smoothing_and_rotation_are_folded_and_the_function_stays(make, how, value):
    fn, params, x, _ = make()
    rules = [*ifjax.default_rules()[:-1], ifjax.Rule(".*", "if4", **{how: value})]
    seen = ifjax.calibrate(fn, params, [(x,)], rules, progress=False) if how == "smooth" else None
    tree, notes = ifjax.fold_params(params, rules, model=fn, sample=(x,), calibration=seen)
    wanted = fn(params, x)
    np.testing.assert_allclose(fn(tree, x), wanted, atol=1e-5 * float(jnp.abs(wanted).max()), rtol=0)
    done = sum("folded into" in note for note in notes.values())
    online = sum("at each call" in note for note in notes.values())
    assert (done, done + online) == FOLDED[make, how, value], notes
