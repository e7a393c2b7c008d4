import pytest
import torch

from moe_dist.parallel.mesh import Layout
from moe_dist.train.health import replicas
from moe_dist.train.health.replicas import digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.int64])
def test_every_bit_counts(dtype: torch.dtype) -> None:
    values = (torch.arange(24).view(4, 6) % 5).to(dtype)
    before = digest(values)
    assert digest(values.clone()) == before
    raw = values.view(-1).view(torch.uint8)
    bits = range(8) if dtype != torch.bool else range(1)
    for byte in range(0, raw.numel(), 7):
        for bit in bits:
            raw[byte] ^= 1 << bit
            assert digest(values) != before
            raw[byte] ^= 1 << bit
    assert digest(values) == before


def test_places_and_signed_zeros_count() -> None:
    assert digest(torch.tensor([1.0, 2.0])) != digest(torch.tensor([2.0, 1.0]))
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))
    assert digest(torch.tensor([])) == 0


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(101)
    whole = digest(values)
    monkeypatch.setattr(replicas, "_CHUNK", 7)
    assert digest(values) == whole


def test_who_is_wrong() -> None:
    """Four ranks, ep 2, tp 2: experts lie on (0, 2) and (1, 3), cut parameters too, the rest on all."""
    layout = Layout(4, ep=2, tp=2)
    held = [
        {"norm": ("replicated", 7), "wq": ("tensor", 3 + rank % 2), "up": ("expert", rank % 2)} for rank in range(4)
    ]
    sound: list[list[str]] = [[], [], [], []]
    assert replicas._describe(held, sound, layout) == ""
    held[2] |= {"norm": ("replicated", 8)}
    assert replicas._describe(held, sound, layout) == "rank 2 is unlike the other ranks in norm"
    held[3] |= {"up": ("expert", 9), "wq": ("tensor", 9)}
    assert sorted(replicas._describe(held, sound, layout).split("; ")) == [
        "rank 1 and rank 3 are unlike each other, and which one is wrong cannot be told, in wq and 1 more parameters",
        "rank 2 is unlike the other ranks in norm",
    ]
    # Of four copies the majority tells. Where a master is wrong, its rank calls the others' copies wrong, and they its.
    masters_of_all: list[list[str]] = [["norm", "up", "wq"]] * 4
    assert sorted(replicas._describe(held, masters_of_all, layout).split("; ")) == [
        "rank 1 and rank 3 are unlike each other, and which one is wrong cannot be told, in wq and 1 more parameters",
        "rank 2 is unlike the other ranks in norm",
    ]
    masters_say: list[list[str]] = [[], ["up"], [], ["wq"]]
    assert sorted(replicas._describe(held, masters_say, layout).split("; ")) == [
        "rank 1 is unlike the optimizer's masters in up",
        "rank 2 is unlike the other ranks in norm",
        "rank 3 is unlike the optimizer's masters in wq",
    ]
