"""A language model of one's own with `MixtureOfExperts` where its MLPs were, trained on one process.

The examples `with_*.py` train this model under other tools, and print how far their losses are from those of this file.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist import MixtureOfExperts

STEPS, ROWS, LENGTH, VOCAB = 4, 8, 16, 64


class Block(nn.Module):
    def __init__(self, width: int, heads: int, seed: int, **moe: Any) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.experts_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        # A seed of its own for each layer, the same on all ranks.
        self.experts = MixtureOfExperts(width, 2 * width, num_experts=4, top_k=2, seed=seed, **moe)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y, aux_loss = self.experts(self.experts_norm(x), return_aux_loss=True)
        return x + y, aux_loss


class Model(nn.Module):
    """moe: options of `MixtureOfExperts`."""

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 2, **moe: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(Block(width, heads, seed, **({"dropout": 0.0} | moe)) for seed in range(layers))
        self.head = nn.Linear(width, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        """The loss of tokens [rows, length + 1]; the auxiliary losses keep the experts evenly loaded."""
        x, aux_losses = self.embedding(ids[:, :-1]), []
        for block in self.blocks:
            x, aux_loss = block(x)
            aux_losses.append(aux_loss)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids[:, 1:].flatten()) + torch.stack(aux_losses).sum()


def batch(step: int) -> Tensor:
    """[ROWS, LENGTH + 1]: each token is the one before it and 7, but for some noise."""
    generator = torch.Generator().manual_seed(step)
    first, noise = (
        torch.randint(VOCAB, (ROWS, 1), generator=generator),
        torch.rand(ROWS, LENGTH + 1, generator=generator),
    )
    return (first + 7 * torch.arange(LENGTH + 1) + (noise > 0.9).long()) % VOCAB


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)


def train(model: nn.Module, parts: int = 1) -> list[float]:
    """The losses. parts: of each batch, which a step takes one after the other, as ranks take them side by side."""
    optimizer, losses = optimizer_of(model), []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for part in batch(step).chunk(parts):
            loss = model(part) / parts
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        losses.append(total)
    return losses


def compare(name: str, losses: list[float], expected: list[float]) -> None:
    """Say what came out; an error where it is not what one process computes."""
    furthest = max(abs(ours - theirs) for ours, theirs in zip(losses, expected, strict=True))
    print(f"{name}: losses {' '.join(f'{loss:.4f}' for loss in losses)}, {furthest:.0e} from one process")
    assert furthest < 1e-4


if __name__ == "__main__":
    model = Model()
    losses = train(model)
    print(f"losses {' '.join(f'{loss:.4f}' for loss in losses)}")
    print(f"tokens to each expert of the last block: {model.blocks[-1].experts.expert_counts.tolist()}")
