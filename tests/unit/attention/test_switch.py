"""The switch attention layer against plain maths, token after token, in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_dist.attention.kv_cache import KVCache
from moe_dist.attention.positions import Positions
from moe_dist.attention.rotary import rotary_table
from moe_dist.attention.switch import SwitchAttention
from moe_dist.config.model import AttentionConfig, ModelConfig, MoEConfig
from moe_dist.models.backends import resolve_backends
from moe_dist.models.block import BlockReplay, moe_layer
from moe_dist.models.flops import train_flops_per_token
from moe_dist.models.parameters import parameter_counts
from moe_dist.moe.losses import MoEStats
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.parallel.sharding import initialize
from moe_dist.step import RealTokens, Site, StepContext
from tests.unit.helpers import context, gradients

B, S, D, H, P, E = 3, 7, 10, 2, 4, 4
CLOSE = dict(rtol=1e-9, atol=1e-11)


def model_of(attention: dict[str, Any] | None = None, heads: int = H, groups: int = 1, **moe: Any) -> ModelConfig:
    settings = MoEConfig(**(dict(num_experts=E, top_k=2, capacity_factor=None) | moe))
    section = AttentionConfig(kind="switch", moe=settings, **(attention or {}))
    sizes = dict(d_model=D, num_heads=heads, num_kv_heads=groups, head_dim=P, d_ff=12)
    return resolve_backends(ModelConfig(**sizes, attention=section, moe=MoEConfig(num_experts=0)), ep=1)


def switch_attention(model: ModelConfig, layer: int = 0) -> SwitchAttention:
    return SwitchAttention(model.head_sizes, model.attention, single_process_mesh(), layer, model.kernels)


def layer_of(attention: dict[str, Any] | None = None, **moe: Any) -> SwitchAttention:
    layer = switch_attention(model_of(attention, **moe))
    initialize(layer, seed=0)
    return layer.double()


def drawn(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positions(first: int = 0, last: int = S, **changes: Any) -> Positions:
    rotary = rotary_table(torch.arange(first, last, dtype=torch.float64), P, 100.0)
    return Positions(**(dict(rotary=rotary) | changes))


def run(
    layer: SwitchAttention, x_BSD: Tensor, step: StepContext | None = None, **changes: Any
) -> tuple[Tensor, MoEStats]:
    where = changes.pop("where", positions(0, x_BSD.shape[1]))
    y_TD, stats = layer(x_BSD.flatten(0, 1), x_BSD.shape[:2], where, step or context(), **changes)
    return y_TD.view(x_BSD.shape), stats


def turned(x_SP: Tensor) -> Tensor:
    """Rotary embedding as a product of complex numbers."""
    half = x_SP.shape[-1] // 2
    angles = torch.arange(len(x_SP))[:, None].double() * 100.0 ** (-torch.arange(half).double() / half)
    z = torch.complex(x_SP[:, :half], x_SP[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((z.real, z.imag), dim=1)


def plain(
    layer: SwitchAttention, x_BSD: Tensor, capacity: int | None = None, window: int = S, clip: float = 1e9
) -> Tensor:
    """The definition: for every token and every chosen expert that has room, each head on its own."""
    kv_GxPD = layer.key_value.view(-1, 2, P, D)
    heads, taken, out = layer.experts.w_query.shape[1] // P, [0] * E, []
    read = [h * len(kv_GxPD) // heads for h in range(heads)]  # by each head of an expert
    for x_SD in x_BSD:
        keys = [turned((x_SD @ key.T).clamp(-clip, clip)) for key in kv_GxPD[:, 0]]
        values = [(x_SD @ value.T).clamp(-clip, clip) for value in kv_GxPD[:, 1]]
        queries = [(x_SD @ w.T).clamp(-clip, clip).unflatten(1, (heads, P)) for w in layer.experts.w_query]
        queries = [torch.stack([turned(q_SHP[:, h]) for h in range(heads)], dim=1) for q_SHP in queries]
        for t, x_D in enumerate(x_SD):
            p_E = (layer.router.weight @ x_D).softmax(-1)
            chosen = p_E.topk(layer.config.moe.top_k)
            weights = chosen.values / chosen.values.sum() if len(chosen.values) > 1 else chosen.values
            y_D = torch.zeros_like(x_D)
            for weight, i in zip(weights, chosen.indices.tolist(), strict=True):
                taken[i] += 1
                if capacity is not None and taken[i] > capacity:
                    continue
                seen = slice(max(0, t - window + 1), t + 1)
                of_heads = zip(queries[i][t], read, strict=True)
                probs = [(keys[group][seen] @ q_P / P**0.5).softmax(0) for q_P, group in of_heads]
                found = [prob @ values[group][seen] for prob, group in zip(probs, read, strict=True)]
                y_D = y_D + weight * (torch.cat(found) @ layer.experts.w_out[i])
            out.append(y_D)
    return torch.stack(out).view(x_BSD.shape)


@pytest.mark.parametrize(
    ("moe", "attention", "limits"),
    [
        (dict(num_experts=1, top_k=1), dict(backend="flash"), {}),  # multi-query attention
        (dict(top_k=1, experts="loop"), dict(backend="torch"), {}),
        (dict(top_k=2, experts="bmm"), dict(backend="flash"), {}),
        (dict(top_k=2, capacity_factor=0.6), dict(backend="flash"), dict(capacity=7)),
        (dict(top_k=3, capacity_factor=0.3), dict(backend="torch", window=3), dict(capacity=5, window=3)),
        (dict(top_k=4), dict(backend="packed", clip_qkv=0.7), dict(clip=0.7)),
        (dict(top_k=2, groups=2), dict(backend="torch"), {}),  # JetMoE: as many of both
        (dict(top_k=3, heads=4, groups=2, capacity_factor=0.6), dict(backend="flash"), dict(capacity=10)),
        (dict(top_k=2, heads=4, groups=2), dict(backend="packed", clip_qkv=0.7), dict(clip=0.7)),
    ],
)
def test_the_formula(moe: dict[str, Any], attention: dict[str, Any], limits: dict[str, Any]) -> None:
    """Outputs and all gradients, with what is dropped."""
    layer, x_BSD, other_BSD = layer_of(attention, **moe), drawn(B, S, D), drawn(B, S, D)
    (y_BSD, stats), expected_BSD = (
        run(layer, x_BSD.requires_grad_()),
        plain(layer, other_BSD.requires_grad_(), **limits),
    )
    torch.testing.assert_close(y_BSD, expected_BSD, **CLOSE)
    assert stats.load_E.sum() == B * S * layer.config.moe.top_k
    assert (stats.kept_E.sum() < stats.load_E.sum()) == ("capacity" in limits)
    params, grad = list(layer.parameters()), drawn(B, S, D, seed=3)
    found = torch.autograd.grad((y_BSD * grad).sum(), [x_BSD, *params])
    theirs = torch.autograd.grad((expected_BSD * grad).sum(), [other_BSD, *params])
    for actual, expected in zip(found, theirs, strict=True):
        torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("groups", [1, 2])
def test_alibi_and_no_positions(groups: int) -> None:
    """K * H heads, of which each expert's H have the slopes of the model."""
    layer, x_BSD = layer_of(top_k=2, groups=groups), drawn(1, S, D)
    slopes_H = torch.tensor([0.5, 0.1], dtype=torch.float64)
    y_BSD, _ = run(layer, x_BSD, where=positions(rotary=None, slopes_H=slopes_H))
    without_BSD, _ = run(layer, x_BSD, where=positions(rotary=None))
    x_SD, kv_HxPD = x_BSD[0], layer.key_value.view(groups, 2, P, D).repeat_interleave(H // groups, 0)
    k_HSP, v_HSP = (x_SD @ kv_HxPD[:, at].mT for at in range(2))
    chosen = (x_SD[-1] @ layer.router.weight.T).softmax(-1).topk(2)
    for found_D, slopes in ((y_BSD[0, -1], slopes_H), (without_BSD[0, -1], slopes_H * 0)):
        expected_D = torch.zeros(D, dtype=torch.float64)
        for weight, i in zip(chosen.values / chosen.values.sum(), chosen.indices, strict=True):
            q_HP = (layer.experts.w_query[i] @ x_SD[-1]).view(H, P)
            scores_HS = (k_HSP @ q_HP[..., None])[..., 0] / P**0.5 - slopes[:, None] * torch.arange(S - 1, -1, -1)
            y_HP = (scores_HS.softmax(-1)[:, None] @ v_HSP)[:, 0]
            expected_D += weight * y_HP.flatten() @ layer.experts.w_out[i]
        torch.testing.assert_close(found_D, expected_D, **CLOSE)


def test_causal_for_fifty_seeds() -> None:
    """Whatever comes later, dropless: prefix and full forward agree, and no gradient comes from the future."""
    layer = layer_of(capacity_factor=0.5)
    for seed in range(50):
        x_BSD = drawn(2, S, D, seed=seed).requires_grad_()
        cut = 1 + seed % (S - 1)
        y_BSD, _ = run(layer, x_BSD, context(phase="eval"))
        prefix_BSD, _ = run(layer, x_BSD[:, :cut].detach(), context(phase="eval"))
        torch.testing.assert_close(y_BSD[:, :cut], prefix_BSD, rtol=1e-12, atol=1e-13)
        (grad_BSD,) = torch.autograd.grad(y_BSD[:, :cut].square().sum(), x_BSD)
        assert grad_BSD[:, cut:].abs().max() == 0 and grad_BSD[:, 0].abs().min() > 0


def test_rows_of_a_batch_do_not_see_each_other() -> None:
    """To the bit: other rows may change, and be others."""
    layer, x_BSD = layer_of(), drawn(B, S, D)
    y_BSD, _ = run(layer, x_BSD, context(phase="eval"))
    changed_BSD = torch.cat((x_BSD[:1], drawn(B - 1, S, D, seed=9)))
    other_BSD, _ = run(layer, changed_BSD, context(phase="eval"))
    assert torch.equal(y_BSD[0], other_BSD[0]) and not torch.equal(y_BSD[1], other_BSD[1])


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_balancing_loss_is_real(top_k: int) -> None:
    """Balanced 1, collapse E (E / top_k where the others share it); its gradient reaches the router and the input."""
    layer, eye = layer_of(top_k=1, balance_loss_coef=0.5, z_loss_coef=0.0), torch.eye(D, dtype=torch.float64)
    with torch.no_grad():
        layer.router.weight.copy_(100 * eye[:E])
    balanced, _ = run(layer, eye[:E].repeat(1, 2, 1)), None
    assert float(balanced[1].balance_loss) == pytest.approx(1.0)
    collapsed = run(layer, eye[:1].repeat(1, 8, 1))[1]
    assert float(collapsed.balance_loss) == pytest.approx(E)
    assert float(collapsed.aux_loss.detach()) == pytest.approx(0.5 * E)
    assert balanced[1].site == Site(0, "attention")

    layer = layer_of(top_k=top_k, capacity_factor=0.5)
    for phase in ("train", "eval"):
        x_BSD = drawn(B, S, D).requires_grad_()
        _, stats = run(layer, x_BSD, context(phase=phase))
        grads = torch.autograd.grad(stats.aux_loss, [layer.router.weight, x_BSD])
        assert all(grad.abs().max() > 1e-6 for grad in grads)


def test_the_balancing_loss_balances() -> None:
    """All tokens share a direction, which the first expert's router row likes."""
    layer, x_BSD = layer_of(top_k=1, balance_loss_coef=1.0), drawn(8, 16, D)
    x_BSD[..., 0] = 1
    with torch.no_grad():
        layer.router.weight[0, 0] += 2
    optimizer, losses = torch.optim.SGD(layer.router.parameters(), lr=1.0), []
    for _ in range(60):
        _, stats = run(layer, x_BSD)
        losses.append(float(stats.balance_loss))
        optimizer.zero_grad()
        stats.aux_loss.backward()
        optimizer.step()
    assert losses[0] > 1.5 and losses[-1] < 1.1


def test_dropped_everywhere_is_zero() -> None:
    """All tokens want the same two experts, which take one each: the first token."""
    layer = layer_of(top_k=2, capacity_factor=0.01)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:2] = 1
    x_BSD = (drawn(B, S, D).abs() + 0.1).requires_grad_()
    y_BSD, stats = run(layer, x_BSD)
    assert stats.kept_E.tolist() == [1, 1, 0, 0] and float(stats.unserved) == pytest.approx(1 - 1 / (B * S))
    assert y_BSD[0, 0].abs().min() > 0
    assert y_BSD.view(-1, D)[1:].abs().max() == 0
    y_BSD.square().sum().backward()
    grads = gradients(layer)
    assert grads["experts.w_query"][2:].abs().max() == 0 == grads["experts.w_out"][2:].abs().max()


