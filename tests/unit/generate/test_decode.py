"""Decoding, mostly of a model whose next token is known; and with a cache as without one."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moe_dist.attention.kv_cache import KVCache
from moe_dist.generate import decode
from moe_dist.generate.decode import CachedDecoder, generate
from moe_dist.generate.sampling import Sampling
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.step import StepContext
from tests.unit.helpers import tiny_model

GREEDY = Sampling(temperature=0)


class Counting:
    """The next token is the last one plus 1, modulo 10, for certain; remembers what it was shown."""

    device, tp = torch.device("cpu"), 1

    def __init__(self, tp: int = 1) -> None:
        self.shown: list[list[list[int]]] = []
        self.tp = tp

    def new_caches(self, rows: int, length: int) -> None:
        return None

    def next_logits(
        self, tokens_BS: Tensor, at_B: Tensor, step: StepContext, caches: Sequence[KVCache] | None
    ) -> Tensor:
        assert step.phase == "dropless"
        self.shown.append(tokens_BS.tolist())
        last_B = tokens_BS.gather(1, at_B[:, None])[:, 0]
        return 1000.0 * torch.nn.functional.one_hot((last_B + 1) % 10, 10).float()


class WithoutCache(CachedDecoder):
    def new_caches(self, rows: int, length: int) -> None:
        return None


def texts(model: decode.LanguageModel, prompts: list[list[int]], new: int, **options: object) -> list[list[int]]:
    settings = dict(context=8, seed=0, sampling=GREEDY) | options
    steps = list(generate(model, prompts, new, **settings))
    return [list(text) for text in zip(*steps, strict=True)]


def decoder(**changes: object) -> Decoder:
    return Decoder(tiny_model(attention="flash", **changes), single_process_mesh()).eval()


def test_continues_the_prompts() -> None:
    model = Counting()
    assert texts(model, [[7], [3, 4]], 3) == [[8, 9, 0], [5, 6, 7]]
    # what is shorter than the longest is filled up with zeros after its last token
    assert model.shown == [[[7, 0], [3, 4]], [[7, 8, 0], [3, 4, 5]], [[7, 8, 9, 0], [3, 4, 5, 6]]]


def test_a_row_that_is_full_goes_on_with_its_last_half() -> None:
    model = Counting()
    assert texts(model, [[1, 2, 3, 4, 5]], 5, context=4) == [[6, 7, 8, 9, 0]]
    assert [rows[0] for rows in model.shown] == [[2, 3, 4, 5], [5, 6], [5, 6, 7], [5, 6, 7, 8], [8, 9]]


def test_a_model_that_has_diverged_writes_nothing() -> None:
    model = decoder()
    with torch.no_grad():
        model.embedding.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="scores for the next token are not finite: its weights have diverged"):
        texts(CachedDecoder(model, torch.device("cpu")), [[1, 2]], 3)


def test_rows_are_made_up_for_tp() -> None:
    model = Counting(tp=4)
    assert texts(model, [[1], [5]], 2) == [[2, 3], [6, 7]]
    assert [len(rows) for rows in model.shown] == [4, 4]


def test_nothing_to_start_from() -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        texts(Counting(), [[1], []], 3)
    with pytest.raises(ValueError, match="context=1"):
        texts(Counting(), [[1]], 3, context=1)


@pytest.mark.parametrize("chunk", [3, 2048])
@pytest.mark.parametrize("context", [6, 40])
def test_with_a_cache_as_without(context: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of different lengths, sliding rows, and a prefill in pieces."""
    monkeypatch.setattr(decode, "_CHUNK", chunk)
    model, prompts = decoder().double(), [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
    sampling = Sampling(temperature=1.0, top_p=0.9)
    found = [
        texts(kind(model, torch.device("cpu")), prompts, 15, context=context, sampling=sampling)
        for kind in (CachedDecoder, WithoutCache)
    ]
    assert found[0] == found[1]
    assert len({tuple(text) for text in found[0]}) == 3


def test_a_text_depends_on_its_own_prompt() -> None:
    """And on its number, so that equal prompts differ."""
    model, sampling = CachedDecoder(decoder(), torch.device("cpu")), Sampling(temperature=1.0)
    alone = texts(model, [[1, 2, 3]], 12, sampling=sampling)
    among = texts(model, [[1, 2, 3], [4, 5, 6, 7, 8, 9], [1, 2, 3]], 12, sampling=sampling)
    assert among[0] == alone[0]
    assert among[2] != among[0]
    assert texts(model, [[1, 2, 3]], 12, sampling=sampling, seed=1) != alone


def test_training_mode_does_not_drop() -> None:
    model = decoder(capacity_factor=0.25)
    found = texts(CachedDecoder(model.train(), torch.device("cpu")), [[1, 2]], 6)
    assert found == texts(CachedDecoder(model.eval(), torch.device("cpu")), [[1, 2]], 6)
