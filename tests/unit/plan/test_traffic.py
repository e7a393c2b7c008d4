"""Even shares, dealt out by hand, and what a plan of traffic refuses. What it says of real steps: tests/dist."""

import pytest
import torch
from torch import Tensor

from moe_dist.config import batch_shape, validate
from moe_dist.config.model import MoEConfig
from moe_dist.parallel.mesh import Layout
from moe_dist.plan.traffic import traffic
from moe_dist.plan.traffic.rows import EvenShare
from moe_dist.step import Site
from tests.dist.helpers import tiny_config


def dealt(moe: MoEConfig, tokens: int, world: int, limit: int | None) -> Tensor:
    """One assignment after another, as the capacity rule takes them."""
    kept_WE = torch.zeros(world, moe.num_experts, dtype=torch.int64)
    for number in range(world * tokens * moe.top_k):
        rank, expert = number // (tokens * moe.top_k), number % moe.num_experts
        taken = kept_WE[:, expert].sum() if moe.capacity_scope == "global" else kept_WE[rank, expert]
        kept_WE[rank, expert] += limit is None or bool(taken < limit)
    return kept_WE


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize(("experts", "top_k", "tokens", "world"), [(4, 2, 3, 2), (16, 1, 5, 4), (6, 3, 8, 3)])
def test_an_even_share_is_dealt_like_cards(scope: str, experts: int, top_k: int, tokens: int, world: int) -> None:
    moe = MoEConfig(num_experts=experts, top_k=top_k, capacity_scope=scope)  # type: ignore[arg-type]
    for limit in (None, 1, 2, 5):
        found = EvenShare(moe, tokens, world).kept_WE(limit)
        assert torch.equal(found, dealt(moe, tokens, world, limit)), limit


def test_rows_by_hand() -> None:
    """Top-1 of 4 experts on two ranks of 8 tokens of 32 numbers in fp32: each sends half of its 8 rows away, of 128
    bytes, and gets as many; forward, and backward as much."""
    config = tiny_config(
        parallel__ep=2, model__moe__top_k=1, model__num_layers=1, train__global_batch=1, train__seq_len=8
    )
    config.train.global_batch = 2
    found = traffic(config, validate(config, 2), Layout(2, ep=2), 1)
    moved = [(t.phase, t.what, t.calls, t.bytes, t.wire_bytes) for t in found if t.collective == "all_to_all"]
    assert sorted(moved) == [
        (phase, what, 1, 1024, 512)
        for phase in ("backward", "forward")
        for what in ("rows from experts", "rows to experts")
    ]


def test_rows_must_be_those_of_the_layers() -> None:
    config = tiny_config(parallel__ep=2)
    shape = batch_shape(config.train, 2)
    with pytest.raises(ValueError, match=r"rows has no counts of Site\(layer=0.*micro-step 0"):
        traffic(config, shape, Layout(2, ep=2), rows={})
    with pytest.raises(ValueError, match=r"shape \[2, 3\].*\[2, 4\]"):
        traffic(config, shape, Layout(2, ep=2), rows={(0, Site(0)): torch.zeros(2, 3, dtype=torch.int64)})


def test_a_classifier_says_how_many_classes_it_has() -> None:
    config = tiny_config(task="classification", parallel__ep=2)
    with pytest.raises(ValueError, match=r"num_classes=null .* set model\.num_classes"):
        traffic(config, batch_shape(config.train, 2), Layout(2, ep=2))