def test_no_tokens() -> None:
    layer, x_BSD = layer_of(), torch.zeros(0, S, D, dtype=torch.float64, requires_grad=True)
    y_BSD, stats = run(layer, x_BSD)
    assert y_BSD.shape == (0, S, D)
    (y_BSD.sum() + stats.aux_loss).backward()
    assert all(grad.abs().max() == 0 for grad in gradients(layer).values())


@pytest.mark.parametrize(("chunks", "groups"), [([1] * S, 1), ([4, 1, 2], 1), ([S], 1), ([4, 1, 2], 2)])
def test_decoding_with_a_cache(chunks: list[int], groups: int) -> None:
    """Token by token and in chunks, also after a reset."""
    layer, x_BSD = layer_of(dict(window=4), groups=groups), drawn(B, S, D)
    expected_BSD, _ = run(layer, x_BSD, context(phase="dropless"))
    cache = layer.new_cache(B, S)
    assert cache.k_BGLP.shape == (B, groups, S, P) and cache.k_BGLP.dtype == torch.float64
    for _ in range(2):
        cache.reset()
        parts, first = [], 0
        with torch.no_grad():
            for size in chunks:
                where, part_BSD = positions(first, first + size), x_BSD[:, first : first + size]
                parts.append(run(layer, part_BSD, context(phase="dropless"), cache=cache, where=where)[0])
                first += size
        torch.testing.assert_close(torch.cat(parts, dim=1), expected_BSD, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="above max_seq_len=7"):
        run(layer, x_BSD[:, :1], cache=cache, where=positions(S, S + 1))


