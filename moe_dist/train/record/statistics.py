"""What a step has computed, over all micro-steps and ranks."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moe_dist.models.decoder import DecoderOutput
from moe_dist.moe.losses import MoEStats
from moe_dist.parallel.collectives import all_reduce
from moe_dist.parallel.mesh import Mesh

_MEANS = ("aux_loss", "balance_loss", "z_loss", "entropy", "unserved")
_OF_RANKS = ("dropped_E", "dropped_S", "dropped_M", "dropped_F", "load_F")
"""Counts of a rank's own tokens."""
_OF_ALL = ("load_E", "kept_E", "over_P")
"""Counts that every rank knows of all."""


def gather_statistics(
    outputs: list[DecoderOutput], mesh: Mesh, device: torch.device, own_P: Sequence[float] = ()
) -> tuple[float, float, list[MoEStats], list[list[float]]]:
    """(loss, auxiliary loss, what each layer with experts did, own_P of each rank): means over micro-steps and ranks,
    in one all-reduce; counts and bytes are sums. The same on every rank, and on the host. outputs: this rank's, of the
    micro-steps of one step. own_P: numbers of this rank, as many on each."""
    per_micro = []
    for output in outputs:
        values = [output.nll, sum((s.aux_loss.detach() for s in output.stats), output.nll.new_zeros(()))]
        for stats in output.stats:
            values += [getattr(stats, name).detach() for name in _MEANS]
            values.append(torch.tensor(stats.sent_bytes, device=device))
        per_micro.append(torch.stack([value.double() for value in values]))
    means = torch.stack(per_micro).mean(0)
    sizes = [len(count) for count in _counts(outputs[0])]
    of_micros = [torch.cat([means.new_zeros(0), *_counts(output)]) for output in outputs]  # float64, exact up to 2^53
    sums = torch.stack(of_micros).sum(0)
    own_RP = means.new_zeros(mesh.layout.world, len(own_P))
    own_RP[mesh.rank] = means.new_tensor(own_P)  # zeros of the other ranks: their sum gathers
    reduced = all_reduce(torch.cat([means, sums, own_RP.flatten()]), mesh.world).cpu()
    means, sums, gathered = reduced.split([len(means), len(sums), own_RP.numel()])
    means, whole = means / mesh.layout.world, iter(sums.split(sizes))
    nll, aux = means[:2].tolist()
    layers = []
    for stats, own in zip(outputs[0].stats, means[2:].view(-1, len(_MEANS) + 1), strict=True):
        found = dict(zip(_MEANS, own[:-1].unbind(), strict=True))
        found["aux_loss"] = found["aux_loss"] * mesh.layout.tp
        found |= {name: next(whole).long() for name in _OF_RANKS}
        found |= {name: (next(whole) / mesh.layout.world).long() for name in _OF_ALL}
        layers.append(replace(stats, **found, sent_bytes=round(float(own[-1]) * mesh.layout.world * len(outputs))))
    # Each tp rank added 1/tp of its slice's auxiliary loss, so the world's mean is 1/tp of it.
    return nll, aux * mesh.layout.tp, layers, gathered.view_as(own_RP).tolist()


def _counts(output: DecoderOutput) -> list[Tensor]:
    """Of a micro-step, layer after layer."""
    return [getattr(stats, name) for stats in output.stats for name in _OF_RANKS + _OF_ALL]
