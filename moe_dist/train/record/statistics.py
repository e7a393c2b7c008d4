"""What a step has computed, over all micro-steps and ranks."""

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
    outputs: list[DecoderOutput], mesh: Mesh, device: torch.device
) -> tuple[float, float, list[MoEStats]]:
    """(loss, auxiliary loss, what each layer with experts did): means over micro-steps and ranks, in one all-reduce;
    counts and bytes are sums. The same on every rank, and on the host. outputs: this rank's, of the micro-steps of one
    step."""
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
    reduced = all_reduce(torch.cat([means, sums]), mesh.world).cpu()
    means, whole = reduced[: len(means)] / mesh.layout.world, iter(reduced[len(means) :].split(sizes))
    nll, aux = means[:2].tolist()
    layers = []
    for stats, own in zip(outputs[0].stats, means[2:].view(-1, len(_MEANS) + 1), strict=True):
        found = dict(zip(_MEANS, own[:-1].unbind(), strict=True))
        found["aux_loss"] = found["aux_loss"] * mesh.layout.tp
        found |= {name: next(whole).long() for name in _OF_RANKS}
        found |= {name: (next(whole) / mesh.layout.world).long() for name in _OF_ALL}
        layers.append(replace(stats, **found, sent_bytes=round(float(own[-1]) * mesh.layout.world * len(outputs))))
    # Each tp rank added 1/tp of its slice's auxiliary loss, so the world's mean is 1/tp of it.
    return nll, aux * mesh.layout.tp, layers


def _counts(output: DecoderOutput) -> list[Tensor]:
    """Of a micro-step, layer after layer."""
    return [getattr(stats, name) for stats in output.stats for name in _OF_RANKS + _OF_ALL]