def test_decoding_rows_of_unequal_length() -> None:
    layer, x_BSD, lengths = layer_of(), drawn(2, S, D), [4, 2]
    expected_BSD, _ = run(layer, x_BSD, context(phase="dropless"))
    cache = KVCache(2, S, 1, P, dtype=torch.float64)
    with torch.no_grad():
        run(layer, x_BSD[:, :4], context(phase="dropless"), cache=cache, where=positions(0, 4))
        cache.truncate(lengths)
        next_B1D = torch.stack([x_BSD[row, length : length + 1] for row, length in enumerate(lengths)])
        cos_BSp, sin_BSp = (torch.stack([t[n : n + 1] for n in lengths]) for t in positions().rotary)
        where = positions(rotary=(cos_BSp, sin_BSp))
        y_B1D, _ = run(layer, next_B1D, context(phase="dropless"), cache=cache, where=where)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(y_B1D[row, 0], expected_BSD[row, length], rtol=1e-10, atol=1e-12)


def test_dropout_is_of_the_step_and_in_training_alone() -> None:
    layer, x_BSD = layer_of(dict(dropout=0.5, backend="torch")), drawn(B, S, D)
    (first, _), (again, _) = run(layer, x_BSD), run(layer, x_BSD)
    assert torch.equal(first, again) and not torch.equal(first, run(layer, x_BSD, context(1))[0])
    torch.testing.assert_close(run(layer, x_BSD, context(phase="eval"))[0], plain(layer, x_BSD), **CLOSE)


