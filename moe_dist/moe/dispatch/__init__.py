"""The dispatcher named by config; `auto` has been resolved before (models/backends.py)."""

from moe_dist.config.model import MoEConfig
from moe_dist.kernels.permute.backend import permutation
from moe_dist.moe.dispatch.all_gather import AllGatherDispatcher
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.base import Dispatcher, EtpDispatcher, LocalDispatcher
from moe_dist.moe.dispatch.hierarchical import HierarchicalDispatcher
from moe_dist.moe.dispatch.overlap import OverlappedDispatcher
from moe_dist.parallel.mesh import Mesh

__all__ = ["Dispatcher", "make_dispatcher"]


def make_dispatcher(moe: MoEConfig, mesh: Mesh, kernels: str = "torch") -> Dispatcher:
    """Raises ValueError for a kind that is not there, or that cannot do what else is asked for."""
    if moe.overlap_chunks > 1 and moe.dispatch != "all_to_all":
        raise ValueError(
            f"overlap_chunks={moe.overlap_chunks} is of dispatch=all_to_all, not {moe.dispatch}: set it to 1"
        )
    dispatcher = _by_name(moe, mesh, kernels)
    return EtpDispatcher(dispatcher, mesh.etp) if mesh.etp > 1 else dispatcher


def _by_name(moe: MoEConfig, mesh: Mesh, kernels: str) -> Dispatcher:
    permute = permutation(kernels)
    match moe.dispatch:
        case "local":
            return LocalDispatcher(mesh, permute)
        case "all_to_all":
            direct = AllToAllDispatcher(mesh, permute, moe.wire, moe.wire_dtype)
            return OverlappedDispatcher(direct, moe.overlap_chunks) if moe.overlap_chunks > 1 else direct
        case "hierarchical":
            return HierarchicalDispatcher(mesh, permute, moe.wire_dtype)
        case "all_gather":
            return AllGatherDispatcher(mesh, permute, moe.wire_dtype)
    raise ValueError(f"unknown dispatch {moe.dispatch!r}: choose local, all_to_all, hierarchical or all_gather")
