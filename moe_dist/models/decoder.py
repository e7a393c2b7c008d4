"""The language model that the trainer trains: embedding, decoder blocks, output projection and loss.

Legend: B batch, S sequence, T = B * S tokens, D d_model, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_dist.attention.alibi import alibi_slopes
from moe_dist.attention.kv_cache import KVCache
from moe_dist.attention.positions import Positions, between_documents, places_in_documents
from moe_dist.attention.rotary import RotaryScaling, rotary_table
from moe_dist.attention.routed import RoutedSelfAttention
from moe_dist.attention.switch import SwitchAttention
from moe_dist.config.model import AttentionConfig, ModelConfig
from moe_dist.models.block import BlockReplay, DecoderBlock, norm_of
from moe_dist.moe.balance import Tally
from moe_dist.moe.drops import marks
from moe_dist.moe.layer import MoE
from moe_dist.moe.losses import MoEStats
from moe_dist.parallel.collectives import all_gather, own_slice
from moe_dist.parallel.linear import PositionEmbedding, VocabParallelEmbedding, enter, leave
from moe_dist.parallel.loss import linear_cross_entropy, token_losses
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.sharding import ParamSpec, initialize, parameter
from moe_dist.step import DocumentEnds, Site, StepContext

Want = Literal["loss", "token_losses", "logits"]


@dataclass(frozen=True)
class DecoderOutput:
    """loss: what to differentiate, nll plus this rank's share of the auxiliary losses. nll: nats per token, the mean
    over this data-parallel rank's tokens. stats: one per routed layer."""

    loss: Tensor
    nll: Tensor
    stats: tuple[MoEStats, ...]


class OutputProjection(nn.Module):
    """Final norm, projection to the vocabulary, and what is wanted of it."""

    def __init__(self, model: ModelConfig, mesh: Mesh, tied: nn.Parameter | None) -> None:
        super().__init__()
        d_model, vocab_size = model.d_model, model.vocab_size
        self.mesh = mesh
        self.scaling = model.logits_scaling
        self.norm = norm_of(model, mesh)
        local = vocab_size // mesh.tp.size
        start = mesh.tp.rank * local * d_model
        spec = ParamSpec((vocab_size, d_model), "tensor", start, d_model**-0.5)
        self.weight = parameter((local, d_model), spec) if tied is None else tied

    def forward(self, x_TD: Tensor, targets_T: Tensor | None, want: Want, rows: Tensor | None = None) -> Tensor:
        """`loss`: the mean, differentiable. `token_losses`: [T]. `logits`: [T, V] on every rank, or of `rows` alone."""
        x_TD = enter(self.norm(x_TD), self.mesh)
        x_TD = x_TD if self.scaling == 1.0 else x_TD / self.scaling
        if want == "logits":
            x_TD = x_TD if rows is None else x_TD[rows]
            return all_gather((x_TD @ self.weight.t()).t(), self.mesh.tp).t()
        assert targets_T is not None, "a loss needs targets"
        loss = linear_cross_entropy if want == "loss" else token_losses
        return loss(x_TD, self.weight, targets_T, self.mesh.tp)


