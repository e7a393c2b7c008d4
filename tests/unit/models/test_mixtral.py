"""The whole decoder against Hugging Face's Mixtral with the same weights."""

import pytest
import torch
from torch import nn

from moe_dist.models.decoder import Decoder
from moe_dist.parallel.mesh import single_process_mesh
from tests.unit.helpers import context, random_ids, tiny_model


def copied(model: Decoder) -> nn.Module:
    """MixtralForCausalLM with the decoder's weights; Hugging Face stores every linear weight [out, in]."""
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = model.config
    other = mixtral.MixtralForCausalLM(
        mixtral.MixtralConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            num_local_experts=config.moe.num_experts,
            num_experts_per_tok=config.moe.top_k,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            attn_implementation="eager",
            experts_implementation="eager",
        )
    )
    head = 2 * config.head_width
    with torch.no_grad():
        other.model.embed_tokens.weight.copy_(model.embedding.weight)
        other.lm_head.weight.copy_(model.output.weight)
        other.model.norm.weight.copy_(model.output.norm.weight)
        for theirs, ours in zip(other.model.layers, model.blocks, strict=True):
            theirs.input_layernorm.weight.copy_(ours.attention_norm.weight)
            theirs.post_attention_layernorm.weight.copy_(ours.feed_forward_norm.weight)
            key_value_G2PD = ours.attention.key_value.weight.view(-1, 2, head // 2, config.d_model)
            theirs.self_attn.q_proj.weight.copy_(ours.attention.query.weight)
            theirs.self_attn.k_proj.weight.copy_(key_value_G2PD[:, 0].flatten(0, 1))
            theirs.self_attn.v_proj.weight.copy_(key_value_G2PD[:, 1].flatten(0, 1))
            theirs.self_attn.o_proj.weight.copy_(ours.attention.out.weight.t())
            theirs.mlp.gate.weight.copy_(ours.feed_forward.router.weight)
            experts = ours.feed_forward.experts
            theirs.mlp.experts.gate_up_proj.copy_(torch.cat([experts.w_gate, experts.w_up], dim=1))
            theirs.mlp.experts.down_proj.copy_(ours.feed_forward.experts.w_out.transpose(1, 2))
    return other


@pytest.mark.parametrize("attention", ["torch", "flash"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_loss_and_gradients_are_mixtrals(kv_heads: int, attention: str) -> None:
    changes = dict(num_kv_heads=kv_heads, attention=attention, tie_embeddings=False, rope_theta=500.0, norm_eps=1e-3)
    model = Decoder(tiny_model(**changes, balance_loss_coef=0.0, z_loss_coef=0.0), single_process_mesh(), seed=1)
    for name, param in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(param, 0.5, 1.5)
    other, ids = copied(model), random_ids(3, 18)
    theirs = other(input_ids=ids, labels=ids)
    logits = model(ids, None, context(), "logits")
    torch.testing.assert_close(logits, theirs.logits, rtol=1e-5, atol=1e-5)
    assert theirs.logits.abs().max() > 1

    output = model(ids[:, :-1], ids[:, 1:], context())  # Hugging Face shifts the labels itself
    torch.testing.assert_close(output.nll, theirs.loss.detach(), rtol=1e-6, atol=1e-6)
    output.loss.backward()
    theirs.loss.backward()
    ours, last = model.blocks[0], other.model.layers[0]
    for found, expected in (
        (model.embedding.weight, other.model.embed_tokens.weight.grad),
        (model.output.weight, other.lm_head.weight.grad),
        (model.output.norm.weight, other.model.norm.weight.grad),
        (ours.attention_norm.weight, last.input_layernorm.weight.grad),
        (ours.attention.query.weight, last.self_attn.q_proj.weight.grad),
        (ours.attention.out.weight, last.self_attn.o_proj.weight.grad.t()),
        (ours.feed_forward.router.weight, last.mlp.gate.weight.grad),
        (ours.feed_forward.experts.w_gate, last.mlp.experts.gate_up_proj.grad.chunk(2, dim=1)[0]),
        (ours.feed_forward.experts.w_up, last.mlp.experts.gate_up_proj.grad.chunk(2, dim=1)[1]),
        (ours.feed_forward.experts.w_out, last.mlp.experts.down_proj.grad.transpose(1, 2)),
    ):
        assert (found.grad - expected).norm() < 2e-5 * expected.norm()
