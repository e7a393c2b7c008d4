"""What the training loop asks of an engine, and how it shows its state.

An engine holds pieces of logical parameters. `held(kind)` lists them as views: saving reads the owned ones, loading
writes into all, comparing layouts gathers them. So no other room knows how an engine, or ZeRO, lays its memory out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from moe_dist.models.decoder import DecoderOutput, Want
from moe_dist.models.trainable import Trainable
from moe_dist.moe.balance import Tally, reduced
from moe_dist.parallel.collectives import all_reduce
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.sharding import logical_parameters, spec_of
from moe_dist.step import Site, StepContext

Kind = Literal["weight", "exp_avg", "exp_avg_sq", "grad"]
STATE_KINDS: tuple[Kind, ...] = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """values: 1-D view of what this rank holds, elements [start, start + len) of the flattened logical parameter.

    owned: which of `values`; each logical element is owned by exactly one rank of the world, the one that saves it.
    """

    name: str
    logical_shape: tuple[int, ...]
    start: int
    values: Tensor
    owned: range

    def owned_part(self) -> tuple[int, Tensor]:
        """(first element in the logical parameter, values) of what is owned; perhaps nothing."""
        return self.start + self.owned.start, self.values[self.owned.start : self.owned.stop]


class Engine(Protocol):
    model: Trainable
    mesh: Mesh

    def micro_step(self, tokens_BS: Tensor, targets: Tensor, step: StepContext) -> DecoderOutput:
        """Forward and backward of one micro-batch; targets are [B, S], or [B] for the classifier. The last of a step
        also reduces gradients over the ranks."""

    def evaluate(
        self, tokens_BS: Tensor, targets: Tensor | None, step: StepContext, want: Want, **decoding: Any
    ) -> Tensor:
        """Forward without gradients: token losses [B, S] or logits [B, S, V]; [B] or [B, C] of the classifier.
        decoding: the caches and at_B of Decoder.forward."""

    def update(self, lr: float) -> float:
        """Clip, step, clear gradients. Returns the global gradient norm before clipping, the same on every rank. When
        that is not finite, gradients are cleared and nothing else changes."""

    def discard(self) -> None:
        """In place of `update`: clear the gradients of a whole step. Weights, optimizer and routers stay as they are;
        every rank must call."""

    def held(self, kind: Kind) -> Iterator[Piece]:
        """This rank's pieces. `weight` is the fp32 master; `grad` exists after a step's last micro_step, unclipped. Of
        frozen parameters there are weights alone."""

    def restore(self, optimizer_step: int) -> None:
        """Called after pieces were written: makes the compute weights follow the masters, and sets Adam's step."""


class RouterLoads:
    """What routers that balance themselves after a step are told of it, summed over its micro-steps."""

    def __init__(self) -> None:
        self.by_site: dict[Site, Tally] = {}

    def take(self, output: DecoderOutput) -> DecoderOutput:
        """Adds what a micro-step counted. Returns its output without the histograms, which nobody else reads."""
        for stats in output.stats:
            earlier = self.by_site.get(stats.site)
            self.by_site[stats.site] = stats.tally if earlier is None else earlier + stats.tally
        return replace(output, stats=tuple(replace(stats, needs_EB=None) for stats in output.stats))

    def settle(self, model: Trainable) -> None:
        """Tell the routers, and begin again. Loads are of all ranks already; the histograms of all layers are summed in
        one reduction over the ranks that hold tokens, so every rank must call."""
        needs = {site: tally.needs_EB for site, tally in self.by_site.items() if tally.needs_EB is not None}
        if needs:
            ranks = model.mesh.token_ranks
            summed = reduced(list(needs.values()), lambda flat: all_reduce(flat, ranks))
            for site, needs_EB in zip(needs, summed, strict=True):
                self.by_site[site] = replace(self.by_site[site], needs_EB=needs_EB)
        model.balance_routers(self.by_site)
        self.forget()

    def forget(self) -> None:
        self.by_site = {}


def held_buffers(model: Trainable, mesh: Mesh) -> Iterator[Piece]:
    """State that is not trained, the same on every rank; it is saved among the weights. A few numbers an expert, which
    are not worth sharing: rank 0 saves them."""
    for name, buffer in model.named_buffers():
        owned = range(buffer.numel() if mesh.rank == 0 else 0)
        yield Piece(name, tuple(buffer.shape), 0, buffer.view(-1), owned)


def logical_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Shapes of everything that `held("weight")` lists, in all layouts."""
    shapes = {name: list(spec.logical_shape) for name, _, spec in logical_parameters(model)}
    return shapes | {name: list(buffer.shape) for name, buffer in model.named_buffers()}


def frozen_parameters(model: nn.Module) -> list[str]:
    """Names of those that are not trained (models/freezing.py): no engine holds gradients or moments of them."""
    return [name for name, param in model.named_parameters() if not param.requires_grad]


def decay_groups(model: nn.Module) -> list[tuple[str, float, list[nn.Parameter]]]:
    """(name, weight-decay factor, parameters) of what is trained: matrices are decayed; norm scales are not."""
    groups = [("decay", 1.0, True), ("no_decay", 0.0, False)]
    params = [param for param in model.parameters() if param.requires_grad]
    return [(name, factor, [p for p in params if spec_of(p).decay is decay]) for name, factor, decay in groups]


@torch.no_grad()
def clip_by_global_norm(
    grads: Sequence[Tensor], params: Sequence[nn.Parameter], mesh: Mesh, max_norm: float | None
) -> float:
    """Scale reduced gradients in place so that their global norm is at most `max_norm`; the norm before that.

    The root of the sum of squares over all logical parameters, each counted once; the same on every rank. Rows are
    summed in the gradient's own precision, then their squares in float64: a float64 norm would first copy everything.
    """
    device = grads[0].device
    squares = {
        shard: torch.zeros((), dtype=torch.float64, device=device) for shard in ("replicated", "tensor", "expert")
    }
    for grad, param in zip(grads, params, strict=True):
        rows = torch.linalg.vector_norm(grad, dim=-1)
        squares[spec_of(param).shard] += rows.double().square().sum()
    # What is replicated over tp is reduced over dp alone. What is not finite on one tp rank must reach the others:
    # times zero, for then finite numbers add nothing.
    tensor = squares["tensor"] + 0.0 * squares["replicated"]
    tensor, expert = all_reduce(tensor, mesh.tp), all_reduce(squares["expert"], mesh.ep)
    norm = float((squares["replicated"] + tensor + expert).sqrt())
    if max_norm is not None and norm > max_norm:
        torch._foreach_mul_(list(grads), max_norm / (norm + 1e-6))
    return norm


def compute_dtype(precision: str) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
