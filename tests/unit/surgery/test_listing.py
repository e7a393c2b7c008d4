"""Starved experts, and experts that are alike, by name."""

import torch

from moe_dist.surgery.layers import add_experts, close_experts
from moe_dist.surgery.listing import alike_experts, describe_layer, listed, starved_experts
from tests.unit.surgery.helpers import layer_of


def test_starved_experts_are_open_and_far_below_an_even_share() -> None:
    assert starved_experts([400, 300, 10, 30, 259, 1], [], 0.1) == [2, 5]  # an even share of 1000 is 166.7
    assert starved_experts([400, 300, 10, 30, 259, 1], [], 0.2) == [2, 3, 5]
    assert starved_experts([500, 300, 0, 200], [2], 0.1) == []
    assert starved_experts([25, 25, 25, 25], [], 1.0) == []


def test_experts_that_are_alike_are_found_in_groups() -> None:
    layer = layer_of()
    assert alike_experts(layer, 0.99) == []
    add_experts(layer, 3, sources=[1, 4, 1], noise=0.0)
    with torch.no_grad():  # the cosine of w and w + r, |r| = 0.1 |w| and across to it, is 1 / sqrt(1.01) = 0.99504
        w_up = layer.experts.w_up[7]
        whole = torch.cat([w[7].flatten() for w in (layer.experts.w_gate, layer.experts.w_up, layer.experts.w_out)])
        away = torch.randn(w_up.shape, generator=torch.Generator().manual_seed(3))
        away -= (away * w_up).sum() / w_up.square().sum() * w_up
        w_up += away * (0.1 * whole.norm() / away.norm())
    (first, exact), (second, near) = alike_experts(layer, 0.99)
    assert (first, second) == ([1, 6, 8], [4, 7])
    assert exact > 1 - 1e-6 and abs(near - 1.01**-0.5) < 1e-5
    assert [group for group, _ in alike_experts(layer, 0.999)] == [[1, 6, 8]]


def test_experts_of_different_widths_are_compared_with_their_like() -> None:
    layer = layer_of(d_ff=[8, 16, 8, 16, 8, 24])
    with torch.no_grad():
        for w in (layer.experts.w_gate, layer.experts.w_up, layer.experts.w_out):
            w[24:32] = w[:8]  # hidden units of expert 2 begin at 24
    assert [group for group, _ in alike_experts(layer, 0.99)] == [[0, 2]]


def test_a_layer_in_words() -> None:
    layer = layer_of(num_experts=4)
    add_experts(layer, 2, noise=0.0)
    close_experts(layer, [3])
    lines = list(describe_layer(layer, [50, 2, 48, 0, 0, 0], 0.1, 0.99))
    assert lines == [
        "layer 0: 6 experts of width 24, top 2; closed 3-5; load 50.0% 2.0% 48.0% 0.0% 0.0% 0.0%",
        "  starved: 1 (2.00%); an even share is 33.33%",
        "  alike: 0, 4, cosine 1.0000 or more",
        "  alike: 1, 5, cosine 1.0000 or more",
    ]
    assert list(describe_layer(layer, None, 0.1, 1.1)) == ["layer 0: 6 experts of width 24, top 2; closed 3-5"]
    assert listed([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
