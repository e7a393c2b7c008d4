"""What adding, opening, closing and removing experts preserve, to the bit or to rounding, and what they do not."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moe_dist.models.block import moe_layer
from moe_dist.moe.layer import MoE
from moe_dist.parallel.mesh import Layout, mesh_without_processes
from moe_dist.parallel.sharding import logical_parameters
from moe_dist.surgery.layers import add_experts, close_experts, merge_experts, open_experts, remove_experts
from tests.unit.helpers import context, tiny_model
from tests.unit.surgery.helpers import E, T, bits, layer_of, run, same_bits, tokens

ROUTERS = [
    dict(router="softmax"),
    dict(router="softmax", renormalize=False),
    dict(router="softmax", top_k=1),
    dict(router="softmax", router_bias=True),
    dict(router="softmax", jitter=0.1),
    dict(router="softmax", num_groups=3, top_k_groups=2),
    dict(router="sigmoid"),
    dict(router="sigmoid", top_k=1),
    dict(router="sigmoid", num_groups=3, top_k_groups=2),
    dict(router="noisy"),
    dict(router="noisy", top_k=1),
    dict(router="expert_choice", capacity_factor=1.0),
    dict(router="sinkhorn"),
    dict(router="sinkhorn", top_k=1),
    dict(router="hash"),
]
LIMITS = [
    dict(),
    dict(capacity_factor=0.75),
    dict(capacity_factor=0.75, drop_order="choice"),
    dict(capacity_factor=0.75, drop_policy="score"),
    dict(capacity_factor=0.75, drop_policy="random"),
    dict(capacity_factor=0.75, overflow="reroute"),
]


@pytest.mark.parametrize("limit", LIMITS, ids=str)
@pytest.mark.parametrize("router", ROUTERS, ids=str)
@pytest.mark.parametrize("init", ["clone", "random"])
def test_added_experts_change_no_bit_until_opened(init: str, router: dict, limit: dict) -> None:
    """Outputs, losses, counts and gradients, in training and evaluation; and removing them again is the way back."""
    if router["router"] == "expert_choice" and limit.keys() & {"overflow", "drop_order"}:
        pytest.skip("expert choice refuses nobody, and has no queue")
    layer = layer_of(**(limit | router))
    before = bits(layer)
    ids = add_experts(layer, 4, init)
    assert ids == [6, 7, 8, 9]
    assert layer.config.num_experts == layer.experts.w_up.shape[0] == 10
    same_bits(bits(layer), before, list(range(E)))
    open_experts(layer, ids)
    after = bits(layer)
    assert all(value.isfinite().all() for value in after.values())
    assert init == "clone" or after["load_E"][ids].sum() > 0
    close_experts(layer, ids)
    assert remove_experts(layer, ids) == list(range(E))
    same_bits(bits(layer), before, list(range(E)))


@pytest.mark.parametrize("backend", ["loop", "bmm", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_added_experts_change_no_bit_under_any_backend(backend: str, dtype: torch.dtype) -> None:
    layer = layer_of(experts=backend, expert_bias=True, num_shared_experts=1).to(dtype)
    before = run(layer, x_TD=tokens(dtype=dtype))[0]
    for init in ("clone", "random"):
        add_experts(layer, 3, init)
        assert {p.dtype for p in layer.parameters()} == {dtype}
        assert torch.equal(run(layer, x_TD=tokens(dtype=dtype))[0], before)


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_a_layer_with_closed_experts_is_the_layer_without_them(router: dict) -> None:
    """Also when closed experts are in the middle: their logits are -inf, and removing them changes no bit."""
    layer = layer_of(**(dict(capacity_factor=0.75) | router))
    gone = [2, 3]
    close_experts(layer, gone)
    closed = bits(layer)
    routing = layer.gate.routing(tokens(), replace(context(), token_ids_T=torch.arange(T)))
    assert routing.logits_TE[:, gone].isneginf().all()
    stay = remove_experts(layer, gone)
    assert stay == [0, 1, 4, 5]
    same_bits(closed, bits(layer), stay)


def test_logits_of_closed_experts_by_hand() -> None:
    """The usual formulas with -inf for the closed expert, 5 open ones."""
    layer = layer_of(top_k=1)
    close_experts(layer, [1])
    logits_TE = tokens() @ layer.router.weight.t()
    logits_TE[:, 1] = -torch.inf
    probs_TE = logits_TE.softmax(-1)
    routing = layer.gate.routing(tokens(), context())
    assert torch.equal(routing.experts_TK[:, 0], probs_TE.argmax(-1))
    torch.testing.assert_close(routing.weights_TK[:, 0], probs_TE.max(-1).values)
    torch.testing.assert_close(routing.logits_TE, logits_TE)
    _, stats = run(layer)
    share_E = probs_TE.argmax(-1).bincount(minlength=E) / T
    torch.testing.assert_close(stats.balance_loss, 5 * (share_E * probs_TE.mean(0)).sum())
    torch.testing.assert_close(stats.z_loss, logits_TE.logsumexp(-1).square().mean())


def test_closed_experts_travel_with_the_weights() -> None:
    layer, other = layer_of(), layer_of(num_experts=E + 2, seed=1)
    before = run(layer)[0]
    add_experts(layer, 2)
    assert not torch.equal(run(other)[0], before)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(run(other)[0], before)
    # An engine writes into views of buffers, behind the layer's back.
    for name, buffer in other.named_buffers():
        if name.endswith("open_E"):
            buffer.view(-1).copy_(torch.ones(E + 2))
    assert other.router.open_ids() is None


def test_random_experts_are_those_a_larger_model_starts_with() -> None:
    for changes in (dict(), dict(router="noisy", expert_bias=True), dict(activation="relu", router="sigmoid")):
        layer, larger = layer_of(**changes), layer_of(**(changes | dict(num_experts=E + 3)))
        ids = add_experts(layer, 3, "random", seed=0)
        open_experts(layer, ids)
        mine = dict(layer.named_parameters())
        for name, param in larger.named_parameters():
            assert torch.equal(mine[name], param), name
            assert mine[name].spec == param.spec, name
        assert layer.config == larger.config


def test_clones_are_copies_of_the_experts_asked_for() -> None:
    load_E = torch.tensor([1, 0, 9, 0, 7, 2])
    for options, origin in (
        (dict(), [0, 1, 2]),
        (dict(sources=[5]), [5, 5, 5]),
        (dict(sources=[3, 1]), [3, 1, 3]),
        (dict(load_E=load_E), [2, 4, 5]),
    ):
        layer = layer_of(expert_bias=True, router="sigmoid")
        with torch.no_grad():
            layer.experts.b_out.normal_()
        add_experts(layer, 3, noise=0.0, **options)
        for value in [*layer.experts.parameters(), layer.router.weight, layer.router.bias_E]:
            assert torch.equal(value[E:], value[origin])
        assert not any(torch.equal(layer.experts.w_up[E], layer.experts.w_up[i]) for i in range(E) if i != origin[0])


def test_noise_moves_the_router_rows_of_clones_alone() -> None:
    layer = layer_of()
    add_experts(layer, 4, sources=[3], noise=0.1)
    assert torch.equal(layer.experts.w_up[E], layer.experts.w_up[3])
    away = layer.router.weight[E:] - layer.router.weight[3]
    size = float(away.detach().std() / layer.router.weight[3].detach().std())
    assert 0.07 < size < 0.13
    assert len(set(away[:, 0].tolist())) == 4


def test_opening_a_clone_at_top_1() -> None:
    """Up to rounding, as the router's product has more columns: sigmoid weights stay, softmax has twice the terms."""
    layer = layer_of(router="sigmoid", top_k=1)
    before = run(layer)[0]
    open_experts(layer, add_experts(layer, E, noise=0.0))
    torch.testing.assert_close(run(layer)[0], before, rtol=1e-6, atol=1e-6)

    layer = layer_of(top_k=1)
    before, routing = run(layer)[0], layer.gate.routing(tokens(), context())
    open_experts(layer, add_experts(layer, E, noise=0.0))
    after = layer.gate.routing(tokens(), context())
    assert torch.equal(after.experts_TK % E, routing.experts_TK)
    torch.testing.assert_close(after.weights_TK, routing.weights_TK / 2)  # all are cloned: every p is halved
    torch.testing.assert_close(run(layer)[0], before / 2)


