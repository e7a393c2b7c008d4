"""Whole decoders against Hugging Face's models of other families with the same weights: logits, loss and all gradients.

Transformers takes norms, softmaxes and angles in fp32, whatever the weights are. Here all that it would do in fp32 is
done in float64, so that nothing is left but a difference in meaning.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe_dist.attention.multi_query import CausalSelfAttention
from moe_dist.attention.switch import SwitchAttention
from moe_dist.config.model import AttentionConfig, ModelConfig
from moe_dist.models.decoder import Decoder
from moe_dist.moe.layer import MoE
from moe_dist.parallel.mesh import single_process_mesh
from tests.unit.helpers import context, random_ids, tiny_model

LENGTH = 24
Named = Iterator[tuple[str, Tensor]]


class Widely(TorchFunctionMode):
    """Where fp32 is asked for, float64 is given."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


# Of each family: where it is in Transformers, its configuration in their words and in ours. All are decoders of 3
# layers, 16 wide, with 32 tokens, 4 query heads on 2 key/value heads and experts of width 24, but where they differ.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": (
        "llama.Llama",
        dict(intermediate_size=24, rope=dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
        dict(num_experts=0, attention=dict(rope_scaling="llama3", rope_factor=4.0, rope_original_len=8)),
    ),
    "llama, dynamic": (
        "llama.Llama",
        dict(intermediate_size=24, rope=dict(rope_type="dynamic"), max_position_embeddings=8),
        dict(num_experts=0, attention=dict(rope_scaling="dynamic", rope_factor=4.0, rope_original_len=8)),
    ),
    "qwen2": (
        "qwen2.Qwen2",
        dict(intermediate_size=24),
        dict(num_experts=0, attention=dict(qkv_bias=True)),
    ),
    "qwen3": (
        "qwen3.Qwen3",
        dict(intermediate_size=24, head_dim=6),
        dict(num_experts=0, head_dim=6, attention=dict(qk_norm="head")),
    ),
    "mixtral, top-1": (
        "mixtral.Mixtral",
        dict(intermediate_size=24, num_local_experts=4, num_experts_per_tok=1, sliding_window=5),
        dict(top_k=1, renormalize_top_1=True, attention=dict(window=5)),
    ),
    "qwen2_moe": (
        "qwen2_moe.Qwen2Moe",
        dict(
            num_experts=4,
            num_experts_per_tok=2,
            intermediate_size=24,
            moe_intermediate_size=10,
            shared_expert_intermediate_size=14,
            mlp_only_layers=[0],
        ),
        dict(
            first=1,
            expert_width=10,
            renormalize=False,
            num_shared_experts=1,
            shared_d_ff=14,
            shared_gate=True,
            attention=dict(qkv_bias=True),
        ),
    ),
    "qwen3_moe": (
        "qwen3_moe.Qwen3Moe",
        dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=6, norm_topk_prob=True),
        dict(head_dim=6, attention=dict(qk_norm="head")),
    ),
    "olmoe": (
        "olmoe.Olmoe",
        dict(num_experts=4, num_experts_per_tok=2, intermediate_size=24, norm_topk_prob=False, clip_qkv=0.9),
        dict(renormalize=False, attention=dict(qk_norm="width", clip_qkv=0.9)),
    ),
    "gpt_oss": (
        "gpt_oss.GptOss",
        dict(
            num_local_experts=4,
            num_experts_per_tok=2,
            intermediate_size=24,
            head_dim=6,
            sliding_window=5,
            rope=dict(rope_type="yarn", truncate=False, original_max_position_embeddings=64),
        ),
        dict(
            head_dim=6,
            activation="clamped_swiglu",
            expert_bias=True,
            router_bias=True,
            attention=dict(
                qkv_bias=True,
                out_bias=True,
                sinks=True,
                window=[5, None],
                rope_scaling="yarn",
                rope_factor=4.0,
                rope_original_len=64,
                rope_truncate=False,
            ),
        ),
    ),
    "glm4_moe": (
        "glm4_moe.Glm4Moe",
        dict(
            n_routed_experts=4,
            num_experts_per_tok=2,
            intermediate_size=24,
            moe_intermediate_size=10,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=2,
            topk_group=1,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
            use_qk_norm=True,
            attention_bias=True,
            rope=dict(partial_rotary_factor=0.5),
            num_mtp_layers=0,
        ),
        dict(
            router="sigmoid",
            balance="loss",
            first=1,
            expert_width=10,
            num_shared_experts=1,
            num_groups=2,
            top_k_groups=1,
            routed_scale=2.5,
            attention=dict(qkv_bias=True, qk_norm="head", rotary_share=0.5),
        ),
    ),
    "jetmoe": (
        "jetmoe.JetMoe",
        dict(
            num_local_experts=4,
            num_experts_per_tok=2,
            intermediate_size=24,
            num_key_value_heads=1,
            kv_channels=6,
            rms_norm_eps=1e-6,
        ),
        dict(
            num_heads=1,
            num_kv_heads=1,
            head_dim=6,
            norm_eps=1e-6,
            out_bias=True,
            attention=dict(kind="switch", out_bias=True, moe=dict(num_experts=4, top_k=2, capacity_factor=None)),
        ),
    ),
}


