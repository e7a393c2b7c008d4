"""Decoding with a cache: the prompts once, in chunks, then one token at a time, each drawn with a keyed number.

What a prompt becomes depends on nothing but the model, the prompt, its number in the batch and the seed: not on the
other prompts, nor on the layout.

Legend: B rows, S tokens of a call, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.attention.kv_cache import KVCache
from moe_dist.generate.sampling import Sampling
from moe_dist.kernels.random import RandomKey
from moe_dist.models.decoder import Decoder
from moe_dist.step import StepContext

_CHUNK = 2048  # tokens of a row that are prefilled at once
_ROW = 1 << 32  # tokens that a row may draw


class LanguageModel(Protocol):
    """What decoding asks of a model. Every rank must call, with the same arguments. device: where tokens go. tp: rows
    times tokens of every call are a multiple of it."""

    device: torch.device
    tp: int

    def new_caches(self, rows: int, length: int) -> list[KVCache] | None:
        """None: the model has no cache, and reads everything again for every token."""

    def next_logits(
        self, tokens_BS: Tensor, at_B: Tensor, step: StepContext, caches: Sequence[KVCache] | None
    ) -> Tensor:
        """[B, V]: what follows token at_B[b] of each row."""


class CachedDecoder:
    """A Decoder as a LanguageModel. forward: the decoder itself, or the `evaluate` of the engine that owns it."""

    def __init__(self, decoder: Decoder, device: torch.device, forward: Callable[..., Any] | None = None) -> None:
        self.decoder, self.device, self.tp = decoder, device, decoder.mesh.tp.size
        self.forward = forward or decoder

    def new_caches(self, rows: int, length: int) -> list[KVCache] | None:
        return self.decoder.new_caches(rows, length)

    @torch.no_grad()
    def next_logits(
        self, tokens_BS: Tensor, at_B: Tensor, step: StepContext, caches: Sequence[KVCache] | None
    ) -> Tensor:
        logits_BV: Tensor = self.forward(tokens_BS, None, step, "logits", caches=caches, at_B=at_B)
        return logits_BV


def generate(
    model: LanguageModel, prompts: Sequence[Sequence[int]], new_tokens: int, context: int, seed: int, sampling: Sampling
) -> Iterator[list[int]]:
    """The next token of each prompt, `new_tokens` times. Nothing is dropped by any expert.

    context: tokens that the model sees at most. A row that reaches it goes on with its last half. Raises ValueError for
    an empty prompt.
    """
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty: give at least one token")
    if new_tokens > _ROW:
        raise ValueError(f"{new_tokens} new tokens are more than the {_ROW} random numbers of a row")
    if context < 2:
        raise ValueError(f"context={context} is below 2: a token and the one after it")
    rows = [list(prompt)[-context:] for prompt in prompts]
    rows += [rows[-1][:] for _ in range(-len(rows) % model.tp)]  # tp ranks each take as many tokens
    caches, cached = model.new_caches(len(rows), context), False
    key, step = RandomKey.of(seed, "generate"), StepContext(RandomKey.of(seed, "dropless"), "dropless")
    number_B = torch.arange(len(rows), device=model.device) * _ROW
    for index in range(new_tokens):
        if any(len(row) > context for row in rows):
            rows = [row[-(context // 2) :] if len(row) > context else row for row in rows]
            cached = False
        if cached and caches is not None:
            last_B1 = torch.tensor([row[-1:] for row in rows], device=model.device)
            logits_BV = model.next_logits(last_B1, torch.zeros_like(last_B1[:, 0]), step, caches)
        else:
            logits_BV, cached = _read(model, rows, step, caches), True
        chosen_B = sampling.choose(logits_BV, key.uniform(number_B + index))
        if dist.is_initialized():
            dist.broadcast(chosen_B, src=0)  # ranks may differ in the last bit
        tokens = chosen_B.tolist()
        if min(tokens) < 0:
            raise ValueError("the model's scores for the next token are not finite: its weights have diverged")
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
        yield tokens[: len(prompts)]


def _read(model: LanguageModel, rows: list[list[int]], step: StepContext, caches: Sequence[KVCache] | None) -> Tensor:
    """Logits after the last token of each row, from the start; the caches then hold the rows and nothing else."""
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    # Rows are filled up on the right, where a causal model does not see it.
    tokens_BS = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.device)
    last_B = torch.tensor(lengths, device=model.device) - 1
    if caches is None:
        return model.next_logits(tokens_BS, last_B, step, None)
    for cache in caches:
        cache.reset()
    found = []
    for start in range(0, longest, _CHUNK):
        chunk_BS = tokens_BS[:, start : start + _CHUNK]
        at_B = (last_B - start).clamp(0, chunk_BS.shape[1] - 1)
        found.append(model.next_logits(chunk_BS, at_B, step, caches))
    for cache in caches:
        cache.truncate(lengths)
    chunk_B = last_B // _CHUNK
    return torch.stack(found)[chunk_B, torch.arange(len(rows), device=model.device)]