def test_opening_clones_at_top_2_does_not_preserve_outputs() -> None:
    """Both places go to the best expert and its clone: y = E_best(x)."""
    layer = layer_of()
    best_T = layer.gate.routing(tokens(), context()).experts_TK[:, 0]
    before = run(layer)[0]
    open_experts(layer, add_experts(layer, E, noise=0.0))
    after = layer.gate.routing(tokens(), context())
    assert torch.equal(after.experts_TK.sort(1).values, torch.stack([best_T, best_T + E], 1))
    assert (run(layer)[0] - before).abs().max() > 0.1


def test_clones_with_noise_share_their_sources_tokens() -> None:
    layer = layer_of(top_k=1)
    of_source = layer.gate.routing(tokens(400), context()).experts_TK[:, 0] == 3
    (clone,) = add_experts(layer, 1, sources=[3])
    open_experts(layer, [clone])
    now = layer.gate.routing(tokens(400), context()).experts_TK[:, 0]
    kept, taken = int((now[of_source] == 3).sum()), int((now[of_source] == clone).sum())
    assert kept + taken == int(of_source.sum())
    assert min(kept, taken) > 5


def test_opening_a_hashed_expert_moves_only_the_tokens_that_are_its_now() -> None:
    layer = layer_of(router="hash", top_k=1)
    before = run(layer)[0]
    (new,) = add_experts(layer, 1)
    open_experts(layer, [new])
    where = replace(context(), token_ids_T=torch.arange(T) % 29)
    moved_T = layer.gate.routing(tokens(), where).experts_TK[:, 0] == new
    assert 0 < moved_T.sum() < T // 2
    torch.testing.assert_close(run(layer)[0][~moved_T], before[~moved_T], rtol=1e-6, atol=1e-6)
    remove_experts(layer, [2])  # 3 becomes 2, and keeps its tokens
    was_2_T = layer_of(router="hash", top_k=1).gate.routing(tokens(), where).experts_TK[:, 0] == 2
    same_T = ~moved_T & ~was_2_T
    torch.testing.assert_close(run(layer)[0][same_T], before[same_T], rtol=1e-6, atol=1e-6)


