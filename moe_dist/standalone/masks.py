"""A mask of what may be seen, in any of its shapes, as what is added to the scores.

Legend: B batch, H query heads, S queries, K keys.
"""

import torch
from torch import Tensor


def added_by(seen: Tensor, rows: int, heads: int, queries: int, keys: int) -> Tensor:
    """[1 or B, 1 or H, 1 or S, K] fp32: 0 where the bool mask `seen` says yes, -inf elsewhere.

    seen: [B, K] keys, [S, K] pairs, [B, S, K], or [B, H, S, K], where B, H and S may be 1. Raises ValueError for other
    shapes, and for two dimensions that could be either.
    """
    given = list(seen.shape)
    of_keys, of_pairs = given in ([rows, keys], [1, keys]), given == [queries, keys]
    if of_keys and of_pairs and given[0] > 1:
        raise ValueError(
            f"mask {given} could be of {rows} rows or of {queries} queries: give [{rows}, 1, 1, {keys}] or "
            f"[1, 1, {queries}, {keys}]"
        )
    if of_keys:
        seen = seen[:, None, None]
    elif of_pairs:
        seen = seen[None, None]
    elif seen.dim() == 3:
        seen = seen[:, None]
    sizes = (rows, heads, queries)
    fits = seen.dim() == 4 and all(n in (1, size) for n, size in zip(seen.shape[:3], sizes, strict=True))
    if not fits or seen.shape[3] != keys:
        raise ValueError(
            f"mask {given} is none of [{rows}, {keys}], [{queries}, {keys}], [{rows}, {queries}, {keys}] and "
            f"[{rows}, {heads}, {queries}, {keys}], with the keys in a cache counted"
        )
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -torch.inf)
