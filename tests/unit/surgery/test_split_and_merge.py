"""Splitting, merging and experts of different widths: what is preserved, and what is not."""

import pytest
import torch

from moe_dist.config.rules.moe import moe_rules
from moe_dist.config.schema import ParallelConfig
from moe_dist.parallel.sharding import logical_parameters
from moe_dist.surgery.layers import add_experts, merge_experts, open_experts, remove_experts, split_experts
from tests.unit.helpers import context
from tests.unit.surgery.helpers import WIDTH, D, E, bits, layer_of, run, same_bits, tokens


@pytest.mark.parametrize("changes", [dict(), dict(top_k=1), dict(renormalize=False), dict(router="sigmoid"),
    dict(router="sigmoid", top_k=1), dict(router="sigmoid", renormalize=False), dict(router="noisy"),
    dict(router="sinkhorn"), dict(router="expert_choice", capacity_factor=1.0),
    dict(router="expert_choice", capacity_factor=1.0, top_k=1), dict(num_groups=3, top_k_groups=1),
    dict(expert_bias=True, activation="gelu"), dict(num_shared_experts=2),
    dict(num_shared_experts=2, shared_d_ff=10, shared_gate=True, router_bias=True),
    dict(top_k=1, renormalize_top_1=True)], ids=str)  # fmt: skip
@pytest.mark.parametrize("parts", [2, 3])
def test_splitting_every_expert_preserves_the_layer(parts: int, changes: dict) -> None:
    layer = layer_of(**changes)
    if layer.experts.b_out is not None:
        with torch.no_grad():
            for bias in (layer.experts.b_up, layer.experts.b_out):
                bias.normal_()
    before, stats = run(layer, "dropless")
    ids = add_experts(layer, E * (parts - 1), "split")
    assert ids == [i for i in range(E * parts) if i % parts]
    assert layer.config.top_k == parts * changes.get("top_k", 2)
    rules = moe_rules(layer.config, ParallelConfig(), d_ff=WIDTH, num_layers=1)
    assert list(rules) == []  # so that its checkpoint can be read again
    assert layer.experts.w_up.shape == (E * parts, WIDTH // parts, D)
    after, split = run(layer, "dropless")
    torch.testing.assert_close(after, before, rtol=1e-5, atol=2e-6)
    assert torch.equal(split.load_E, stats.load_E.repeat_interleave(parts))
    torch.testing.assert_close(split.balance_loss, stats.balance_loss)


@pytest.mark.parametrize("policy", ["position", "score"])
def test_splitting_keeps_what_is_dropped(policy: str) -> None:
    layer = layer_of(capacity_factor=0.75, drop_policy=policy)
    before, stats = run(layer)
    split_experts(layer, 2)
    after, split = run(layer)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=2e-6)
    assert torch.equal(split.kept_E, stats.kept_E.repeat_interleave(2))
    assert stats.kept_E.sum() < stats.load_E.sum()


def test_what_cannot_be_split() -> None:
    for changes, message in (
        (dict(router="hash"), "router=hash"),
        (dict(router="noisy", top_k=1), "router=noisy"),
        (dict(router="sigmoid", num_groups=3, top_k_groups=2), "ranks groups"),
    ):
        with pytest.raises(ValueError, match=message):
            split_experts(layer_of(**changes))
    with pytest.raises(ValueError, match="parts=5"):
        split_experts(layer_of(), 5)
    with pytest.raises(ValueError, match="multiple of num_experts=6"):
        add_experts(layer_of(), 1, "split")


def test_merging_is_the_weighted_mean() -> None:
    layer = layer_of(router="sigmoid", expert_bias=True)
    old = {name: value.clone() for name, value in layer.state_dict().items()}
    came_from = merge_experts(layer, [[4, 1], [5, 3]], weights=torch.tensor([0, 3, 0, 1, 1, 0]))
    assert came_from == [[0], [1, 4], [2], [3, 5]]
    for name, value in layer.state_dict().items():
        expected = torch.stack([old[name][0], (3 * old[name][1] + old[name][4]) / 4, old[name][2], old[name][3]])
        torch.testing.assert_close(value, expected)
    mean = layer_of()
    rows = mean.router.weight.detach().clone()
    merge_experts(mean, [[0, 1, 2]])
    torch.testing.assert_close(mean.router.weight, torch.cat([rows[:3].mean(0, keepdim=True), rows[3:]]))


def test_merging_exact_clones_gives_the_source_to_the_bit() -> None:
    layer = layer_of(router="sigmoid", top_k=1)
    before, state = run(layer)[0], {name: value.clone() for name, value in layer.state_dict().items()}
    open_experts(layer, add_experts(layer, 2 * E, noise=0.0))
    merge_experts(layer, [[i, i + E, i + 2 * E] for i in range(E)], weights=torch.rand(3 * E))
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    assert torch.equal(run(layer)[0], before)


def test_merging_clones_preserves_tokens_that_chose_at_most_one_of_them() -> None:
    layer = layer_of()
    open_experts(layer, add_experts(layer, 1, sources=[3], noise=0.0))
    before, experts_TK = run(layer)[0], layer.gate.routing(tokens(), context()).experts_TK
    both_T = ((experts_TK == 3) | (experts_TK == E)).sum(1) == 2
    one_T = ((experts_TK == 3) | (experts_TK == E)).sum(1) == 1
    assert both_T.any() and one_T.any()
    merge_experts(layer, [[3, E]])
    difference_T = (run(layer)[0] - before).abs().amax(-1)
    assert (difference_T[~both_T] < 2e-6).all()
    assert (difference_T[both_T] > 1e-3).all()


def test_experts_of_different_widths() -> None:
    layer = layer_of(d_ff=[8, 24, 8, 16, 24, 8], expert_bias=True)
    before = bits(layer)
    with pytest.raises(ValueError, match="give d_ff"):
        add_experts(layer, 1, "random")
    add_experts(layer, 1, "random", d_ff=12)
    add_experts(layer, 2, sources=[3, 1])
    assert layer.config.d_ff == [8, 24, 8, 16, 24, 8, 12, 16, 24]
    assert torch.equal(run(layer)[0], before["y"])
    assert torch.equal(layer.experts.w_up[88 + 12 :], layer.experts.w_up[[*range(40, 56), *range(8, 32)]])
    specs = {name: spec for name, _, spec in logical_parameters(layer)}
    assert specs["experts.w_out"].logical_shape == (140, D)
    assert specs["experts.w_out"].entries == tuple(width * D for width in layer.config.d_ff)
    remove_experts(layer, [6, 7, 8])
    same_bits(bits(layer), before, list(range(E)))
    remove_experts(layer, [1, 3, 4])  # those left are of one width again
    assert layer.config.d_ff == [8, 8, 8]
    assert layer.experts.w_up.shape == (3, 8, D)
    with pytest.raises(ValueError, match="different widths"):
        merge_experts(layer_of(d_ff=[8, 24, 8, 16, 24, 8]), [[0, 1]])