def never_chosen(layer: MoE, expert: int, x_TD: Tensor) -> None:
    """Its logit is far below all others for every one of these tokens, which get a constant last number."""
    with torch.no_grad():
        layer.router.weight[expert] = 0.0
        layer.router.weight[expert, -1] = -4.0
        if hasattr(layer.router, "noise_weight"):
            layer.router.noise_weight.zero_()
    x_TD[:, -1] = 2.0


@pytest.mark.parametrize(
    "router", [r for r in ROUTERS if r["router"] not in ("hash", "expert_choice") and "num_groups" not in r], ids=str
)
def test_removing_an_expert_that_nobody_chooses(router: dict) -> None:
    """Equal to 1e-6 where a weight does not depend on it; else weights grow by 1 / (1 - p)."""
    layer, x_TD = layer_of(**router), tokens()
    never_chosen(layer, 2, x_TD)
    before, stats = run(layer, "dropless", x_TD)
    assert stats.load_E[2] == 0
    p_T1 = (x_TD @ layer.router.weight.t()).softmax(-1)[:, 2, None]
    remove_experts(layer, [2])
    after, _ = run(layer, "dropless", x_TD)
    sinkhorn_1 = router["router"] == "sinkhorn" and router.get("top_k") == 1  # weighed by sigmoid
    if router["router"] == "sigmoid" or sinkhorn_1 or (router.get("top_k", 2) > 1 and router.get("renormalize", True)):
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    else:
        torch.testing.assert_close(after, before / (1 - p_T1), rtol=1e-6, atol=1e-6)
        assert (after - before).abs().max() > 1e-6


def test_removing_a_chosen_expert_changes_its_tokens_alone() -> None:
    layer = layer_of()
    routing = layer.gate.routing(tokens(), context())
    had_T = (routing.experts_TK == 3).any(1)
    before = run(layer)[0]
    remove_experts(layer, [3])
    difference_T = (run(layer)[0] - before).abs().amax(-1)
    assert (difference_T[had_T] > 1e-3).all()
    assert (difference_T[~had_T] < 1e-6).all()


def test_whole_groups_come_and_go() -> None:
    layer = layer_of(num_groups=3, top_k_groups=2)
    add_experts(layer, 2)
    assert layer.config.num_groups == 4
    for wrong in (lambda: add_experts(layer, 1), lambda: remove_experts(layer, [0]), lambda: open_experts(layer, [7])):
        with pytest.raises(ValueError, match="whole groups"):
            wrong()
    remove_experts(layer, [0, 1])
    assert (layer.config.num_groups, layer.config.num_experts) == (3, 6)
    with pytest.raises(ValueError, match="top_k_groups=2"):
        remove_experts(layer, [0, 1])  # the last group is still closed


def test_specs_flags_and_training_go_on() -> None:
    layer = layer_of()
    layer.experts.w_up.requires_grad_(False)
    layer.eval()
    add_experts(layer, 2)
    fresh = layer_of(num_experts=E + 2)
    for (name, param, spec), (other, like, expected) in zip(
        logical_parameters(layer), logical_parameters(fresh), strict=True
    ):
        assert (name, param.shape, spec) == (other, like.shape, expected)
        assert isinstance(param, nn.Parameter)
    assert not layer.experts.w_up.requires_grad and layer.experts.w_out.requires_grad
    assert not layer.router.training
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.0)
    kept = layer.experts.w_out[E:].clone()
    first = float(run(layer)[0].detach().square().mean())
    for _ in range(5):
        optimizer.zero_grad()
        run(layer)[0].square().mean().backward()
        optimizer.step()
    assert float(run(layer)[0].detach().square().mean()) < first
    assert torch.equal(layer.experts.w_out[E:], kept)  # closed: no gradient


