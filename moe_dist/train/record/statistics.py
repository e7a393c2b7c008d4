"""What a step has computed, over all micro-steps and ranks."""

import torch

from moe_dist.models.decoder import DecoderOutput
from moe_dist.parallel.collectives import all_reduce
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.record.metrics import LayerLoad


def gather_statistics(
    outputs: list[DecoderOutput], mesh: Mesh, device: torch.device
) -> tuple[float, float, list[LayerLoad]]:
    """(loss, auxiliary loss, what each MoE layer did): means over micro-steps and ranks, in one all-reduce; loads are
    sums over the world already. The same on every rank. outputs: this rank's, of the micro-steps of one step."""
    per_micro = []
    for output in outputs:
        values = [output.nll, sum((s.aux_loss.detach() for s in output.stats), output.nll.new_zeros(()))]
        for stats in output.stats:
            values += [stats.entropy, stats.balance_loss, stats.z_loss, stats.unserved]
            values.append(torch.tensor(stats.sent_bytes, device=device))
        per_micro.append(torch.stack([value.double() for value in values]))
    mean = all_reduce(torch.stack(per_micro).mean(0), mesh.world) / mesh.layout.world
    nll, aux, *rest = mean.tolist()
    layers = []
    for index, stats in enumerate(outputs[0].stats):
        load_E = torch.stack([output.stats[index].load_E for output in outputs]).sum(0)
        kept_E = torch.stack([output.stats[index].kept_E for output in outputs]).sum(0)
        entropy, balance, z, unserved, sent = rest[5 * index : 5 * index + 5]
        sent = round(sent * mesh.layout.world * len(outputs))
        loads = (load_E.tolist(), kept_E.tolist())
        layers.append(LayerLoad(stats.layer, *loads, entropy, balance, z, unserved, sent, stats.kind))
    # Each tp rank added 1/tp of its slice's auxiliary loss, so the world's mean is 1/tp of it.
    return nll, aux * mesh.layout.tp, layers
