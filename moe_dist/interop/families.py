"""The families of Hugging Face models that come in and go out: their settings and the names of their tensors.

| model_type  | tensors (names.py) | beside Llama's layers                                                       |
|-------------|--------------------|-----------------------------------------------------------------------------|
| llama       | LLAMA              | rope_scaling of every kind but longrope; biases                             |
| mistral     | LLAMA              | one window                                                                  |
| qwen2       | LLAMA              | biases of q, k, v; windows layer by layer                                   |
| qwen3       | LLAMA              | RMSNorm of q and k by head                                                  |
| mixtral     | MIXTRAL            | experts, weights divided by their sum                                       |
| qwen2_moe   | QWEN2_MOE          | biases of q, k, v; a gated shared expert; dense layers                      |
| qwen3_moe   | QWEN_MOE           | RMSNorm of q and k by head; dense layers                                    |
| olmoe       | QWEN_MOE           | RMSNorm of q and k over all heads; clip_qkv                                 |
| gpt_oss     | GPT_OSS            | biases everywhere, sinks, windows, clamped SwiGLU, yarn                     |
| glm4_moe    | GLM4_MOE           | sigmoid scores with a bias, shared experts, heads half turned, dense layers |
| solar_open  | GLM4_MOE           | sigmoid scores with a bias, shared experts                                  |
| granitemoe  | GRANITE_MOE        | four multipliers                                                            |
| jetmoe      | JETMOE             | attention experts                                                           |
| gpt_bigcode | GPT_BIGCODE        | LayerNorm, learned positions, biases everywhere, gelu without a gate        |
| falcon      | FALCON             | LayerNorm, feed-forwards beside attention, gelu without a gate              |

Refused, because the configuration cannot say it (the rules and `UNLIKE` of config_json.py say which, a line each):
DeepSeek's latent attention, an rms_norm_eps of JetMoE that is not 1e-6, ALiBi of Falcon, yarn with a factor of its own
for scores, weights that are quantised. What acts in training alone is not taken over and said: dropout, noise of
routers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from moe_dist.config.model import ModelConfig
from moe_dist.interop import names
from moe_dist.interop.attention import (
    AttentionExperts,
    EveryWindow,
    FalconBlock,
    Heads,
    MultiQuery,
    ScoreMultiplier,
    Windows,
)
from moe_dist.interop.names import Row
from moe_dist.interop.rope import Rope
from moe_dist.interop.settings import (
    Choice,
    FirstDense,
    Fixed,
    FourFold,
    Key,
    Only,
    Rules,
    SparseStep,
    TopK,
    Width,
)


@dataclass(frozen=True)
class Family:
    """architecture: what Transformers calls the class. rows: of its tensors. rules: of its settings. by_block: rows
    that hang on `model.block`."""

    model_type: str
    architecture: str
    rows: tuple[Row, ...]
    rules: Rules
    by_block: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)

    def rows_of(self, model: ModelConfig) -> tuple[Row, ...]:
        return self.rows + self.by_block.get(model.block, ())


def _sizes(tied: bool = False) -> Rules:
    return (
        Key("vocab_size", "vocab_size"),
        Key("hidden_size", "d_model"),
        Key("num_hidden_layers", "num_layers"),
        Key("tie_word_embeddings", "tie_embeddings", tied),
    )


def _activation(key: str = "hidden_act") -> Choice:
    return Choice(key, "activation", {"silu": "swiglu", "gelu": "geglu"}, "silu")


# Without a gate. gelu_new and gelu_fast are other ways to write the form with tanh.
_UNGATED = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
_BASE: Rules = (*_sizes(), Key("rms_norm_eps", "norm_eps"), _activation())
_DENSE = Key("intermediate_size", "d_ff")
_BOTH_BIASES = Key("attention_bias", "attention.qkv_bias attention.out_bias", False)
_LOSS = Key("router_aux_loss_coef", "moe.balance_loss_coef", 0.001)
_LAST = Windows(lambda layer, theirs: layer >= theirs.get("max_window_layers", 28))
_ODD = Windows(lambda layer, theirs: layer % 2 == 0, switched=False, default=128)
_BIASED_SIGMOID: Rules = (
    Fixed({"moe.router": "sigmoid", "moe.balance": "sign"}),
    Key("attention_bias", "attention.qkv_bias", False),
    Key("n_routed_experts", "moe.num_experts"),
    Width("moe_intermediate_size"),
    Key("n_shared_experts", "moe.num_shared_experts", 1),
    Key("n_group", "moe.num_groups", 1),
    Key("topk_group", "moe.top_k_groups", 1),
    Key("routed_scaling_factor", "moe.routed_scale", 1.0),
    TopK("norm_topk_prob"),
)
_QWEN_LAYERS: Rules = (
    Key("num_experts num_local_experts", "moe.num_experts"),
    Width("moe_intermediate_size"),
    _DENSE,
    SparseStep(),
)

_LLAMA: Rules = (
    *_BASE,
    Heads(),
    Rope(),
    _DENSE,
    _BOTH_BIASES,
    Key("mlp_bias", "ff_bias", False),
)
_ALL = (
    Family("llama", "LlamaForCausalLM", names.LLAMA, _LLAMA),
    Family("mistral", "MistralForCausalLM", names.LLAMA, (*_BASE, Heads(8), Rope(), _DENSE, EveryWindow(default=4096))),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        names.LLAMA,
        (*_BASE, Heads(32), Rope(), _DENSE, Fixed({"attention.qkv_bias": True}), _LAST),
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        names.LLAMA,
        (*_BASE, Heads(32, 128), Rope(), _DENSE, Fixed({"attention.qk_norm": "head"}), _BOTH_BIASES, _LAST),
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        names.MIXTRAL,
        (
            *_BASE,
            Heads(8),
            Rope(theta=1e6),
            EveryWindow(),
            Key("num_local_experts", "moe.num_experts"),
            Width("intermediate_size", also_dense=True),
            TopK(),
            _LOSS,
        ),
    ),
    Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        names.QWEN2_MOE,
        (
            *_BASE,
            Heads(16),
            Rope(),
            Windows(lambda layer, theirs: layer % 2 == 0 and layer < theirs.get("max_window_layers", 28)),
            Key("qkv_bias", "attention.qkv_bias", True),
            *_QWEN_LAYERS,
            TopK("norm_topk_prob", False),
            Fixed({"moe.num_shared_experts": 1, "moe.shared_gate": True}),
            Key("shared_expert_intermediate_size", "moe.shared_d_ff"),
            _LOSS,
        ),
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        names.QWEN_MOE,
        (
            *_BASE,
            Heads(4),
            Rope(),
            EveryWindow(switched=True, default=4096),
            Fixed({"attention.qk_norm": "head"}),
            _BOTH_BIASES,
            *_QWEN_LAYERS,
            TopK("norm_topk_prob", False),
            _LOSS,
        ),
    ),
    Family(
        "olmoe",
        "OlmoeForCausalLM",
        names.QWEN_MOE,
        (
            *_BASE,
            Heads(),
            Rope(),
            Fixed({"attention.qk_norm": "width"}),
            _BOTH_BIASES,
            Key("clip_qkv", "attention.clip_qkv", None),
            Key("num_experts", "moe.num_experts"),
            Width("intermediate_size", also_dense=True),
            TopK("norm_topk_prob", False),
            Key("router_aux_loss_coef", "moe.balance_loss_coef", 0.01),
        ),
    ),
    Family(
        "gpt_oss",
        "GptOssForCausalLM",
        names.GPT_OSS,
        (
            *_sizes(),
            Key("rms_norm_eps", "norm_eps"),
            Heads(8, 64),
            Rope(
                theta=150000.0,
                scaling=dict(
                    rope_type="yarn", factor=32.0, original_max_position_embeddings=4096, beta_fast=32.0, truncate=False
                ),
            ),
            _ODD,
            Fixed({"attention.sinks": True, "moe.expert_bias": True, "moe.router_bias": True}),
            Fixed({"activation": "clamped_swiglu"}),
            Only("hidden_act", "silu", "the clamped SwiGLU here is made of silu"),
            Only("swiglu_alpha", 1.702, "the clamped SwiGLU here has 1.702"),
            Only("swiglu_limit", 7.0, "the clamped SwiGLU here is cut at 7"),
            Key("attention_bias", "attention.qkv_bias attention.out_bias", True),
            Key("num_local_experts", "moe.num_experts"),
            Width("intermediate_size", also_dense=True),
            TopK(),
            _LOSS,
        ),
    ),
    Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        names.GLM4_MOE,
        (
            *_BASE,
            Heads(8),
            Rope(share=0.5, partial=True),
            _DENSE,
            *_BIASED_SIGMOID,
            FirstDense(),
            Choice("use_qk_norm", "attention.qk_norm", {False: "none", True: "head"}, False),
        ),
    ),
    Family(
        "solar_open",
        "SolarOpenForCausalLM",
        names.GLM4_MOE,
        (*_BASE, Heads(8, 128), Rope(theta=1e6, partial=True), *_BIASED_SIGMOID),
    ),
    Family(
        "granitemoe",
        "GraniteMoeForCausalLM",
        names.GRANITE_MOE,
        (
            *_BASE,
            Heads(),
            Rope(),
            _BOTH_BIASES,
            Key("embedding_multiplier", "embedding_multiplier", 1.0),
            Key("residual_multiplier", "residual_multiplier", 1.0),
            Key("logits_scaling", "logits_scaling", 1.0),
            ScoreMultiplier(),
            Key("num_local_experts", "moe.num_experts"),
            Width("intermediate_size", also_dense=True),
            TopK(),
            _LOSS,
        ),
    ),
    Family(
        "jetmoe",
        "JetMoeForCausalLM",
        names.JETMOE,
        (
            *_sizes(tied=True),
            _activation("activation_function"),
            Rope(),
            Key("num_local_experts", "moe.num_experts"),
            Width("intermediate_size", also_dense=True),
            TopK(),
            Key("aux_loss_coef", "moe.balance_loss_coef", 0.01),
            AttentionExperts(),
        ),
    ),
    Family(
        "gpt_bigcode",
        "GPTBigCodeForCausalLM",
        names.GPT_BIGCODE,
        (
            Key("vocab_size", "vocab_size"),
            Key("n_embd", "d_model"),
            Key("n_layer", "num_layers"),
            Key("tie_word_embeddings", "tie_embeddings", True),
            Key("n_positions", "max_positions", 1024),
            MultiQuery("n_head"),
            FourFold("n_inner", "n_embd"),
            Key("layer_norm_epsilon", "norm_eps", 1e-5),
            Choice("activation_function", "activation", _UNGATED, "gelu_pytorch_tanh"),
            Fixed({"norm": "layer", "ff_bias": True, "attention.position": "learned"}),
            Fixed({"attention.qkv_bias": True, "attention.out_bias": True}),
            Only("scale_attn_weights", True, "scores here are divided by the root of a head's width"),
            Only("add_cross_attention", False, "there is no other sequence to attend to here"),
        ),
    ),
    Family(
        "falcon",
        "FalconForCausalLM",
        names.FALCON,
        (
            *_sizes(tied=True),
            FalconBlock(),
            Rope(),
            FourFold("ffn_hidden_size", "hidden_size"),
            Key("layer_norm_epsilon", "norm_eps", 1e-5),
            Choice("activation", "activation", _UNGATED, "gelu"),
            Key("bias", "attention.qkv_bias attention.out_bias ff_bias", False),
            Fixed({"norm": "layer"}),
            Only("alibi", False, "ALiBi of Falcon is added before scores are divided, and here after that"),
        ),
        names.FALCON_NORMS,
    ),
)
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _ALL}