@pytest.mark.parametrize("overflow", ["drop", "reroute"])
def test_a_recomputed_block_repeats_its_decisions(overflow: str) -> None:
    """A router that changes its mind in between is not asked again; the feed-forward's decisions are others."""
    layer = layer_of(capacity_factor=0.5, overflow=overflow)
    model = replace(model_of(), moe=MoEConfig(num_experts=E, top_k=1, experts="loop", dispatch="local"))
    moe = moe_layer(model, 0, single_process_mesh())
    initialize(moe, seed=1)
    moe.double()
    x_BSD, replay, kept = drawn(B, S, D).requires_grad_(), BlockReplay(), []

    def block(x_BSD: Tensor) -> Tensor:
        y_BSD, _ = run(layer, x_BSD, replay=replay.attention)
        kept.append((replay.attention.chosen_TK.clone(), replay.attention.plan.kept_TK.clone()))
        return moe(y_BSD.flatten(0, 1), context(), replay.feed_forward)[0]

    y_TD = checkpoint(block, x_BSD, use_reentrant=False, preserve_rng_state=False)
    with torch.no_grad():
        layer.router.weight.add_(drawn(E, D, seed=5))
    y_TD.sum().backward()
    assert len(kept) == 2 and all(torch.equal(a, b) for a, b in zip(*kept, strict=True))
    assert replay.feed_forward.chosen_TK.shape == (B * S, 1) and replay.attention.chosen_TK.shape == (B * S, 2)


