"""The classifier: token and position embedding, encoder blocks with MoE layers, mean over tokens, one linear head.

`Classifier` is what the trainer trains, in any layout; `SwitchClassifier` (standalone/classifier.py) is its plain face.

Legend: B batch, S sequence, T = B * S tokens, D d_model, C classes.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config.model import ModelConfig
from moe_dist.models.decoder import DecoderOutput, Want
from moe_dist.models.encoder_block import Drop, EncoderBlock
from moe_dist.moe.balance import Tally
from moe_dist.moe.drops import marks
from moe_dist.moe.layer import MoE
from moe_dist.moe.losses import MoEStats
from moe_dist.parallel.collectives import own_slice
from moe_dist.parallel.linear import VocabParallelEmbedding, leave
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.sharding import ParamSpec, initialize, parameter
from moe_dist.step import RealTokens, Site, StepContext


class Classifier(nn.Module):
    """Encoder and head on one rank of `mesh`; `seed` fixes the logical initial weights in every layout.

    max_len: positions that have an embedding. pad_id: the token that is padding wherever it stands.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, max_len: int, seed: int = 0, pad_id: int = 0) -> None:
        super().__init__()
        assert model.num_classes is not None, "the number of classes is known before the model is built"
        self.config = model
        self.mesh = mesh
        self.pad_id = pad_id
        self.embedding = VocabParallelEmbedding(model.vocab_size, model.d_model, mesh.tp, std=0.1)
        self.positions = parameter((max_len, model.d_model), ParamSpec((max_len, model.d_model), std=0.1))
        self.blocks = nn.ModuleList(EncoderBlock(model, layer, mesh) for layer in range(model.num_layers))
        shape = (model.num_classes, model.d_model)
        self.head = parameter(shape, ParamSpec(shape, std=model.d_model**-0.5))
        self.head_bias = parameter(shape[:1], ParamSpec(shape[:1], std=0.0))
        initialize(self, seed)

    def forward(
        self, tokens_BS: Tensor, targets_B: Tensor | None, step: StepContext, want: Want = "loss"
    ) -> DecoderOutput | Tensor:
        """`loss`: a DecoderOutput whose nll is the mean over the rank's sequences. `token_losses`: nats of each
        sequence, [B]. `logits`: [B, C], fp32. B * S must be divisible by tp, and every rank must call."""
        logits_BC, stats = self.classify(tokens_BS, tokens_BS != self.pad_id, step)
        if want == "logits":
            return logits_BC
        assert targets_B is not None, "a loss needs targets"
        losses_B = F.cross_entropy(logits_BC, targets_B, reduction="none")
        if want == "token_losses":
            return losses_B
        nll = losses_B.mean()
        return DecoderOutput(nll + sum(layer.aux_loss for layer in stats), nll.detach(), stats)

    def classify(self, tokens_BS: Tensor, mask_BS: Tensor, step: StepContext) -> tuple[Tensor, tuple[MoEStats, ...]]:
        """Logits [B, C] in fp32, and the statistics of each MoE layer. mask_BS: true where a token is no padding."""
        tp, first = self.mesh.tp, self.mesh.dp.rank * mask_BS.numel()
        training = step.phase == "train"
        if training and self.config.token_dropout > 0.0:
            index_BS = torch.arange(first, first + mask_BS.numel(), device=mask_BS.device).view_as(mask_BS)
            mask_BS = mask_BS & step.key.fold("token dropout").keeps(index_BS, self.config.token_dropout)
        mask_T, ids_T, length = mask_BS.flatten(), own_slice(tokens_BS.flatten(), tp), tokens_BS.shape[1]
        step = replace(
            step,
            seq_len=length,
            token_ids_T=ids_T,
            real=RealTokens.of(own_slice(mask_T, tp), self.mesh.token_ranks),
            marks_XT=marks(ids_T, self.mesh.token_ranks, length, step.frequency_V),
        )
        drop = Drop(self.config.dropout if training else 0.0, step.key, first)
        x_TD = leave(self.embedding(tokens_BS.flatten()), self.mesh)
        x_TD = x_TD + self.positions[: tokens_BS.shape[1]].repeat(len(tokens_BS), 1)
        x_TD = drop(x_TD, "embedding")
        stats = []
        for number, block in enumerate(self.blocks):
            x_TD, layer = block(x_TD, mask_BS, step, replace(drop, key=step.key.fold("block", number)))
            if layer is not None:
                stats.append(layer)
        return self._head(x_TD, mask_BS), tuple(stats)

    def balance_routers(self, tallies: dict[Site, Tally]) -> None:
        """Once an optimizer step: what routers are told of it, over all ranks and micro-steps."""
        for layer in self.moe_layers():
            tally = tallies[layer.router.site]
            layer.router.balance(tally.load_E, tally.needs_EB)

    def moe_layers(self) -> list[MoE]:
        return [block.feed_forward for block in self.blocks if isinstance(block.feed_forward, MoE)]

    def _head(self, x_TD: Tensor, mask_BS: Tensor) -> Tensor:
        """The mean over tokens that are no padding, then W x + b; fp32 from the mean on."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        x_BSD = x_TD.view(*mask_BS.shape, -1).to(wide).masked_fill(~mask_BS[..., None], 0.0)
        mean_BD = x_BSD.sum(1) / mask_BS.sum(1, keepdim=True).clamp(min=1)
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(mean_BD, self.head.to(wide), self.head_bias.to(wide))
