"""Forward and backward of one micro-step, layer by layer (lines.py says what is run again).

Legend: T tokens of a data-parallel rank's micro-step, t those of one tp rank's slice, D d_model, V vocabulary, E
experts, K assignments of a token, G key/value heads, P width of a head.
"""

from collections.abc import Iterator

from moe_dist.config.model import ModelConfig, MoEConfig
from moe_dist.kernels.activation import gated
from moe_dist.models.block import is_moe_layer
from moe_dist.moe.experts import expert_widths
from moe_dist.parallel.loss import chunk_tokens
from moe_dist.plan.traffic.dispatch import Widths
from moe_dist.plan.traffic.lines import FLOAT, WHOLE
from moe_dist.plan.traffic.routing import Routing
from moe_dist.plan.traffic.rows import factor_of
from moe_dist.step import Site


def routed_layers(model: ModelConfig) -> Iterator[tuple[MoEConfig, Site]]:
    """Layers with experts, in the order in which they run."""
    sparse = model.moe.layers(model.num_layers)
    for layer in range(model.num_layers):
        if model.attention.kind == "switch":
            yield model.attention.moe, Site(layer, "attention")
        if layer in sparse:
            yield model.moe, Site(layer)


class MicroStep(Routing):
    """Adds one micro-step to the ledger."""

    def add(self) -> None:
        """All of it."""
        if self.config.task == "classification":
            self.forward("all_reduce", "world", "tokens that are no padding", WHOLE)
        self.leave("sums of embeddings")
        if self.model.attention.position == "learned" and self.cut:
            self.shared((self.model.max_positions or 0) * self.model.d_model, "positions")
        self.again = self.model.recompute == "block"
        self._blocks()
        self.again = False
        if self.config.task == "language_modelling":
            self._output()

    def _blocks(self) -> None:
        """Where shares are even, blocks differ in nothing but their routed layers and the capacity of these: one of
        each kind stands for all."""
        if self.rows is not None:
            for layer in range(self.model.num_layers):
                self._block(layer)
            return
        routed: dict[int, list[tuple[str, float | None]]] = {}
        for moe, site in routed_layers(self.model):
            routed.setdefault(site.layer, []).append((site.kind, factor_of(moe, site, self.step)))
        kinds: dict[tuple[tuple[str, float | None], ...], list[int]] = {}
        for layer in range(self.model.num_layers):
            kinds.setdefault(tuple(routed.get(layer, ())), []).append(layer)
        whole = self.ledger
        for layers in kinds.values():
            self.ledger = whole.empty()
            self._block(layers[0])
            whole.add_lines(self.ledger, len(layers))
        self.ledger = whole

    def _block(self, layer: int) -> None:
        self.norm()
        {"multi_query": self._multi_query, "switch": self._switch, "routed": self._routed}[self.model.attention.kind](
            layer
        )
        if self.model.block != "parallel":
            self.norm()
        if is_moe_layer(self.model, layer):
            self._moe(layer)
        else:
            self.enter()
            self.leave(last=True)
            if self.model.ff_bias:
                self.shared_bias()

    def _multi_query(self, layer: int) -> None:
        attention = self.model.attention
        self.enter()
        self._key_values(bias=attention.qkv_bias)
        if attention.qk_ln or attention.qk_norm != "none":
            self._query_key_norms()
        self.leave()
        if attention.out_bias:
            self.shared_bias()

    def _query_key_norms(self) -> None:
        """attention/norms.py: what is taken over all heads is summed over tp; scales of one head are every rank's."""
        model, attention = self.model, self.model.attention
        sums = {"head": 0, "width": 1}.get(attention.qk_norm, 2)  # of the queries; a layer norm has mean and variance
        size = sums * self.tokens * FLOAT
        self.forward("all_reduce", "tp", "sums of query norms", size, sums)
        self.backward("all_reduce", "tp", "gradients of query norms", size, sums)
        if attention.qk_norm == "width":
            self.forward("all_reduce", "tp", "sums of key norms", self.tokens * FLOAT)
            self.backward("all_reduce", "tp", "gradients of key norms", self.tokens * FLOAT)
            if model.num_kv_heads % self.layout.tp:
                self.shared(model.num_kv_heads * model.head_width, "key norms")
            return
        # Of queries and keys (head); weight and bias of the keys (qk_ln).
        for _ in range(2):
            self.shared(model.head_width, "head norms")

    def _key_values(self, bias: bool = False) -> None:
        """Where tp does not divide the heads, each rank has the whole weight (attention/multi_query.py)."""
        model = self.model
        if model.num_kv_heads % self.layout.tp:
            rows = 2 * model.num_kv_heads * model.head_width
            for numel in (rows * model.d_model, rows) if bias else (rows * model.d_model,):
                self.shared(numel, "shared key/value heads")

    def _routed(self, layer: int) -> None:
        model, routed = self.model, self.model.attention.routed
        self.enter()
        self._key_values()
        if self.shape.seq_len > (routed.routed_window or routed.local_window):
            for _ in range(2):
                self.shared(routed.num_experts * model.d_model, "routing tokens")
            for _ in range(routed.num_experts):
                self._key_values()
                self.shared(2 * model.num_kv_heads * model.head_width, "null keys and values")
            self.shared(routed.num_experts * model.d_model, "null tokens")
        self.leave()

    def _switch(self, layer: int) -> None:
        model, moe, site = self.model, self.model.attention.moe, Site(layer, "attention")
        queries, item = model.head_sizes.width, self.dtype.itemsize
        self.own_slice()
        self.gate(moe, site)
        heads = self.own * moe.top_k * queries * item
        self.carry(moe, site, Widths(model.d_model, queries, self.dtype), weighted=False)
        for _ in range(2):
            self.forward("all_to_all", "tp", "tokens for heads", heads)
            self.backward("all_to_all", "tp", "tokens for heads", heads)
        self.enter()
        self.shared(2 * model.num_kv_heads * model.head_width * model.d_model, "shared key/value heads")
        self.carry(moe, site, Widths(queries, model.d_model, self.dtype))
        if self.layout.expert_ranks == 1:
            for _ in range(2):
                self.shared(moe.num_experts * queries * model.d_model, "experts")
        self.balance_counts(moe)
        self.all_slices()
        if model.attention.out_bias:
            self.shared_bias()

    def _moe(self, layer: int) -> None:
        model, moe, site = self.model, self.model.moe, Site(layer)
        self.own_slice()
        self.gate(moe, site)
        self.carry(moe, site, Widths(model.d_model, model.d_model, self.dtype))
        if self.layout.expert_ranks == 1:
            self._whole_experts(moe)
        self.balance_counts(moe)
        self.all_slices(last=moe.num_shared_experts == 0)
        if moe.out_bias:
            self.shared_bias()
        if moe.num_shared_experts:
            self.enter()
            self.leave(last=not moe.shared_gate)  # a gate keeps what it multiplies
        if moe.shared_gate and self.cut:
            self.shared(model.d_model, "gates of shared experts")

    def _whole_experts(self, moe: MoEConfig) -> None:
        """Every rank holds all of them, and tp ranks see other tokens."""
        units, gates = sum(expert_widths(moe, self.model.d_ff)), int(gated(self.model.activation))
        for _ in range(2 + gates):
            self.shared(units * self.model.d_model, "experts")
        if moe.expert_bias:
            for _ in range(1 + gates):
                self.shared(units, "experts")
            self.shared(moe.num_experts * self.model.d_model, "experts")

    def _output(self) -> None:
        self.norm()
        self.enter()
        chunks = -(-self.tokens // chunk_tokens(self.model.vocab_size // self.layout.tp))
        self.forward("all_reduce", "tp", "largest logits", self.tokens * FLOAT, chunks)
        self.forward("all_reduce", "tp", "sums of the loss", 2 * self.tokens * FLOAT, chunks)