def ours(settings: dict[str, Any]) -> Decoder:
    """Its balancing losses are off, and what starts at 0 or 1 does not."""
    settings = dict(settings)
    attention, width = dict(settings.pop("attention")), settings.pop("expert_width", None)
    off = dict(balance_loss_coef=0.0, z_loss_coef=0.0)
    model = tiny_model(num_layers=3, tie_embeddings=False, rope_theta=500.0, attention="torch", **(off | settings))
    if "moe" in attention:
        attention["moe"] = replace(model.moe, **attention["moe"], **off)
        attention["moe"] = replace(attention["moe"], d_ff=None, out_bias=False)
    model = replace(model, attention=AttentionConfig(backend="torch", **attention))
    model = replace(model, moe=replace(model.moe, d_ff=width))
    decoder = Decoder(model, single_process_mesh(), seed=1).double()
    with torch.no_grad():
        for name, value in [*decoder.named_parameters(), *decoder.named_buffers()]:
            if value.dim() == 1 and "open_E" not in name:
                value += 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name)))
    return decoder


def theirs(where: str, settings: dict[str, Any], model: ModelConfig) -> nn.Module:
    family, name = where.split(".")
    module = pytest.importorskip(f"transformers.models.{family}")
    rope = dict(rope_type="default", rope_theta=500.0) | settings.pop("rope", {})
    if rope["rope_type"] != "default":
        rope = dict(factor=4.0, original_max_position_embeddings=8) | rope
    usual = dict(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        rms_norm_eps=model.norm_eps,
        rope_parameters=rope,
        pad_token_id=None,
        tie_word_embeddings=False,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    with Widely():
        config = getattr(module, f"{name}Config")(**(usual | settings))
        return getattr(module, f"{name}ForCausalLM")(config).double()


def of_decoder(model: Decoder, of: Callable[[Tensor], Tensor], family: str) -> Named:
    """Their name of each tensor, and what ours makes of it. of: the tensor itself, or its gradient."""
    yield "model.embed_tokens.weight", of(model.embedding.weight)
    yield "model.norm.weight", of(model.output.norm.weight)
    yield "lm_head.weight", of(model.output.weight)
    for number, block in enumerate(model.blocks):
        home = f"model.layers.{number}"
        yield f"{home}.input_layernorm.weight", of(block.attention_norm.weight)
        yield f"{home}.post_attention_layernorm.weight", of(block.feed_forward_norm.weight)
        if isinstance(block.attention, SwitchAttention):
            yield from of_jetmoe(block, of, home)
            continue
        yield from of_attention(block.attention, of, f"{home}.self_attn")
        if isinstance(block.feed_forward, MoE):
            yield from of_experts(block.feed_forward, of, f"{home}.mlp", family)
        else:
            yield from of_dense(block.feed_forward, of, f"{home}.mlp")


def of_attention(layer: CausalSelfAttention, of: Callable[[Tensor], Tensor], home: str) -> Named:
    kv = layer.key_value
    for kind, param in (("weight", kv.weight), ("bias", kv.bias)):
        if param is not None:
            k, v = of(param).unflatten(0, (-1, 2, layer.head_dim)).unbind(1)
            yield f"{home}.k_proj.{kind}", k.flatten(0, 1)
            yield f"{home}.v_proj.{kind}", v.flatten(0, 1)
    yield f"{home}.q_proj.weight", of(layer.query.weight)
    if layer.query.bias is not None:
        yield f"{home}.q_proj.bias", of(layer.query.bias)
    yield f"{home}.o_proj.weight", of(layer.out.weight).t()
    if layer.out_bias is not None:
        yield f"{home}.o_proj.bias", of(layer.out_bias.bias)
    if layer.qk_norm is not None:
        yield f"{home}.q_norm.weight", of(layer.qk_norm.query_weight)
        yield f"{home}.k_norm.weight", of(layer.qk_norm.key_weight)
    if layer.sinks_H is not None:
        yield f"{home}.sinks", of(layer.sinks_H)


def of_dense(layer: nn.Module, of: Callable[[Tensor], Tensor], home: str) -> Named:
    yield f"{home}.gate_proj.weight", of(layer.gate.weight)
    yield f"{home}.up_proj.weight", of(layer.up.weight)
    yield f"{home}.down_proj.weight", of(layer.down.weight).t()


def of_experts(layer: MoE, of: Callable[[Tensor], Tensor], home: str, family: str) -> Named:
    held, router = layer.experts, "router" if family == "gpt_oss" else "gate"
    yield f"{home}.{router}.weight", of(layer.router.weight)
    gate, up = of(held.w_gate), of(held.w_up)
    if family == "gpt_oss":  # [in, out], gate and up by turns
        yield f"{home}.{router}.bias", of(layer.router.logit_bias)
        yield f"{home}.experts.gate_up_proj", torch.stack((gate, up), 2).flatten(1, 2).transpose(1, 2)
        yield f"{home}.experts.gate_up_proj_bias", torch.stack((of(held.b_gate), of(held.b_up)), 2).flatten(1, 2)
        yield f"{home}.experts.down_proj", of(held.w_out)
        yield f"{home}.experts.down_proj_bias", of(held.b_out)
        return
    yield f"{home}.experts.gate_up_proj", torch.cat((gate, up), 1)
    yield f"{home}.experts.down_proj", of(held.w_out).transpose(1, 2)
    if layer.shared is not None:
        yield from of_dense(layer.shared, of, f"{home}.shared_expert" + ("s" if family == "glm4_moe" else ""))
    if layer.shared_gate is not None:
        yield f"{home}.shared_expert_gate.weight", of(layer.shared_gate.weight)


def of_jetmoe(block: nn.Module, of: Callable[[Tensor], Tensor], home: str) -> Named:
    attention, layer = block.attention, block.feed_forward
    experts = f"{home}.self_attention.experts"
    yield f"{home}.self_attention.kv_proj.weight", of(attention.key_value)
    yield f"{experts}.router.layer.weight", of(attention.router.weight)
    yield f"{experts}.input_linear.weight", of(attention.experts.w_query)
    yield f"{experts}.output_linear.weight", of(attention.experts.w_out).transpose(1, 2)
    yield f"{experts}.bias", of(attention.out_bias.bias)
    yield f"{home}.mlp.router.layer.weight", of(layer.router.weight)
    yield f"{home}.mlp.input_linear.weight", torch.cat((of(layer.experts.w_gate), of(layer.experts.w_up)), 1)
    yield f"{home}.mlp.output_linear.weight", of(layer.experts.w_out).transpose(1, 2)
    yield f"{home}.mlp.bias", of(layer.out_bias.bias)


def corrections(model: Decoder) -> Named:
    """Balancing biases, which have no gradient."""
    for number, block in enumerate(model.blocks):
        if isinstance(block.feed_forward, MoE) and getattr(block.feed_forward.router, "bias_E", None) is not None:
            yield f"model.layers.{number}.mlp.gate.e_score_correction_bias", block.feed_forward.router.bias_E


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_loss_and_gradients_are_theirs(name: str) -> None:
    where, their_settings, our_settings = FAMILIES[name]
    model, family = ours(our_settings), where.partition(".")[0]
    other, ids = theirs(where, dict(their_settings), model.config), random_ids(2, LENGTH)
    # Every tensor of theirs is one of ours, and the other way round.
    other.load_state_dict(dict(of_decoder(model, Tensor.detach, family)) | dict(corrections(model)))
    inputs_BS, targets_BS = ids[:, :-1], ids[:, 1:]
    with Widely():
        expected = other(input_ids=inputs_BS).logits
    logits = model(inputs_BS, None, context(), "logits")
    assert logits.dtype == expected.dtype == torch.float64 and logits.abs().max() > 1
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-12)
    output, loss = (
        model(inputs_BS, targets_BS, context()),
        F.cross_entropy(expected.flatten(0, 1), targets_BS.flatten()),
    )
    torch.testing.assert_close(output.nll, loss.detach(), rtol=0, atol=2e-12)
    output.loss.backward()
    loss.backward()
    grads = dict(other.named_parameters())
    for tensor, found in of_decoder(model, lambda param: param.grad, family):
        grad = grads.pop(tensor).grad
        assert (found - grad).norm() <= 1e-11 * grad.norm().clamp(min=1e-2), tensor
    assert not grads


