"""Text from a trained decoder: a window that slides over the sequence, sampled with a keyed random number per token."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.moe.routing import StepContext
from moe_dist.parallel.random import RandomKey


def generate(
    logits: Callable[[Tensor, StepContext], Tensor],
    prompt: list[int],
    new_tokens: int,
    window: int,
    seed: int,
    device: torch.device,
    temperature: float = 0.8,
) -> list[int]:
    """`new_tokens` ids after `prompt`. Every rank must call it, with the same arguments; all return the same ids.

    logits: tokens [1, window] -> [1, window, V], dropless. The window always has the same length: positions past the
    last token are filled, which a causal model does not see. temperature 0 takes the most likely token.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must not be negative")
    if not prompt:
        raise ValueError("the prompt is empty: give at least one token")
    key, ids = RandomKey.of(seed, "generate"), list(prompt)
    for index in range(new_tokens):
        seen = ids[-window:]
        tokens_1S = torch.zeros(1, window, dtype=torch.int64, device=device)
        tokens_1S[0, : len(seen)] = torch.tensor(seen, device=device)
        logits_V = logits(tokens_1S, StepContext(key, "dropless"))[0, len(seen) - 1].double()
        if temperature == 0:
            chosen = logits_V.argmax(keepdim=True)
        else:
            draw = key.fold(index).uniform(torch.zeros(1, dtype=torch.int64, device=device))
            probs_V = (logits_V / temperature).softmax(-1)
            chosen = torch.searchsorted(probs_V.cumsum(0), draw).clamp(max=probs_V.numel() - 1)
        if dist.is_initialized():
            dist.broadcast(chosen, src=0)  # ranks may differ in the last bit
        ids.append(int(chosen))
    return ids[len(prompt) :]