def test_routers_of_one_block_draw_different_numbers() -> None:
    """The attention's jitter is not the feed-forward's."""
    model = model_of(jitter=0.5)
    attention = switch_attention(model, 3)
    moe = moe_layer(replace(model, moe=model.attention.moe), 3, single_process_mesh())
    initialize(attention.router, seed=0)
    initialize(moe.router, seed=0)
    x_TD = drawn(B * S, D)
    ours, theirs = (layer.gate.routing(x_TD, context()).logits_TE for layer in (attention, moe))
    assert not torch.allclose(ours, theirs)
    assert attention.layer == 3


@pytest.mark.parametrize("router", ["sigmoid", "noisy", "sinkhorn", "hash"])
def test_with_any_router(router: str) -> None:
    layer, x_BSD = layer_of(router=router, capacity_factor=0.75), drawn(B, S, D).requires_grad_()
    step = replace(context(), token_ids_T=torch.arange(B * S) % 11)
    y_BSD, stats = run(layer, x_BSD, step)
    (y_BSD.square().sum() + stats.aux_loss).backward()
    assert stats.kept_E.sum() < B * S * 2
    assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in gradients(layer).values())


def test_autocast() -> None:
    layer, x_BSD = layer_of().float(), drawn(B, S, D).float()
    expected_BSD, _ = run(layer, x_BSD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_BSD, stats = run(layer, x_BSD)
    assert y_BSD.dtype == torch.bfloat16 and stats.aux_loss.dtype == torch.float32
    torch.testing.assert_close(y_BSD.float(), expected_BSD, rtol=0.1, atol=0.05)
    (y_BSD.float().sum() + stats.aux_loss).backward()
    gradients(layer)


@pytest.mark.parametrize("groups", [1, 2])
def test_counting_parameters_and_flops(groups: int) -> None:
    """Against the layers themselves."""
    model = model_of(top_k=3, groups=groups)
    dense = replace(model, attention=AttentionConfig())
    ours = sum(p.numel() for p in switch_attention(model).parameters())
    theirs = 2 * D * P * (H + groups)
    counts, without = parameter_counts(model), parameter_counts(dense)
    assert counts.total - without.total == model.num_layers * (ours - theirs)
    expert = 2 * D * H * P
    assert (counts.expert, counts.total - counts.active) == (4 * E * expert, 4 * (E - 3) * expert)
    more = 4 * (2 * (2 * expert + E * D) + 2 * 2 * 2 * H * P * 4)  # two more experts a token, a router, their heads
    assert train_flops_per_token(model, S) - train_flops_per_token(dense, S) == 3 * more


@pytest.mark.parametrize("changes", [{}, dict(drop_order="choice"), dict(overflow="reroute"), dict(router="sigmoid")])
def test_a_step_of_padding_alone_is_a_step(changes: dict[str, Any]) -> None:
    layer, x_BSD = layer_of(capacity_factor=0.5, **changes), drawn(B, S, D).requires_grad_()
    real = RealTokens(torch.zeros(B * S, dtype=torch.bool), 0)
    y_BSD, stats = run(layer, x_BSD, replace(context(), real=real))
    (y_BSD.sum() + stats.aux_loss).backward()
    assert (y_BSD == 0).all() and float(stats.aux_loss.detach()) == 0.0 and not stats.load_E.any()
    assert all(grad.isfinite().all() for grad in [x_BSD.grad, *gradients(layer).values()])


def test_attention_experts_serve_in_either_order() -> None:
    """Assignments ask one after another, token after token or choice after choice."""
    kept, x_TD = {}, drawn(B * S, D)
    for order in ("token", "choice"):
        plan = layer_of(top_k=2, capacity_factor=0.5, drop_order=order).gate(x_TD, context()).plan
        queue = [(t, k) for t in range(B * S) for k in range(2)]
        taken, kept[order] = [0] * E, torch.zeros(B * S, 2, dtype=torch.bool)
        for t, k in sorted(queue, key=lambda at: at[1]) if order == "choice" else queue:
            expert = int(plan.experts_TK[t, k])
            kept[order][t, k] = taken[expert] < plan.capacity
            taken[expert] += 1
        assert torch.equal(plan.kept_TK, kept[order])
    assert kept["choice"][:, 0].sum() > kept["token"][:, 0].sum()
