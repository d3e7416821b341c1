"""Examples run, tiny, and do what they say."""

import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ifjax

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def generate():
    sys.path.append(str(EXAMPLES.parent / "benchmarks"))
    yield runpy.run_path(str(EXAMPLES / "generate.py"))
    sys.path.pop()


@pytest.mark.docs
def test_generate(generate, tmp_path, capsys):
    train_lm = generate["train_lm"]
    settings = train_lm.Settings(layers=3, dim=32, heads=2, hidden=80, steps=2, warmup=1, dtype="float32")
    model, tokens = train_lm.Transformer(settings), jnp.arange(12, dtype=jnp.int32)[None]
    with jax.numpy_dtype_promotion("standard"):
        params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
        wanted = jax.jit(model.apply)({"params": params}, tokens)
    # Token by token on floats the decoder is the model that was trained.
    caches = generate["empty_caches"](settings, 1, 12, None, 0)
    decode = jax.jit(generate["decode"], static_argnums=0)
    first, caches = decode(settings, params, caches, tokens[:, :6])
    rest, _ = decode(settings, params, caches, tokens[:, 6:])
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), wanted, atol=2e-5)

    file = tmp_path / "lm.safetensors"
    ifjax.save_file(params, file)
    options = f"--params {file} --layers 3 --dim 32 --heads 2 --tokens 5 --window 2 --fmt mxfp4 --cache mxfp4"
    figures = generate["main"]([*options.split(), "--prompt", "def "])
    printed = capsys.readouterr().out
    assert "--- packed:" in printed and "tokens a second" in printed and printed.count("def ") == 2
    assert figures["packed"]["weights"] < 0.6 * figures["float"]["weights"]  # embedding and head stay
    assert figures["packed"]["cache"] < 0.5 * figures["float"]["cache"]


@pytest.mark.clients
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", ["gpt2", "llama", "{folder}/config.json", "{folder}"])
def test_generate_runs_models_of_transformers_with_their_own_packed_cache(generate, tmp_path, capsys, model):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "FlaxAutoModelForCausalLM"):
        pytest.skip("transformers 5 has no Flax models")
    transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    ).save_pretrained(tmp_path)  # fmt: skip
    model = model.format(folder=tmp_path)
    options = f"--model {model} --layers 2 --dim 64 --heads 2 --tokens 6 --temperature 0 --fmt if4 --cache if6"
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        figures = generate["main"]([*options.split(), "--prompt", "def "])
    printed = capsys.readouterr().out
    assert "--- float:" in printed and "--- packed:" in printed and printed.count("tokens a second") == 2
    assert figures["packed"]["weights"] < 0.7 * figures["float"]["weights"]  # embedding and head stay
    assert figures["packed"]["cache"] < 0.4 * figures["float"]["cache"]
    assert all(figure["tokens_a_second"] > 0 for figure in figures.values())
