"""What a step has computed, over all micro-steps and ranks."""

from dataclasses import replace

import torch

from moe_dist.models.decoder import DecoderOutput
from moe_dist.moe.losses import MoEStats
from moe_dist.parallel.collectives import all_reduce
from moe_dist.parallel.mesh import Mesh

_MEANS = ("aux_loss", "balance_loss", "z_loss", "entropy", "unserved")


def gather_statistics(
    outputs: list[DecoderOutput], mesh: Mesh, device: torch.device
) -> tuple[float, float, list[MoEStats]]:
    """(loss, auxiliary loss, what each layer with experts did): means over micro-steps and ranks, in one all-reduce;
    loads and bytes are sums. The same on every rank, and on the host. outputs: this rank's, of the micro-steps of one
    step."""
    per_micro = []
    for output in outputs:
        values = [output.nll, sum((s.aux_loss.detach() for s in output.stats), output.nll.new_zeros(()))]
        for stats in output.stats:
            values += [getattr(stats, name).detach() for name in _MEANS]
            values.append(torch.tensor(stats.sent_bytes, device=device))
        per_micro.append(torch.stack([value.double() for value in values]))
    mean = (all_reduce(torch.stack(per_micro).mean(0), mesh.world) / mesh.layout.world).cpu()
    nll, aux = mean[:2].tolist()
    layers = []
    for index, (stats, own) in enumerate(zip(outputs[0].stats, mean[2:].view(-1, len(_MEANS) + 1), strict=True)):
        whole = dict(zip(_MEANS, own[:-1].unbind(), strict=True))
        whole["load_E"] = torch.stack([output.stats[index].load_E for output in outputs]).sum(0).cpu()
        whole["kept_E"] = torch.stack([output.stats[index].kept_E for output in outputs]).sum(0).cpu()
        whole["aux_loss"] = whole["aux_loss"] * mesh.layout.tp
        layers.append(replace(stats, **whole, sent_bytes=round(float(own[-1]) * mesh.layout.world * len(outputs))))
    # Each tp rank added 1/tp of its slice's auxiliary loss, so the world's mean is 1/tp of it.
    return nll, aux * mesh.layout.tp, layers