class Decoder(nn.Module):
    """Decoder-only transformer on one rank of `mesh`; `seed` fixes the logical initial weights in every layout."""

    def __init__(self, model: ModelConfig, mesh: Mesh, seed: int = 0) -> None:
        super().__init__()
        self.config = model
        self.mesh = mesh
        self.embedding = VocabParallelEmbedding(model.vocab_size, model.d_model, mesh.tp, std=0.02)
        self.positions = None
        if model.attention.position == "learned":
            assert model.max_positions is not None, "config/rules/model.py asks for it"
            self.positions = PositionEmbedding(model.max_positions, model.d_model, mesh, std=0.02)
        self.blocks = nn.ModuleList(DecoderBlock(model, layer, mesh) for layer in range(model.num_layers))
        tied = self.embedding.weight if model.tie_embeddings else None
        self.output = OutputProjection(model, mesh, tied)
        initialize(self, seed)

    def forward(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None,
        step: StepContext,
        want: Want = "loss",
        caches: Sequence[KVCache] | None = None,
        at_B: Tensor | None = None,
    ) -> DecoderOutput | Tensor:
        """`loss`: a DecoderOutput. `token_losses`: nats [B, S]. `logits`: [B, S, V]. B * S must be divisible by tp, and
        every rank must call: there are exchanges inside.

        caches: from `new_caches`; the tokens continue what is in them. at_B: logits of this one token of each row,
        [B, V].
        """
        x_TD, stats = self._hidden(tokens_BS, step, caches)
        if at_B is not None:
            rows = torch.arange(len(at_B), device=at_B.device) * tokens_BS.shape[1] + at_B
            return self.output(x_TD, None, "logits", rows)
        result = self.output(x_TD, None if targets_BS is None else targets_BS.flatten(), want)
        if want != "loss":
            return result.view(*tokens_BS.shape, *result.shape[1:])
        loss = result + sum(layer.aux_loss for layer in stats)
        return DecoderOutput(loss, result.detach(), stats)

    def new_caches(self, rows: int, length: int) -> list[KVCache] | None:
        """One for each block, for `rows` sequences of at most `length` tokens. None: routed attention has no cache, it
        finds anew which keys a token sees."""
        attentions = [block.attention for block in self.blocks if isinstance(block, DecoderBlock)]
        if any(isinstance(attention, RoutedSelfAttention) for attention in attentions):
            return None
        return [attention.new_cache(rows, length) for attention in attentions]  # type: ignore[operator, union-attr]

    def balance_routers(self, tallies: dict[Site, Tally]) -> None:
        """Once an optimizer step: what routers are told of it, over all ranks and micro-steps."""
        for site, tally in tallies.items():
            routed = getattr(self.blocks[site.layer], site.kind)
            assert isinstance(routed, MoE | SwitchAttention), "tallies are of routed layers"
            routed.router.balance(tally.load_E, tally.needs_EB)

    def _hidden(
        self, tokens_BS: Tensor, step: StepContext, caches: Sequence[KVCache] | None
    ) -> tuple[Tensor, tuple[MoEStats, ...]]:
        model, shape = self.config, (tokens_BS.shape[0], tokens_BS.shape[1])
        ids_T = own_slice(tokens_BS.flatten(), self.mesh.tp)
        step = replace(step, seq_len=shape[1], token_ids_T=ids_T)
        if caches is None:
            step = replace(step, marks_XT=marks(ids_T, self.mesh.token_ranks, shape[1], step.frequency_V))
        x_TD = leave(self.embedding(tokens_BS.flatten()), self.mesh)
        x_TD = x_TD if model.embedding_multiplier == 1.0 else x_TD * model.embedding_multiplier
        if self.positions is not None:
            x_TD = x_TD + self._learned(self.positions, tokens_BS, caches, step.ends)
        positions = self._positions(tokens_BS, x_TD, caches, step.ends)
        recompute = model.recompute == "block" and torch.is_grad_enabled() and caches is None
        stats: list[MoEStats] = []
        for index, block in enumerate(self.blocks):
            cache = None if caches is None else caches[index]
            if recompute:
                args = (x_TD, shape, positions, step, None, BlockReplay())
                x_TD, of_block = checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TD, of_block = block(x_TD, shape, positions, step, cache)
            stats += of_block
        return x_TD, tuple(stats)

    def _learned(
        self,
        positions: PositionEmbedding,
        tokens_BS: Tensor,
        caches: Sequence[KVCache] | None,
        ends: DocumentEnds | None,
    ) -> Tensor:
        """Vectors of the places of all tokens, or of this rank's slice of them, as x_TD is cut."""
        at_BS, longest = _places(tokens_BS, caches, ends)
        if longest > positions.count:
            raise ValueError(
                f"{longest} tokens are more than max_positions={positions.count}: give the model at most that many"
            )
        at_T = at_BS.expand(tokens_BS.shape).flatten()
        learned_TD: Tensor = positions(own_slice(at_T, self.mesh.tp) if self.mesh.sequence_parallel else at_T)
        return learned_TD

    def _positions(
        self, tokens_BS: Tensor, x_TD: Tensor, caches: Sequence[KVCache] | None, ends: DocumentEnds | None
    ) -> Positions:
        """Positions continue what is in the caches, row by row."""
        model, bias = self.config, None
        if ends is not None and ends.mask:
            bias = between_documents(tokens_BS, ends.end_id, x_TD.dtype)
        if model.attention.position in ("none", "learned"):
            return Positions(bias=bias)
        if model.attention.position == "alibi":
            return Positions(slopes_H=alibi_slopes(model.num_heads, device=x_TD.device), bias=bias)
        at_BS, longest = _places(tokens_BS, caches, ends)
        if x_TD.dtype == torch.float64:
            at_BS = at_BS.double()
        table = rotary_table(at_BS, model.rotary_width, model.rope_theta, _scaling(model.attention, longest))
        return Positions(table, bias=bias)


def _places(tokens_BS: Tensor, caches: Sequence[KVCache] | None, ends: DocumentEnds | None) -> tuple[Tensor, int]:
    """Where the tokens are, [1 or B, S], and how many tokens the longest row has, with those in its cache."""
    longest = tokens_BS.shape[1]
    at_BS = torch.arange(longest, device=tokens_BS.device)[None]
    if ends is not None and ends.reset:
        at_BS = places_in_documents(tokens_BS, ends.end_id)
    if caches is not None:
        starts_B, longest = caches[0].starts(), longest + caches[0].cache_position
        at_BS = at_BS + (caches[0].cache_position if starts_B is None else starts_B[:, None])
    return at_BS, longest


def _scaling(config: AttentionConfig, longest: int) -> RotaryScaling:
    """longest: tokens of the longest row, with those in its cache."""
    return RotaryScaling(
        config.rope_scaling,
        config.rope_factor,
        config.rope_original_len,
        config.fast_turns,
        config.rope_slow_turns,
        config.rope_truncate,
        longest,
    )
