"""Upcycling into copies that are cut into narrower experts: the same function, in experts that can learn apart."""

from dataclasses import replace

import pytest
import torch

from moe_dist.config.model import MoEConfig
from moe_dist.models.decoder import Decoder
from moe_dist.moe.layer import MoE
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.surgery.models import before_cutting, upcycle_decoder
from tests.unit.helpers import context, random_ids, tiny_model


@pytest.mark.parametrize(
    ("granularity", "changes"),
    [
        (1, dict(num_experts=4, top_k=4)),  # all copies: k = E
        (1, dict(num_experts=4, top_k=4, renormalize=False)),
        (2, dict(num_experts=8, top_k=2)),  # one whole copy, which the router weighs by 1
        (2, dict(num_experts=8, top_k=2, renormalize=False)),
        (2, dict(num_experts=8, top_k=4)),
        (4, dict(num_experts=16, top_k=8)),
        (3, dict(num_experts=6, top_k=6)),
        (2, dict(num_experts=8, top_k=2, router="sigmoid")),
        (2, dict(num_experts=8, top_k=4, router="sigmoid", renormalize=False)),
    ],
    ids=str,
)
def test_cut_copies_compute_what_the_dense_decoder_does(granularity: int, changes: dict) -> None:
    dense, ids = Decoder(tiny_model(num_experts=0), single_process_mesh(), seed=5), random_ids(3, 10)
    moe = replace(MoEConfig(capacity_factor=None), **changes)
    decoder = upcycle_decoder(dense, moe, granularity=granularity)
    made = decoder.config.moe
    assert (made.num_experts, made.top_k, made.renormalize) == (moe.num_experts, moe.top_k, moe.renormalize)
    assert made.d_ff == (None if granularity == 1 else 24 // granularity) and not made.renormalize_top_1
    for phase in ("train", "dropless"):
        logits, expected = (m(ids, None, context(phase=phase), "logits") for m in (decoder, dense))
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    layer = decoder.blocks[0].feed_forward
    assert isinstance(layer, MoE)
    used = layer(torch.randn(400, 16), context())[1].load_E
    assert int((used > 0).sum()) == moe.num_experts, "the router spreads tokens over all copies"


def test_what_cannot_be_cut() -> None:
    for name, moe in (("top_k", MoEConfig(num_experts=8, top_k=3)), ("num_experts", MoEConfig(num_experts=9, top_k=2))):
        with pytest.raises(ValueError, match=f"granularity=2 must divide .*{name}="):
            before_cutting(moe, 2)
    dense = Decoder(tiny_model(num_experts=0), single_process_mesh())
    with pytest.raises(ValueError, match=r"divide the experts' width, d_ff=\[24\]"):
        upcycle_decoder(dense, MoEConfig(num_experts=10, top_k=5), granularity=5)
