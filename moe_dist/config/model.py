"""The model's part of the configuration: attention, experts, and what surrounds them. The rest is in schema.py."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pydantic import ConfigDict

STRICT: "ConfigDict" = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
"""Of pydantic, which parse.py alone imports, when it first checks something: importing a layer stays quick."""


CapacityFactor = float | None | list[float | None]
Window = int | None | list[int | None]


@dataclass(kw_only=True, slots=True)
class MoEConfig:
    """Mixture-of-Experts feed-forward layers."""

    __pydantic_config__ = STRICT

    num_experts: int = 8
    """Experts in each MoE layer. 0: every layer is a dense feed-forward."""
    top_k: int = 2
    """Experts that each token is sent to. 1 is the Switch layer."""
    d_ff: int | list[int] | None = None
    """Hidden width of one expert; a list gives each expert its own. null: model.d_ff."""
    every: int = 1
    """Every nth layer is MoE (the nth, 2nth, ...), the others are dense."""
    first: int | None = None
    """The first MoE layer, counted from 0; every nth after it is MoE too, and the others are dense. null: every - 1."""
    num_shared_experts: int = 0
    """Experts that every token passes through, beside the routed ones."""
    shared_d_ff: int | None = None
    """Hidden width of one of them. null: that of a routed expert."""
    shared_gate: bool = False
    """What they give is multiplied by a learned sigmoid of the token."""
    expert_bias: bool = False
    """Biases on the experts' matrices."""
    out_bias: bool = False
    """One bias on what the layer gives, whichever experts a token was sent to."""
    router: Literal["softmax", "sigmoid", "noisy", "expert_choice", "sinkhorn", "hash"] = "softmax"
    """softmax: the top_k most probable experts. sigmoid: by sigmoid score plus a bias that balances the load without a
    loss. noisy: softmax with learned noise, importance and load losses. expert_choice: each expert takes its best
    tokens; not causal, see docs/concepts/routing.md. sinkhorn: balanced over the micro-step in training; not
    causal there. hash: by token id, not learned."""
    router_bias: bool = False
    """With softmax and sigmoid: a learned bias on the logits."""
    jitter: float = 0.0
    """With router = softmax, in training: multiply its input by uniform numbers in [1 - jitter, 1 + jitter]."""
    num_groups: int = 1
    """With softmax and sigmoid: experts are in this many groups of neighbours ..."""
    top_k_groups: int = 1
    """... and a token chooses within its best top_k_groups of them, so that it travels to few ranks."""
    bias_update_rate: float = 1e-3
    """With sign in `balance`: how much the balancing bias of an expert moves at every step."""
    balance_bins: int = 1000
    """With quantile in `balance`: bins from which an expert's quantile is read. More for softmax with many experts,
    whose probabilities are small."""
    balance_ema: float = 0.0
    """With quantile in `balance`: share of the old bias in the new one."""
    routed_scale: float = 1.0
    """The weights of routed experts are multiplied by this."""
    importance_loss_coef: float = 1e-2
    """With router = noisy: weight of the squared coefficient of variation of the experts' summed weights."""
    load_loss_coef: float = 1e-2
    """With router = noisy: the same of the experts' expected load."""
    sinkhorn_iterations: int = 8
    """With router = sinkhorn: scalings of rows and columns."""
    renormalize: bool = True
    """With softmax, sigmoid and sinkhorn, and top_k > 1: divide the top_k router weights by their sum. Not done at
    top_k = 1: the router would get no gradient."""
    renormalize_top_1: bool = False
    """With top_k = 1, for models that were trained so: do it there too, so that every weight is 1. The router then
    learns from balancing and z-loss alone, and a run says so."""
    capacity_factor: CapacityFactor = 1.25
    """An expert takes C = max(min_capacity, ceil(capacity_factor * top_k * tokens / num_experts)) rows.
    null: dropless. A list gives each MoE layer its own."""
    capacity_schedule: dict[int, float | None] = field(default_factory=dict)
    """{step: factor}: from that optimizer step on, counted from 0, the factor of all layers."""
    eval_capacity_factor: CapacityFactor = None
    """The same for evaluation. null: evaluation drops nothing. When set, both losses are reported."""
    min_capacity: int = 1
    """Lower bound of C."""
    capacity_pool: int = 1
    """Neighbouring experts that share one limit, of capacity_pool * C rows. 1: each has its own. num_experts / ep: the
    budget of a rank. Divides num_experts / ep."""
    pool_floor: float = 0.0
    """With capacity_pool > 1: the first ceil(pool_floor * C) rows of each expert are sure, whatever its neighbours are
    asked for. Above 0 a later token can take an earlier one's place, that of a neighbour."""
    over_budget: Literal["drop", "error"] = "drop"
    """What happens in training when there is no room. drop: `overflow` says. error: the run ends, and tells which
    capacity_factor would have been enough; it costs a wait for the device in every layer."""
    capacity_scope: Literal["global", "local"] = "global"
    """global: all tokens of the data-parallel micro-step compete, so the dropped set does not depend on the layout.
    local: each rank caps its own tokens."""
    drop_policy: Literal["position", "score", "random"] = "position"
    """Who stays when an expert is full: the first tokens, the highest router weights, or a keyed random choice.
    Only `position` is causal: under `score` and `random` a later token can displace an earlier one."""
    drop_order: Literal["token", "choice"] = "token"
    """With drop_policy = position and top_k > 1, which come first. token: all choices of a token before any of the
    next. choice: the first choices of all tokens before any second choice, as GShard and DeepSpeed do; not causal."""
    overflow: Literal["drop", "reroute"] = "drop"
    """What becomes of an assignment that finds its expert full. drop: it adds nothing, the residual carries the token.
    reroute: it asks for the token's next choice that has room, until all experts were asked."""
    balance: Literal["auto", "none", "loss", "sign", "quantile", "loss+sign", "loss+quantile"] = "auto"
    """How experts are kept level. loss: a loss teaches the router. sign and quantile, with softmax and sigmoid: a bias
    on the scores, by which experts are chosen and not weighed, moves by a fixed rate against the load, or is set once
    a step to what gives each its share of the tokens. auto: loss, with sigmoid loss+sign. A noisy router's own losses
    have coefficients of their own."""
    balance_loss_coef: float = 1e-2
    """With loss in `balance`: weight of the load-balancing loss, E * sum_i f_i P_i (Switch Transformers, eq. 4)."""
    balance_scope: Literal["global", "local", "sequence"] = "global"
    """Over which tokens that loss is taken: all of the micro-step, those of one rank, or each sequence on its own.
    `local` depends on how many ranks there are."""
    z_loss_coef: float = 1e-3
    """Weight of the router z-loss, mean(logsumexp(logits)^2) (ST-MoE, eq. 5)."""
    dispatch: Literal["auto", "local", "all_to_all", "hierarchical", "all_gather"] = "auto"
    """How rows reach their experts. all_to_all: straight to their rank. hierarchical: within the node first, then
    across nodes in fewer, larger messages. all_gather: every rank of the group sees all tokens. auto: local at ep = 1,
    else all_to_all."""
    wire: Literal["ragged", "padded"] = "ragged"
    """all_to_all messages. ragged: exactly the rows kept; the host waits for their number. padded: blocks of equal size
    for every pool of experts; under a capacity limit a GPU is not asked for numbers, as a block has room for all that
    the limit lets in. Under global scope that is up to ep times what is sent on average; local scope wastes less."""
    wire_dtype: Literal["same", "bf16", "fp8"] = "same"
    """Precision of rows between ranks: that of the activations, or less. fp8 (e4m3, one scale a row) is for the way to
    the experts; the way back and gradients then travel in bf16."""
    overlap_chunks: int = 1
    """Parts of a rank's experts whose rows travel on their own, so that one part computes while the next is on its way.
    Divides num_experts / ep."""
    experts: Literal["auto", "loop", "bmm", "grouped_mm", "triton"] = "auto"
    """How the experts compute: one after another (the oracle), padded batched GEMM, grouped GEMM, or our Triton kernels
    with gather, activation and weighting fused in. auto: grouped_mm, which on CPU is a fused loop of ours; loop where
    experts differ in width."""
    cpu_products: Literal["auto", "measured", "onednn", "mixed", "mkl"] = "auto"
    """With experts = grouped_mm on CPU in fp32, who computes products: oneDNN, MKL, or oneDNN into the hidden units and
    MKL out of them. auto: onednn, or mkl where torch has no oneDNN. measured: the fastest of them for this machine and
    shape, found out in seconds when a run starts anew and kept in its config.yaml; a run started anew may then be
    rounded otherwise."""

    @property
    def first_layer(self) -> int:
        """`first`, and what null stands for."""
        return self.every - 1 if self.first is None else self.first

    def layers(self, num_layers: int) -> range:
        """Numbers of the blocks that are MoE, of a model of num_layers."""
        return range(self.first_layer, num_layers, max(self.every, 1)) if self.num_experts > 0 else range(0)

    def layer_count(self, num_layers: int) -> int:
        """How many of them there are; also of numbers that no memory could hold, which rules are asked about."""
        return max(-(-(num_layers - self.first_layer) // max(self.every, 1)), 0) if self.num_experts > 0 else 0

    @property
    def renormalizes(self) -> bool:
        """Whether weights of a token are divided by their sum, by routers that do so."""
        return self.renormalize and (self.top_k > 1 or self.renormalize_top_1)

    @property
    def balanced_by(self) -> str:
        """`balance`, and what auto stands for."""
        if self.balance != "auto":
            return self.balance
        return "loss+sign" if self.router == "sigmoid" else "loss"

    def factor_at(self, step: int) -> CapacityFactor:
        """The capacity factor of training step `step`, counted from 0."""
        begun = [first for first in self.capacity_schedule if first <= step]
        return self.capacity_schedule[max(begun)] if begun else self.capacity_factor

    @staticmethod
    def is_dropless(factor: CapacityFactor) -> bool:
        """Whether this capacity factor limits no layer."""
        return all(each is None for each in (factor if isinstance(factor, list) else [factor]))

    def schedule_phase(self, step: int) -> int:
        """How many entries of capacity_schedule have begun; the capacity factor is the same until that changes."""
        return sum(first <= step for first in self.capacity_schedule)


@dataclass(kw_only=True, slots=True)
class RoutedAttentionConfig:
    """With model.attention.kind = routed: which tokens look further than their neighbourhood."""

    __pydantic_config__ = STRICT

    num_experts: int = 2
    """Attention experts, each of num_heads heads and with routing tokens of its own."""
    num_routed_queries: int = 32
    """Queries that each expert takes out of a window; from routed_window on: all of them."""
    num_routed_key_values: int = 32
    """Keys that they see, out of all windows before."""
    local_window: int = 128
    """Every token sees this many before it, and itself."""
    routed_window: int | None = None
    """Tokens of a window. null: local_window."""
    average_routed: bool = False
    """The mean of local and routed outputs in place of their sum."""
    causal_routing: bool = True
    """A query is chosen by a threshold found in the window before, and earlier ones have precedence. false: the best of
    the window, as published, so that whether a token is chosen depends on later ones."""
    cosine_routing: bool = True
    """Score by 8 times the cosine with the routing token. false: by the product, for which coordinate descent needs
    inputs and tokens of moderate length."""


@dataclass(kw_only=True, slots=True)
class AttentionConfig:
    """Attention of every block. Number and width of heads are the model's."""

    __pydantic_config__ = STRICT

    kind: Literal["multi_query", "switch", "routed"] = "multi_query"
    """multi_query: num_heads query heads share num_kv_heads key/value heads. switch: each token goes to top_k of
    num_experts attention experts with query and output projections of their own (arXiv 2210.05144), which share the
    key/value heads. routed: local attention, and routed queries that see routed keys of all windows before (CoLT5,
    arXiv 2303.09752)."""
    backend: Literal["auto", "torch", "packed", "flash", "flash_attn", "triton"] = "auto"
    """torch: plain maths. packed: the same for short sequences on CPU, heads that share keys packed into one product.
    flash: torch's fused attention. flash_attn: the package of that name, on GPUs in bf16. triton: our kernels. auto:
    packed on CPU up to 1,024 tokens where at least 4 query heads share a key, else flash."""
    position: Literal["rotary", "alibi", "learned", "none"] = "rotary"
    """How tokens know where they are: rotation of queries and keys by position (arXiv 2104.09864), a penalty that grows
    with distance (arXiv 2108.12409), or a learned vector of each of model.max_positions, added to the embedding."""
    rotary_share: float = 1.0
    """Share of a head's numbers that rotation turns, the first ones; the others know no position."""
    rope_scaling: Literal["none", "linear", "ntk", "dynamic", "yarn", "llama3"] = "none"
    """For sequences longer than those first trained on. linear: positions are divided by rope_factor. ntk: the base
    grows instead; dynamic: only above rope_original_len, with the length at hand, so that keys in a cache stay as they
    were turned. yarn and llama3: slow rotations are divided, fast ones stay (arXiv 2309.00071, 2407.21783)."""
    rope_factor: float = 1.0
    """How many times longer."""
    rope_original_len: int | None = None
    """With dynamic, yarn and llama3 in rope_scaling: the sequence length first trained on."""
    rope_fast_turns: float | None = None
    """With yarn and llama3: a rotation is fast from so many turns over rope_original_len. null: 32 with yarn, 4 with
    llama3."""
    rope_slow_turns: float = 1.0
    """With yarn and llama3: and slow up to so many."""
    rope_truncate: bool = True
    """With yarn: what lies between slow and fast is widened to whole rotations; GPT-OSS does not."""
    qkv_bias: bool = False
    """Biases on the projections of queries, keys and values."""
    out_bias: bool = False
    """A bias on the output projection; with kind = switch one for all experts."""
    clip_qkv: float | None = None
    """Clamp queries, keys and values to [-clip_qkv, clip_qkv] after their projection, and after qk_norm."""
    qk_ln: bool = False
    """Layer norm of the queries over all heads and of each key over its head."""
    qk_norm: Literal["none", "head", "width"] = "none"
    """RMSNorm of queries and keys, of each head (head) or of all heads of a token together (width)."""
    window: Window = None
    """Sliding window: a token sees the last `window` tokens, itself included. null: all before it. A list gives each
    layer its own, and begins again where it is shorter: [128, null] is every second layer's."""
    score_multiplier: float | None = None
    """What the product of a query and a key is multiplied by, as in Granite. null: head_dim^-0.5."""
    sinks: bool = False
    """A learned score for each head takes part in its softmax, so that a head can look at nothing."""
    dropout: float = 0.0
    """Of the attention weights, in training."""
    moe: MoEConfig = field(default_factory=MoEConfig)
    """With kind = switch: the attention experts of every block, their router, capacity and dispatch. An expert is a
    query and an output projection for all heads; what is of feed-forwards alone (d_ff, every, ...) stays as it is."""
    routed: RoutedAttentionConfig = field(default_factory=RoutedAttentionConfig)

    def window_of(self, layer: int) -> int | None:
        """Of block number `layer`."""
        return self.window[layer % len(self.window)] if isinstance(self.window, list) else self.window

    @property
    def fast_turns(self) -> float:
        """`rope_fast_turns`, and what null stands for."""
        if self.rope_fast_turns is not None:
            return self.rope_fast_turns
        return 4.0 if self.rope_scaling == "llama3" else 32.0


@dataclass(frozen=True, slots=True)
class HeadSizes:
    """Of an attention layer: query heads on fewer key/value heads, all of the same width."""

    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @staticmethod
    def of(d_model: int, num_heads: int, num_kv_heads: int, head_dim: int | None = None) -> "HeadSizes":
        """head_dim None: heads are as wide together as the model."""
        return HeadSizes(d_model, num_heads, num_kv_heads, d_model // num_heads if head_dim is None else head_dim)

    @property
    def width(self) -> int:
        """Numbers of a token over all query heads."""
        return self.num_heads * self.head_dim


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """A decoder: pre-norm, rotary, grouped-query attention, dense or MoE feed-forward."""

    __pydantic_config__ = STRICT

    vocab_size: int = 256
    """Rows of the embedding. Byte-level corpora use 256."""
    d_model: int = 256
    """Width of the residual stream."""
    num_layers: int = 4
    """Decoder blocks."""
    num_heads: int = 8
    """Query heads."""
    num_kv_heads: int = 1
    """Key/value heads: 1 is multi-query attention, num_heads is multi-head attention."""
    head_dim: int | None = None
    """Width of one head. null: d_model / num_heads."""
    d_ff: int = 1024
    """Hidden width of a dense feed-forward."""
    ff_bias: bool = False
    """Biases on the matrices of dense feed-forwards; those of experts are moe.expert_bias."""
    activation: Literal["swiglu", "geglu", "gelu", "relu", "relu2", "clamped_swiglu", "gelu_tanh"] = "swiglu"
    """Of dense and expert feed-forwards. swiglu, geglu and clamped_swiglu have a third matrix, the gate; relu2 is the
    squared ReLU; clamped_swiglu, of GPT-OSS, cuts gate and values at 7 and adds 1 to the latter; gelu_tanh is gelu with
    tanh for its error function, as in GPT-2."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    max_positions: int | None = None
    """With attention.position = learned: how many positions there are; no sequence is longer. null: with the others."""
    norm: Literal["rms", "layer"] = "rms"
    """Before attention, feed-forward and output. rms: RMSNorm. layer: LayerNorm, with a bias."""
    norm_eps: float = 1e-5
    """Epsilon of the norms."""
    block: Literal["sequential", "parallel", "parallel_norms"] = "sequential"
    """sequential: the feed-forward reads what attention has added to. parallel: both read one norm of the block's
    input, and their sum is added, as in GPT-J and Falcon 7B. parallel_norms: each reads a norm of its own, as in Falcon
    40B."""
    tie_embeddings: bool = True
    """The output projection is the embedding matrix."""
    embedding_multiplier: float = 1.0
    """Embeddings are multiplied by this, as in Granite."""
    residual_multiplier: float = 1.0
    """So is what attention and feed-forward add to the residual stream."""
    logits_scaling: float = 1.0
    """Logits are divided by this."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    recompute: Literal["none", "activation", "block"] = "none"
    """activation: experts keep their input and pre-activation alone, and activate again in the backward pass. block:
    keep only each block's input and its routing, and run the block again."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Of the router, the permutation and RMSNorm. auto: triton on CUDA where it is installed, else torch. LayerNorm is
    torch's own."""
    norm_kernels: Literal["same", "torch", "triton", "apex"] = "same"
    """Of RMSNorm alone. same: as `kernels`. apex: NVIDIA's package of that name, on GPUs."""
    num_classes: int | None = None
    """With task = classification: outputs of the head. null: as many as the data has labels."""
    dropout: float = 0.0
    """With task = classification, in training: of the embeddings and of what each part of a block adds."""
    token_dropout: float = 0.0
    """With task = classification, in training: share of the tokens that are taken for padding, others each time."""
    moe: MoEConfig = field(default_factory=MoEConfig)

    @property
    def norms_by(self) -> str:
        """`norm_kernels`, and what `same` stands for."""
        return self.kernels if self.norm_kernels == "same" else self.norm_kernels

    @property
    def head_width(self) -> int:
        """Width of one head: head_dim where it is given."""
        return self.head_sizes.head_dim

    @property
    def rotary_width(self) -> int:
        """Numbers of a head that rotation turns."""
        return round(self.head_width * self.attention.rotary_share)

    @property
    def query_heads(self) -> int:
        """Of a token in a layer: with kind = switch, those of all experts that it goes to."""
        return self.num_heads * (self.attention.moe.top_k if self.attention.kind == "switch" else 1)

    @property
    def moe_sections(self) -> list[MoEConfig]:
        """Of the routed layers that it has: feed-forwards, then attention."""
        feed_forwards = [self.moe] if self.moe.layer_count(self.num_layers) else []
        return feed_forwards + ([self.attention.moe] if self.attention.kind == "switch" else [])

    @property
    def head_sizes(self) -> HeadSizes:
        return HeadSizes.of(self.d_model, self.num_heads, self.num_kv_heads, self.head_dim)
