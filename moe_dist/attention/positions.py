"""Where the tokens of a forward pass are: made once by the model, read by the attention of every block.

A sequence may hold several documents, each with a token that ends it. That token is of the document before it:

    tokens     5 6 end 7 8 9 end 4          end: end_id
    document   0 0 0   1 1 1 1   2
    place      0 1 2   0 1 2 3   0

Legend: B batch, S sequence.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Positions:
    """rotary: (cos, sin), each [1 or B, S, half of the numbers of a head that are turned], or None. slopes_H: ALiBi
    slopes of all query heads. bias: added to the scores, [1 or B, 1 or H, S, keys]; -inf hides a key."""

    rotary: tuple[Tensor, Tensor] | None = None
    slopes_H: Tensor | None = None
    bias: Tensor | None = None


def documents_of(tokens_BS: Tensor, end_id: int) -> Tensor:
    """int64 [B, S]: how many documents of the sequence end before each token."""
    ended_BS = (tokens_BS == end_id).long()
    return ended_BS.cumsum(1) - ended_BS


def between_documents(tokens_BS: Tensor, end_id: int, dtype: torch.dtype) -> Tensor:
    """[B, 1, S, S] for `Positions.bias`: -inf where query and key are of different documents, else 0."""
    document_BS = documents_of(tokens_BS, end_id)
    apart_B1SS = (document_BS[:, :, None] != document_BS[:, None, :])[:, None]
    return torch.zeros(apart_B1SS.shape, dtype=dtype, device=tokens_BS.device).masked_fill(apart_B1SS, -torch.inf)


def places_in_documents(tokens_BS: Tensor, end_id: int) -> Tensor:
    """int64 [B, S]: how far each token is from the first of its document in the sequence."""
    at_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    behind_end_BS = torch.zeros_like(at_BS)
    behind_end_BS[:, 1:] = torch.where(tokens_BS[:, :-1] == end_id, at_BS[:, 1:], 0)
    return at_BS - behind_end_BS.cummax(1).values
