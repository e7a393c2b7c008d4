"""What routed layers exchange beside the work of their experts: who goes where and who is let in (moe/capacity.py,
queues.py), what balancing counts (moe/losses.py), and the trips to the experts and back (dispatch.py).

Legend: t tokens that this rank routes, E experts, K assignments of a token.
"""

import torch

from moe_dist.config.model import MoEConfig
from moe_dist.moe.dispatch.wire import Wire, row_bytes
from moe_dist.plan.traffic.dispatch import Widths, legs, sent_rows, trips
from moe_dist.plan.traffic.lines import FLOAT, WHOLE, Lines
from moe_dist.plan.traffic.rows import EvenShare, limit_of, measured
from moe_dist.plan.transfer import Collective
from moe_dist.step import Site


class Routing(Lines):
    """Routers and dispatchers."""

    def gate(self, moe: MoEConfig, site: Site) -> None:
        experts = moe.num_experts
        if moe.router != "hash":
            for _ in range(2 if moe.router == "noisy" else 1):
                self.shared(experts * self.model.d_model, "routers")
        if moe.router_bias:
            self.shared(experts, "routers")
        if moe.router == "noisy":
            calls = 1 + (moe.top_k < experts)
            self.forward("all_reduce", "world", "importance and load", calls * experts * FLOAT, calls)
        if moe.router == "sinkhorn":
            self.decision("numbers of tokens", 1)
            self.decision("logits", self.own * experts, FLOAT)
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
                self.decision("router weights", assignments, FLOAT)

    def balance_counts(self, moe: MoEConfig) -> None:
        """Sequences that tp cuts are balanced as a whole (moe/losses.py)."""
        if moe.balance_scope == "sequence":
            sequences = -(-self.tokens // self.shape.seq_len)
            size = sequences * moe.num_experts * WHOLE
            self.forward("all_reduce", "tp", "counts of sequences", size, again=moe.router != "hash")

    def carry(self, moe: MoEConfig, site: Site, widths: Widths, weighted: bool = True) -> None:
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
        self.forward("all_gather", "ep", "numbers of tokens", WHOLE)
        self.forward("all_gather", "ep", "assignments", tokens * choices * torch.int32.itemsize)
        self.forward("all_gather", "ep", "router weights", tokens * choices * FLOAT)
        if weighted:
            size = ranks * tokens * choices * FLOAT
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