@pytest.mark.parametrize("name", FAMILIES)
def test_pieces_with_a_cache_are_theirs(name: str) -> None:
    """Also beyond the length first trained on, where dynamic scaling leaves the keys in the cache as they are."""
    where, their_settings, our_settings = FAMILIES[name]
    model, family = ours(our_settings), where.partition(".")[0]
    other, ids = theirs(where, dict(their_settings), model.config), random_ids(2, LENGTH)
    other.load_state_dict(dict(of_decoder(model, Tensor.detach, family)) | dict(corrections(model)))
    kept, caches = pytest.importorskip("transformers").DynamicCache(config=other.config), model.new_caches(2, LENGTH)
    for piece in ids.split([6, 1, 5, 1, 11], 1):
        with torch.no_grad():
            with Widely():
                expected = other(input_ids=piece, cache=kept, use_cache=True).logits
            logits = model(piece, None, context(phase="dropless"), "logits", caches)
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-12)


def test_every_option_counts() -> None:
    """Without it the logits are others: what a family is compared in does something."""
    ids = random_ids(2, LENGTH)
    for name, (_, _, settings) in FAMILIES.items():
        with torch.no_grad():
            logits = ours(settings)(ids, None, context(), "logits")
            for option in settings["attention"].keys() - {"kind", "moe", "rope_factor", "rope_original_len"}:
                less = {key: value for key, value in settings["attention"].items() if key != option}
                if option == "rope_scaling":
                    less = {key: value for key, value in less.items() if not key.startswith("rope_")}
                other = ours(settings | {"attention": less})(ids, None, context(), "logits")
                assert (other - logits).abs().max() > 1e-4, f"{name} without {option}"
