"""What a name says of a tensor: one decision for files, their comparison, rules and trees without a model."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import ifjax
from ifjax import measure
from ifjax.convert import plan
from ifjax.files import read_header
from ifjax.models.decisions import decide
from ifjax.models.names import site_of_tensor
from ifjax.models.rules import default_rules

# Names of released checkpoints, by what a report says of them.
STAY = {
    "state spaces": (
        "backbone.layers.0.mixer.A_log", "model.layers.0.linear_attn.dt_bias", "layers.0.mixer.D", "ssm.Lambda_re",
        "layers.0.mamba.A_b_log", "vss.A_logs", "vss.Ds", "s4.log_dt", "blocks.0.att.time_faaaa", "att.time_decay",
        "blk.0.ssm_a", "mamba.a_log", "s4d.log_A_real", "att.time_mix_k", "att.time_maa_x",
        "blk.1.ssm_A", "layers.0.mixer.A",
    ),
    "tables": (
        "self_attn.rotary_emb.inv_freq", "rotary_emb.cos_cached", "freqs_cis", "rotary_pos_emb/sin", "attn.rel_pos_h",
        "layer.0.SelfAttention.relative_attention_bias.weight", "attn.relative_position_bias_table", "attn.bias_table",
        "quantizer.codebook", "vq.layers.0.codebook.weight", "quantizer.codevectors", "encodec.codebooks.3",
        "attn.alibi_slopes", "alibi.slopes",
    ),
    "latents": (
        "perceiver.latents", "resampler.latent_queries", "qformer.query_tokens", "params/latent_array", "vit.cls_token",
        "mae.mask_token", "vit.register_tokens", "detr.object_queries",
    ),
    "routers": (
        "layers.0.mlp.gate.weight", "block_sparse_moe.gate.weight", "mlp.router.weight", "moe.gate.wg.weight",
        "feed_forward.router.weight", "ffn.router.layer.weight", "decoder/layers/MoeBlock_0/gate/kernel",
        "mixer.gate.weight", "layers_0/TopKRouter_0/kernel", "experts.router_weights", "moe/gate_logits/kernel",
        "mlp.shared_expert_gate.weight", "deepspeed_moe.gate.wg.weight", "layers.0.gate.wg.weight", "routers.0.weight",
        "moe.gating.weight", "gating_network.0.weight",
    ),
    "heads": (
        "lm_head.weight", "output.weight", "model.output.weight", "mlp.router.classifier.weight", "score.weight",
    ),
    "embeddings": (
        "model.embed_tokens.weight", "shared.weight", "transformer.wte.weight", "tok_embeddings.weight",
        "embeddings.position_embeddings.weight", "vit.pos_embed",
        "decoder.pos_emb.weight", "token_emb.weight", "emb.weight",
    ),
}  # fmt: skip
WHATEVER = {  # whatever rules say
    "a norm": (
        "model.layers.0.input_layernorm.weight", "layers.ln_1.weight", "attn.q_ln.scale", "layers/LayerNorm_0/scale",
        "decoder/layers/pre_norm/scale", "layers/RMSNorm_1/kernel",
    ),
    "a bias": ("layers.attn.bias", "layers/Dense_0/bias", "layers.q_bias"),
    "factors of channels": ("layers/layer_scale", "ls1.gamma", "layers/post/scale", "blocks.beta"),
}  # fmt: skip
QUANTIZED = (
    "debias_proj.weight", "norm_proj.weight", "layers.0.norm_proj.kernel", "bias_dense.weight", "unbias.weight",
    "abnormal.weight", "layers.0.mlp.gate_proj.weight", "attn.gate.weight", "navigate.weight", "aggregate.weight",
    "latent_proj.weight", "to_latents.weight", "codebook_proj.weight", "rotary_attention.query.weight",
    "rotary_proj.weight", "relative_attention/query/kernel", "latent_attention.q_proj.weight", "mixer.x_proj.weight",
    "mixer.dt_proj.weight", "D_proj.weight", "layers.0.d.weight", "reroute.weight", "encoder.layer.0.output.dense",
    "mlp.shared_experts.up_proj.weight", "scoreboard.weight", "upscale.weight", "experts.0.w1.weight",
    "vq.in_proj.weight", "self_attn.kv_a_proj_with_mqa.weight", "normalizer_dense.weight", "tensor_scale_proj.weight",
    "time_mix_proj.weight", "ssm_out.weight", "time_emb.weight", "shared_expert.gate_proj.weight", "a_logits.weight",
    "sgu.gating.proj.weight", "tokens_proj.weight", "tokenizer.A.weight",
)  # fmt: skip
SHAPE = (32, 64)


def flat(groups):
    return [name for names in groups.values() for name in names]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    names = [*flat(STAY), *flat(WHATEVER), *QUANTIZED]
    assert len(set(names)) == len(names)
    path = tmp_path_factory.mktemp("names") / "m.safetensors"
    save_file(dict.fromkeys(names, np.ones(SHAPE, np.float16)), path)
    return path


def test_files_and_their_comparison_take_the_same_tensors(file):
    """What is measured is what would be quantized, and what stays has the same reason in both."""
    tasks = {task.stored.name: task.decision.reason for task in plan(file, "mxfp4").tasks}
    assert tasks == {r.name: r.reason for r in measure.file_reports(file, read_header(file), ("mxfp4",))}
    assert {name for name, reason in tasks.items() if reason is None} == set(QUANTIZED)


@pytest.mark.parametrize("kind", STAY)
def test_what_is_no_weight_stays_by_default_with_its_kind(kind):
    for name in STAY[kind]:
        reason = decide(default_rules("nvfp4"), site_of_tensor(name, SHAPE, -1)).reason
        assert reason is not None and kind.removeprefix("output ") in reason.replace("parameters of ", ""), name


@pytest.mark.parametrize("kind", WHATEVER)
def test_norms_biases_and_factors_stay_whatever_rules_say(kind, file):
    """In files, and in trees without a model alike: a stack of them is no matrix either."""
    rules = [ifjax.Rule(".*", "nvfp4")]
    tasks = {task.stored.name: task.decision for task in plan(file, rules).tasks}
    assert {tasks[name].reason for name in WHATEVER[kind]} == {kind}
    assert {name for name, d in tasks.items() if d.reason is None} == {*QUANTIZED, *flat(STAY)} - {
        name for name in flat(STAY) if tasks[name].reason}  # fmt: skip
    params = {name: jnp.ones(SHAPE) for name in (*WHATEVER[kind], "debias_proj/kernel")}
    _, report = ifjax.quantize_params(params, ifjax.Rule(".*", "mxfp4", axis=-1))
    found = {entry.path: entry.reason for entry in report.entries}
    assert found == dict.fromkeys(WHATEVER[kind], kind) | {"debias_proj/kernel": None}
