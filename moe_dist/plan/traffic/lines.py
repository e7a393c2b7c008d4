"""What layers share in adding their exchanges to the ledger: norms, ways in and out of tensor-parallel regions, slices
of the tokens, decisions of routers. What each of them is, is said where it is made (parallel/collectives.py,
linear.py).

With `recompute: block`, backward runs each block again, and its forward collectives with it. Two kinds are left out:
decisions, which are kept (counts, and all that routers ask of other ranks), and what comes after the last tensor that
backward asks for, where torch stops: the sum at the block's end.

Legend: T tokens of a data-parallel rank's micro-step, t those of one tp rank's slice, D d_model.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_dist.config import BatchShape, Config
from moe_dist.engine.base import compute_dtype
from moe_dist.parallel.mesh import Axis
from moe_dist.plan.traffic.ledger import Ledger
from moe_dist.plan.traffic.rows import Rows
from moe_dist.plan.transfer import Collective

WHOLE = torch.int64.itemsize
FLOAT = torch.float32.itemsize


@dataclass
class Lines:
    """Of one micro-step."""

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

    def enter(self) -> None:
        if self.cut:
            self.forward("all_gather", "tp", "tokens of the sequence", self.own * self.width)
            self.backward("reduce_scatter", "tp", "gradients of tokens", self.tokens * self.width)
        else:
            self.backward("all_reduce", "tp", "gradients of tokens", self.tokens * self.width)

    def leave(self, what: str = "partial sums", last: bool = False) -> None:
        """last: the block ends here."""
        if self.cut:
            self.forward("reduce_scatter", "tp", what, self.tokens * self.width, again=not last)
            self.backward("all_gather", "tp", "gradients of tokens", self.own * self.width)
        else:
            self.forward("all_reduce", "tp", what, self.tokens * self.width, again=not last)

    def norm(self) -> None:
        for _ in range((2 if self.model.norm == "layer" else 1) if self.cut else 0):  # scale, bias
            self.shared(self.model.d_model, "norms")

    def shared_bias(self) -> None:
        """One that is added outside of tensor-parallel regions."""
        if self.cut:
            self.shared(self.model.d_model, "biases")

    def own_slice(self) -> None:
        if not self.cut:
            self.backward("all_gather", "tp", "gradients of tokens", self.own * self.width)

    def all_slices(self, last: bool = False) -> None:
        if not self.cut:
            self.forward("all_gather", "tp", "tokens of the sequence", self.own * self.width, again=not last)

    def decision(self, what: str, numel: int, itemsize: int = WHOLE) -> None:
        """Gathered from all ranks, and kept for a block that is run again."""
        self.forward("all_gather", "world", what, numel * itemsize, again=False)
