"""Whole decoders against Hugging Face's models of other families with the same weights: logits, loss and all gradients.

Transformers takes norms, softmaxes and angles in fp32, whatever the weights are. Here all that it would do in fp32 is
done in float64, so that nothing is left but a difference in meaning.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe_dist.checkpoint.reshard import load_weights
from moe_dist.config.model import AttentionConfig, ModelConfig
from moe_dist.interop.accounts import Table
from moe_dist.interop.hf_import import import_folder
from moe_dist.interop.meaning import meaning
from moe_dist.interop.names import Pair, Place, theirs_of
from moe_dist.models.backends import plainest
from moe_dist.models.decoder import Decoder
from moe_dist.models.parameters import parameter_counts
from moe_dist.moe.router import Router
from moe_dist.parallel.mesh import single_process_mesh
from tests.unit.helpers import context, random_ids, tiny_model

LENGTH = 24


class Widely(TorchFunctionMode):
    """Where fp32 is asked for, float64 is given."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


_GPT = dict(
    num_experts=0,
    norm="layer",
    ff_bias=True,
    attention=dict(position="learned", qkv_bias=True, out_bias=True),
)
# Of each family: where it is in Transformers, its configuration in their words and in ours. All are decoders of 3
# layers, 16 wide, 4 query heads on 2 key/value heads and experts of width 24, but where they differ.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": (
        "llama.Llama",
        dict(intermediate_size=24, rope=dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
        dict(num_experts=0, attention=dict(rope_scaling="llama3", rope_factor=4.0, rope_original_len=8)),
    ),
    "llama, dynamic": (
        "llama.Llama",
        dict(intermediate_size=24, rope=dict(rope_type="dynamic"), max_position_embeddings=8, mlp_bias=True),
        dict(num_experts=0, ff_bias=True, attention=dict(rope_scaling="dynamic", rope_factor=4.0, rope_original_len=8)),
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
    "mistral": (
        "mistral.Mistral",
        dict(intermediate_size=24, sliding_window=5),
        dict(num_experts=0, attention=dict(window=5)),
    ),
    "mixtral": (
        "mixtral.Mixtral",
        dict(intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=True),
        dict(tie_embeddings=True),
    ),
    "solar_open": (
        "solar_open.SolarOpen",
        dict(
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=10,
            n_shared_experts=2,
            routed_scaling_factor=2.0,
            head_dim=6,
        ),
        dict(
            router="sigmoid",
            balance="loss",
            head_dim=6,
            expert_width=10,
            num_shared_experts=2,
            routed_scale=2.0,
        ),
    ),
    "granitemoe": (
        "granitemoe.GraniteMoe",
        dict(
            intermediate_size=24,
            num_local_experts=4,
            num_experts_per_tok=2,
            embedding_multiplier=3.0,
            residual_multiplier=0.4,
            attention_multiplier=0.3,
            logits_scaling=0.7,
        ),
        dict(
            embedding_multiplier=3.0,
            residual_multiplier=0.4,
            logits_scaling=0.7,
            attention=dict(score_multiplier=0.3),
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
    "jetmoe, more heads": (
        "jetmoe.JetMoe",
        dict(
            num_local_experts=4,
            num_experts_per_tok=3,
            intermediate_size=24,
            num_key_value_heads=2,
            kv_channels=6,
            rms_norm_eps=1e-6,
        ),
        dict(
            num_heads=2,
            num_kv_heads=2,
            head_dim=6,
            norm_eps=1e-6,
            out_bias=True,
            top_k=3,
            attention=dict(kind="switch", out_bias=True, moe=dict(num_experts=4, top_k=3, capacity_factor=None)),
        ),
    ),
    "gpt_bigcode": (
        "gpt_bigcode.GPTBigCode",
        dict(n_inner=24, n_positions=40, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
        dict(num_kv_heads=1, activation="gelu_tanh", max_positions=40) | _GPT,
    ),
    "gpt_bigcode, multi-head": (
        "gpt_bigcode.GPTBigCode",
        dict(multi_query=False, activation_function="gelu", n_positions=24, tie_word_embeddings=True)
        | dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
        dict(num_kv_heads=4, d_ff=64, activation="gelu", max_positions=24, tie_embeddings=True) | _GPT,
    ),
    "falcon": (
        "falcon.Falcon",
        dict(ffn_hidden_size=24),
        dict(num_experts=0, num_kv_heads=1, norm="layer", block="parallel", activation="gelu"),
    ),
    "falcon, new": (
        "falcon.Falcon",
        dict(new_decoder_architecture=True, num_kv_heads=2, tie_word_embeddings=True, activation="gelu_pytorch_tanh"),
        dict(d_ff=64, block="parallel_norms", activation="gelu_tanh", tie_embeddings=True)
        | dict(num_experts=0, norm="layer"),
    ),
    "falcon, one after the other": (
        "falcon.Falcon",
        dict(ffn_hidden_size=24, parallel_attn=False, multi_query=False, bias=True),
        dict(num_kv_heads=4, activation="gelu", attention=dict(qkv_bias=True, out_bias=True))
        | dict(num_experts=0, norm="layer", ff_bias=True),
    ),
}


def configured(settings: dict[str, Any]) -> ModelConfig:
    """Its balancing losses are off."""
    settings = dict(settings)
    attention, width = dict(settings.pop("attention", {})), settings.pop("expert_width", None)
    off = dict(balance_loss_coef=0.0, z_loss_coef=0.0)
    usual = dict(num_layers=3, tie_embeddings=False, rope_theta=500.0, attention="torch")
    model = tiny_model(**(usual | off | settings))
    if "moe" in attention:
        attention["moe"] = replace(model.moe, **attention["moe"], **off)
        attention["moe"] = replace(attention["moe"], d_ff=None, out_bias=False)
    model = replace(model, attention=AttentionConfig(backend="torch", **attention))
    return replace(model, moe=replace(model.moe, d_ff=width))


def ours(model: ModelConfig) -> Decoder:
    """What starts at 0 or 1 does not."""
    decoder = Decoder(model, single_process_mesh(), seed=1).double()
    scatter(decoder, ("open_E",))
    return decoder


def scatter(model: nn.Module, but: tuple[str, ...] = ()) -> None:
    """Vectors become others than 0 or 1, a matrix gets entries of a size that keeps activations near 1."""
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith((*but, "inv_freq")):
                continue
            noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(crc32(name.encode())))
            if value.dim() == 1:
                value += 0.3 * noise
            elif not but:
                value.copy_(noise * value.shape[-1] ** -0.5)
            value.copy_(value.float())


def theirs(where: str, settings: dict[str, Any], model: ModelConfig) -> nn.Module:
    """In float64, with weights that fp32 holds; angles are not rounded."""
    family, name = where.split(".")
    module, settings = pytest.importorskip(f"transformers.models.{family}"), dict(settings)
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
        made = getattr(module, f"{name}ForCausalLM")(config).double()
    scatter(made)
    return made


def imported(other: nn.Module, folder: Path) -> tuple[Decoder, Table]:
    """The decoder that an import makes of it, in float64, and the table of their tensors."""
    saved = {name: value.float() for name, value in other.state_dict().items()}
    other.save_pretrained(folder / "theirs", state_dict=saved)
    done = import_folder(folder / "theirs", folder / "ours", folder / "ours", None)
    decoder = Decoder(plainest(done.settings.model), single_process_mesh()).double()
    load_weights(folder / "ours" / "checkpoints" / "step-000000", decoder, checked=True)
    return decoder, done.table


def as_theirs(values: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Values by our names, by theirs in a folder."""

    def whole(parts: list[tuple[Pair, int]]) -> Tensor:
        units = [
            pair.layout.to_theirs([_part(values, place) for place in pair.ours], table.heads)[at] for pair, at in parts
        ]
        return units[0] if parts[0][0].theirs[parts[0][1]].expert is None else torch.stack(units)

    trained = [pair for pair in table.pairs if all(place.name in values for place in pair.ours)]
    return {name: whole(parts) for name, parts in theirs_of(trained).items()}


def _part(values: Mapping[str, Tensor], place: Place) -> Tensor:
    value = values[place.name]
    return value if place.expert is None else value[place.expert]


def in_a_folder(model: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names that they have in a folder, where Transformers keeps experts apart."""
    loading = pytest.importorskip("transformers.core_model_loading")
    return loading.revert_weight_conversion(model, values)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_loss_and_gradients_are_theirs(name: str, tmp_path: Path) -> None:
    where, their_settings, our_settings = FAMILIES[name]
    wanted = replace(configured(our_settings), vocab_size=256)
    other = theirs(where, their_settings, wanted)
    model, table = imported(other, tmp_path)
    assert meaning(model.config) == meaning(wanted)
    assert parameter_counts(model.config).total == sum(param.numel() for param in other.parameters())
    off = dict(balance_loss_coef=0.0, z_loss_coef=0.0, balance="loss")
    for part in [part for part in model.modules() if isinstance(part, Router)]:
        part.moe = replace(part.moe, **off)
    ids = random_ids(2, LENGTH, 256)
    inputs_BS, targets_BS = ids[:, :-1], ids[:, 1:]
    with Widely():
        expected = other(input_ids=inputs_BS).logits
    logits = model(inputs_BS, None, context(), "logits")
    assert logits.dtype == expected.dtype == torch.float64 and logits.abs().max() > 1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    output = model(inputs_BS, targets_BS, context())
    loss = F.cross_entropy(expected.flatten(0, 1), targets_BS.flatten())
    torch.testing.assert_close(output.nll, loss.detach(), rtol=0, atol=1e-12)
    output.loss.backward()
    loss.backward()
    grads = in_a_folder(other, {name: param.grad for name, param in other.named_parameters()})
    found = as_theirs({name: param.grad for name, param in model.named_parameters()}, table)
    assert sorted(found) == sorted(grads)
    for tensor, grad in grads.items():
        assert (found[tensor] - grad).norm() <= 1e-11 * grad.norm().clamp(min=1e-2), tensor


@pytest.mark.parametrize("name", FAMILIES)
def test_pieces_with_a_cache_are_theirs(name: str, tmp_path: Path) -> None:
    """Also beyond the length first trained on, where dynamic scaling leaves the keys in the cache as they are."""
    where, their_settings, our_settings = FAMILIES[name]
    other = theirs(where, their_settings, replace(configured(our_settings), vocab_size=256))
    model, _ = imported(other, tmp_path)
    ids = random_ids(2, LENGTH, 256)
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
            logits = ours(configured(settings))(ids, None, context(), "logits")
            for option in settings.get("attention", {}).keys() - {"kind", "moe", "rope_factor", "rope_original_len"}:
                less = {key: value for key, value in settings["attention"].items() if key != option}
                if option == "rope_scaling":
                    less = {key: value for key, value in less.items() if not key.startswith("rope_")}
                other = ours(configured(settings | {"attention": less}))(ids, None, context(), "logits")
                assert (other - logits).abs().max() > 1e-4, f"{name} without {option}"
            for option in settings.keys() & {"norm", "ff_bias", "block"}:
                less = {key: value for key, value in settings.items() if key != option}
                other = ours(configured(less))(ids, None, context(), "logits")
                assert (other - logits).abs().max() > 1e-4, f"{name} without {option}"