def test_the_balancing_bias_of_closed_experts_rests() -> None:
    layer, plain = layer_of(router="sigmoid"), layer_of(router="sigmoid")
    load_E = torch.tensor([3, 1, 4, 1, 5, 9])
    add_experts(layer, 2)
    resting = layer.router.bias_E[E:].clone()
    layer.router.balance(torch.cat([load_E, torch.zeros(2, dtype=torch.int64)]))
    plain.router.balance(load_E)
    assert torch.equal(layer.router.bias_E, torch.cat([plain.router.bias_E, resting]))


MISTAKES = {
    "unknown [7]": lambda layer: remove_experts(layer, [7]),
    "unknown [-1]": lambda layer: open_experts(layer, [-1]),
    "one twice": lambda layer: remove_experts(layer, [1, 1]),
    "leaves 1 open experts, but top_k=2": lambda layer: remove_experts(layer, [0, 1, 2, 3, 4]),
    "closing [0, 1, 2, 3, 4] leaves 1": lambda layer: close_experts(layer, [0, 1, 2, 3, 4]),
    "merging [1, 2, 3, 4, 5] leaves 1": lambda layer: merge_experts(layer, [list(range(6))]),
    "no expert named": lambda layer: remove_experts(layer, []),
    "n=0": lambda layer: add_experts(layer, 0),
    "unknown init 'copy'": lambda layer: add_experts(layer, 1, "copy"),
    "2 sources": lambda layer: add_experts(layer, 1, sources=[0, 1]),
    "give one of them": lambda layer: add_experts(layer, 1, sources=[0], load_E=torch.ones(6)),
    "load_E has shape (5,)": lambda layer: add_experts(layer, 1, load_E=torch.ones(5)),
    "use init=random": lambda layer: add_experts(layer, 1, d_ff=8),
    "6 numbers of 0 or more": lambda layer: merge_experts(layer, [[0, 1]], [1.0, -1.0, 1, 1, 1, 1]),
    "a group of [3]": lambda layer: merge_experts(layer, [[0, 1], [3]]),
    "are all 0": lambda layer: merge_experts(layer, [[0, 1]], [0, 0, 1, 1, 1, 1]),
    "open and closed": lambda layer: (close_experts(layer, [0]), merge_experts(layer, [[0, 1]])),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_refused_and_change_nothing(message: str) -> None:
    layer = layer_of()
    before = {name: value.clone() for name, value in layer.named_parameters()}
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("(", r"\(").replace(")", r"\)")):
        MISTAKES[message](layer)
    assert all(torch.equal(value, before[name]) for name, value in layer.named_parameters())
    assert layer.config.num_experts == E


def test_the_last_top_k_open_experts_stay() -> None:
    layer = layer_of()
    add_experts(layer, 3)
    with pytest.raises(ValueError, match="leaves 1 open"):
        remove_experts(layer, [0, 1, 2, 3, 4])  # 5 and the three closed ones are left
    remove_experts(layer, [0, 1, 2, 3])
    assert layer.router.open_ids().tolist() == [0, 1]


def test_experts_on_other_ranks_and_in_zero_are_refused() -> None:
    spread = moe_layer(tiny_model(num_experts=E, dispatch="all_to_all"), 0, mesh_without_processes(Layout(2, 2, 1), 0))
    with pytest.raises(ValueError, match=r"w_gate holds 1152 of 2304 numbers.*ep=2.*gather"):
        add_experts(spread, 1)
    layer = layer_of()
    layer.experts.w_up._hp_mapping = None  # what DeepSpeed's ZeRO 1 and 2 leave on parameters
    with pytest.raises(ValueError, match="ZeRO optimizer"):
        remove_experts(layer, [0])


def test_factors_of_a_models_layers_are_not_the_layers_to_refuse() -> None:
    layer = layer_of(every=1, capacity_factor=[0.5] * 9)
    assert add_experts(layer, 2) == [E, E + 1]
    assert layer.config.capacity_factor == [0.5] * 9


def test_experts_come_and_go_in_whole_pools() -> None:
    layer = layer_of(capacity_factor=0.75, capacity_pool=2)
    with pytest.raises(ValueError, match=f"num_experts={E + 1} is not divisible by capacity_pool=2"):
        add_experts(layer, 1)
    add_experts(layer, 2)
    assert layer.config.num_experts == E + 2
