"""Forward and backward of one micro-step, layer by layer: what each layer's collectives are is said where they are made
(parallel/collectives.py, linear.py, heads.py; moe/capacity.py, queues.py).

With `recompute: block`, backward runs each block again, and its forward collectives with it. Two kinds are left out:
decisions, which are kept (counts, and all that routers ask of other ranks), and what comes after the last tensor that
backward asks for, where torch stops: the sum at the block's end.

Legend: T tokens of a data-parallel rank's micro-step, t those of one tp rank's slice, D d_model, V vocabulary, E
experts, K assignments of a token, G key/value heads, P width of a head.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_dist.config import BatchShape, Config
from moe_dist.config.model import ModelConfig, MoEConfig
from moe_dist.engine.base import compute_dtype
from moe_dist.kernels.activation import gated
from moe_dist.models.block import is_moe_layer
from moe_dist.moe.dispatch.wire import Wire, row_bytes
from moe_dist.moe.experts import expert_widths
from moe_dist.parallel.loss import chunk_tokens
from moe_dist.parallel.mesh import Axis
from moe_dist.plan.traffic.dispatch import Widths, legs, sent_rows, trips
from moe_dist.plan.traffic.ledger import Ledger
from moe_dist.plan.traffic.rows import EvenShare, Rows, limit_of, measured
from moe_dist.plan.transfer import Collective
from moe_dist.step import Site

_WHOLE = torch.int64.itemsize
_FLOAT = torch.float32.itemsize


def routed_layers(model: ModelConfig) -> Iterator[tuple[MoEConfig, Site]]:
    """Layers with experts, in the order in which they run."""
    for layer in range(model.num_layers):
        if model.attention.kind == "switch":
            yield model.attention.moe, Site(layer, "attention")
        if is_moe_layer(model, layer):
            yield model.moe, Site(layer)


@dataclass
class MicroStep:
    """Adds one micro-step to the ledger."""

    config: Config
    shape: BatchShape
    ledger: Ledger
    rows: Rows | None
    micro: int
    step: int
    device_type: str
    even: dict[tuple[str, int | None], Tensor]
    """Even shares by kind of layer and limit, worked out once for all micro-steps."""
    again: bool = field(default=False, init=False)
    """Whether what is added now is run again in the backward pass."""

    def __post_init__(self) -> None:
        self.model, self.layout = self.config.model, self.ledger.layout
        self.cut = self.config.parallel.sequence_parallel and self.layout.tp > 1
        self.tokens = self.shape.micro_batch * self.shape.seq_len
        self.own = self.tokens // self.layout.tp
        self.dtype = compute_dtype(self.config.engine.precision)
        self.width = self.model.d_model * self.dtype.itemsize

    def add(self) -> None:
        """All of it."""
        if self.config.task == "classification":
            self.forward("all_reduce", "world", "tokens that are no padding", _WHOLE)
        self._leave("sums of embeddings")
        self.again = self.model.recompute == "block"
        for layer in range(self.model.num_layers):
            self._block(layer)
        self.again = False
        if self.config.task == "language_modelling":
            self._output()

    def forward(
        self, collective: Collective, axis: Axis, what: str, size: int, calls: int = 1, again: bool = True
    ) -> None:
        """again: not left out where the block is run again."""
        self.ledger.add(collective, axis, "forward", what, size, calls)
        if self.again and again:
            self.ledger.add(collective, axis, "backward", what, size, calls)

    def backward(self, collective: Collective, axis: Axis, what: str, size: int, calls: int = 1) -> None:
        self.ledger.add(collective, axis, "backward", what, size, calls)

    def shared(self, numel: int, what: str) -> None:
        """A parameter that every tp rank uses for other tokens or heads: its gradient is summed."""
        self.backward("all_reduce", "tp", f"gradients of {what}", numel * self.dtype.itemsize)

    def _enter(self) -> None:
        if self.cut:
            self.forward("all_gather", "tp", "tokens of the sequence", self.own * self.width)
            self.backward("reduce_scatter", "tp", "gradients of tokens", self.tokens * self.width)
        else:
            self.backward("all_reduce", "tp", "gradients of tokens", self.tokens * self.width)

    def _leave(self, what: str = "partial sums", last: bool = False) -> None:
        """last: the block ends here."""
        if self.cut:
            self.forward("reduce_scatter", "tp", what, self.tokens * self.width, again=not last)
            self.backward("all_gather", "tp", "gradients of tokens", self.own * self.width)
        else:
            self.forward("all_reduce", "tp", what, self.tokens * self.width, again=not last)

    def _norm(self) -> None:
        if self.cut:
            self.shared(self.model.d_model, "norms")

    def _own_slice(self) -> None:
        if not self.cut:
            self.backward("all_gather", "tp", "gradients of tokens", self.own * self.width)

    def _all_slices(self, last: bool = False) -> None:
        if not self.cut:
            self.forward("all_gather", "tp", "tokens of the sequence", self.own * self.width, again=not last)

    def _block(self, layer: int) -> None:
        self._norm()
        {"multi_query": self._multi_query, "switch": self._switch, "routed": self._routed}[self.model.attention.kind](
            layer
        )
        self._norm()
        if is_moe_layer(self.model, layer):
            self._moe(layer)
        else:
            self._enter()
            self._leave(last=True)

    def _multi_query(self, layer: int) -> None:
        self._enter()
        self._key_values()
        if self.model.attention.qk_ln:
            numbers = self.tokens * _FLOAT
            self.forward("all_reduce", "tp", "sums of query norms", 2 * numbers, 2)
            self.backward("all_reduce", "tp", "gradients of query norms", 2 * numbers, 2)
            for _ in range(2):
                self.shared(self.model.head_width, "key norms")
        self._leave()

    def _key_values(self) -> None:
        """Where tp does not divide the heads, each rank has the whole weight (attention/multi_query.py)."""
        model = self.model
        if model.num_kv_heads % self.layout.tp:
            self.shared(2 * model.num_kv_heads * model.head_width * model.d_model, "shared key/value heads")

    def _routed(self, layer: int) -> None:
        model, routed = self.model, self.model.attention.routed
        self._enter()
        self._key_values()
        if self.shape.seq_len > (routed.routed_window or routed.local_window):
            for _ in range(2):
                self.shared(routed.num_experts * model.d_model, "routing tokens")
            for _ in range(routed.num_experts):
                self._key_values()
                self.shared(2 * model.num_kv_heads * model.head_width, "null keys and values")
            self.shared(routed.num_experts * model.d_model, "null tokens")
        self._leave()

    def _switch(self, layer: int) -> None:
        model, moe, site = self.model, self.model.attention.moe, Site(layer, "attention")
        queries, item = model.head_sizes.width, self.dtype.itemsize
        self._own_slice()
        self._gate(moe, site)
        heads = self.own * moe.top_k * queries * item
        self._carry(moe, site, Widths(model.d_model, queries, self.dtype), weighted=False)
        for _ in range(2):
            self.forward("all_to_all", "tp", "tokens for heads", heads)
            self.backward("all_to_all", "tp", "tokens for heads", heads)
        self._enter()
        self.shared(2 * model.head_width * model.d_model, "shared key/value heads")
        self._carry(moe, site, Widths(queries, model.d_model, self.dtype))
        if self.layout.expert_ranks == 1:
            for _ in range(2):
                self.shared(moe.num_experts * queries * model.d_model, "experts")
        self._balance_counts(moe)
        self._all_slices()

    def _moe(self, layer: int) -> None:
        model, moe, site = self.model, self.model.moe, Site(layer)
        self._own_slice()
        self._gate(moe, site)
        self._carry(moe, site, Widths(model.d_model, model.d_model, self.dtype))
        if self.layout.expert_ranks == 1:
            self._whole_experts(moe)
        self._balance_counts(moe)
        self._all_slices(last=moe.num_shared_experts == 0)
        if moe.num_shared_experts:
            self._enter()
            self._leave(last=True)

    def _whole_experts(self, moe: MoEConfig) -> None:
        """Every rank holds all of them, and tp ranks see other tokens."""
        units, gates = sum(expert_widths(moe, self.model.d_ff)), int(gated(self.model.activation))
        for _ in range(2 + gates):
            self.shared(units * self.model.d_model, "experts")
        if moe.expert_bias:
            for _ in range(1 + gates):
                self.shared(units, "experts")
            self.shared(moe.num_experts * self.model.d_model, "experts")

    def _gate(self, moe: MoEConfig, site: Site) -> None:
        experts = moe.num_experts
        if moe.router != "hash":
            for _ in range(2 if moe.router == "noisy" else 1):
                self.shared(experts * self.model.d_model, "routers")
        if moe.router == "noisy":
            calls = 1 + (moe.top_k < experts)
            self.forward("all_reduce", "world", "importance and load", calls * experts * _FLOAT, calls)
        if moe.router == "sinkhorn":
            self.decision("numbers of tokens", 1)
            self.decision("logits", self.own * experts, _FLOAT)
        self.decision("counts", experts)
        if limit_of(moe, site, self.step, self.own, self.layout.world) is None:
            return
        self._queues(moe)
        if moe.overflow == "reroute":
            for _ in range(1, experts):
                self.decision("counts", experts)
                if self.device_type == "cpu":
                    break  # it sees that nobody asks
                self._queues(moe)

    def decision(self, what: str, numel: int, itemsize: int = _WHOLE) -> None:
        """Gathered from all ranks, and kept for a block that is run again."""
        self.forward("all_gather", "world", what, numel * itemsize, again=False)

    def _queues(self, moe: MoEConfig) -> None:
        """Who is let in (moe/queues.py)."""
        experts, assignments = moe.num_experts, self.own * moe.top_k
        chooses = moe.router == "expert_choice"
        if moe.drop_policy == "position" and not chooses:
            if moe.drop_order == "choice" and moe.top_k > 1:
                self.decision("counts", moe.top_k * experts)
            if moe.capacity_pool > 1:
                self.decision("counts", experts)
        elif moe.capacity_scope == "local":
            self.decision("counts", experts)
        else:
            assignments = self.own * experts if chooses else assignments
            self.decision("assignments", assignments)
            if moe.drop_policy != "random" or chooses:
                self.decision("router weights", assignments, _FLOAT)

    def _balance_counts(self, moe: MoEConfig) -> None:
        """Sequences that tp cuts are balanced as a whole (moe/losses.py)."""
        if moe.balance_scope == "sequence":
            sequences = -(-self.tokens // self.shape.seq_len)
            size = sequences * moe.num_experts * _WHOLE
            self.forward("all_reduce", "tp", "counts of sequences", size, again=moe.router != "hash")

    def _carry(self, moe: MoEConfig, site: Site, widths: Widths, weighted: bool = True) -> None:
        """There and back. weighted: the weights of assignments have gradients, where they travel too."""
        if self.layout.expert_ranks == 1:
            return
        # An assignment of attention is a row of its own.
        tokens, choices = (self.own * moe.top_k, 1) if site.kind == "attention" else (self.own, moe.top_k)
        if moe.dispatch == "all_gather":
            self._gathered(moe, widths, tokens, choices * self.layout.etp, weighted)
            return
        block, pool = None, 1 if self.layout.etp > 1 else moe.capacity_pool
        limit = limit_of(moe, site, self.step, self.own, self.layout.world)
        if self.device_type != "cpu" and limit is not None:  # moe/dispatch/blocks.py
            room = limit * moe.capacity_pool
            block = max(min(room, tokens * min(choices * self.layout.etp, pool)), 1)
        if self.rows is None:
            if (site.kind, limit) not in self.even:
                self.even[site.kind, limit] = EvenShare(moe, self.own, self.layout.world).kept_WE(limit)
            kept_WE = self.even[site.kind, limit]
        else:
            kept_WE = measured(self.rows, self.micro, site, self.layout.world, moe.num_experts)
        sent_wwe = sent_rows(kept_WE, self.layout, self.ledger.rank)
        for trip in trips(legs(moe, sent_wwe, self.layout, self.ledger.rank, block, pool), moe, widths):
            self.forward("all_to_all", trip.axis, trip.what, trip.forward, trip.calls)
            self.backward("all_to_all", trip.axis, trip.what, trip.backward, trip.calls)

    def _gathered(self, moe: MoEConfig, widths: Widths, tokens: int, choices: int, weighted: bool) -> None:
        """Every rank of the ep group sees all tokens (moe/dispatch/all_gather.py)."""
        wire, dtype, ranks = Wire.of(moe.wire_dtype), widths.dtype, self.layout.expert_ranks
        self.forward("all_gather", "ep", "numbers of tokens", _WHOLE)
        self.forward("all_gather", "ep", "assignments", tokens * choices * torch.int32.itemsize)
        self.forward("all_gather", "ep", "router weights", tokens * choices * _FLOAT)
        if weighted:
            size = ranks * tokens * choices * _FLOAT
            self.backward("reduce_scatter", "ep", "gradients of router weights", size)
        home: Collective = "reduce_scatter" if wire.rest == "same" else "all_to_all"
        out, row, result = (
            tokens * row_bytes(width, dtype, form)
            for width, form in ((widths.row, wire.out), (widths.row, wire.rest), (widths.result, wire.rest))
        )
        self.forward("all_gather", "ep", "rows to experts", out)
        self.forward(home, "ep", "rows from experts", ranks * result)
        self.backward("all_gather", "ep", "rows to experts", result)
        self.backward(home, "ep", "rows from experts", ranks * row)

    def _output(self) -> None:
        self._norm()
        self._enter()
        chunks = -(-self.tokens // chunk_tokens(self.model.vocab_size // self.layout.tp))
        self.forward("all_reduce", "tp", "largest logits", self.tokens * _FLOAT, chunks)
        self.forward("all_reduce", "tp", "sums of the loss", 2 * self.tokens * _FLOAT, chunks)
