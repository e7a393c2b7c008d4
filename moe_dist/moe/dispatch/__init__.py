"""The dispatcher named by config; `auto` has been resolved before (kernels/registry.py)."""

from moe_dist.config.schema import MoEConfig
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.base import Arrival, Dispatcher, LocalDispatcher, split_experts
from moe_dist.parallel.mesh import Mesh

__all__ = ["Arrival", "Dispatcher", "make_dispatcher", "split_experts"]


def make_dispatcher(moe: MoEConfig, mesh: Mesh) -> Dispatcher:
    if moe.dispatch == "local":
        return LocalDispatcher(mesh)
    if moe.dispatch == "all_to_all":
        return AllToAllDispatcher(mesh, moe.wire)
    raise ValueError(f"unknown dispatch {moe.dispatch!r}: choose local, all_to_all, hierarchical or all_gather")
