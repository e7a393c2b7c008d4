"""A micro-step as CUDA graphs: what the host launches one by one in the first steps is launched as one afterwards.

Where a step is many small kernels, the host that launches them is what takes the time. With shapes that depend on no
data (`wire: padded` and a capacity limit; at ep = 1 all dispatch is like that), a micro-step is always the same
sequence of kernels on the same memory, so that it is recorded once and replayed. A step has one graph for each of its
micro-steps, since the first one writes gradients that the others add to and the last one reduces them; they share one
pool of memory. The optimizer stays outside: whether a step is left out is decided on the host.

A graph repeats numbers that the host gave it. So nothing random may be in it, which the rules see to
(config/rules/graph.py), and another capacity factor of the schedule is another graph.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.models.decoder import DecoderOutput
from moe_dist.parallel.mesh import Mesh
from moe_dist.step import StepContext

MicroStep = Callable[[Tensor, Tensor, StepContext], DecoderOutput]
WARM_UP = 3  # steps run as they are: what is made at first use (workspaces, compiled kernels) is no part of a graph


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    tokens_BS: Tensor
    targets: Tensor
    output: DecoderOutput


class StepGraphs:
    """Runs micro-steps; from the fourth step of each kind on as graphs."""

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        """Raises ValueError where nothing can be recorded."""
        if device.type != "cuda":
            raise ValueError(f"engine.cuda_graph=true needs a GPU, but this run is on {device.type}: set it to false")
        if mesh.layout.world > 1 and dist.get_backend() != "nccl":
            raise ValueError(
                f"engine.cuda_graph=true records exchanges of nccl, not of {dist.get_backend()}: use nccl, or set it "
                "to false"
            )
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self.recorded: dict[tuple[int, ...], _Recorded] = {}
        self.runs: dict[tuple[int, ...], int] = {}

    def run(
        self, kind: tuple[int, ...], micro_step: MicroStep, tokens_BS: Tensor, targets: Tensor, step: StepContext
    ) -> DecoderOutput:
        """kind: everything that makes one micro-step another sequence of kernels than the next."""
        kind = (*kind, *tokens_BS.shape)
        known = self.recorded.get(kind)
        if known is None:
            self.runs[kind] = self.runs.get(kind, 0) + 1
            if self.runs[kind] <= WARM_UP:
                return self._beside(micro_step, tokens_BS, targets, step)
            known = self.recorded[kind] = self._record(micro_step, tokens_BS, targets, step)
        known.tokens_BS.copy_(tokens_BS, non_blocking=True)
        known.targets.copy_(targets, non_blocking=True)
        known.graph.replay()
        return known.output

    def _beside(self, micro_step: MicroStep, tokens_BS: Tensor, targets: Tensor, step: StepContext) -> DecoderOutput:
        """On the stream that is recorded later."""
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            output = micro_step(tokens_BS, targets, step)
        here.wait_stream(self.stream)
        return output

    def _record(self, micro_step: MicroStep, tokens_BS: Tensor, targets: Tensor, step: StepContext) -> _Recorded:
        """Nothing is computed. Raises RuntimeError, with the way out, where something in it cannot be recorded."""
        tokens_BS, targets, graph = tokens_BS.clone(), targets.clone(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                output = micro_step(tokens_BS, targets, step)
        except RuntimeError as error:
            first = str(error).partition("\n")[0]
            raise RuntimeError(
                f"this step cannot be recorded as a CUDA graph ({first}): set engine.cuda_graph to false"
            ) from error
        return _Recorded(graph, tokens_BS, targets, output)
