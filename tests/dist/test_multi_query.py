"""`MultiQueryAttention` cut over tensor parallelism against one process: outputs, gradients, caches, state dicts."""

from copy import deepcopy
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from moe_dist import MultiQueryAttention
from moe_dist.attention.kv_cache import KVCache
from moe_dist.parallel.collectives import all_reduce
from moe_dist.parallel.mesh import Group, create_mesh, single_process_mesh
from moe_dist.standalone.multi_query.parts import Part
from tests.dist.helpers import assert_same, raised, run_checks

B, S, D = 3, 8, 16
# tp above the key/value heads, below, and with heads that straddle them.
CASES: list[dict[str, Any]] = [
    dict(heads=4, rotary=True),
    dict(heads=4, qk_ln=True, alibi=True, attn_pdrop=0.3),
    dict(heads=8, num_kv_heads=2, qk_ln=True, norm_type="rmsnorm", sinks=True, clip_qkv=0.8),
    dict(heads=4, num_kv_heads=4, window=3, use_bias=False, attn_impl="flash"),
    dict(heads=12, head_dim=4, num_kv_heads=6, alibi=True, attn_pdrop=0.2),
    dict(heads=12, head_dim=4, num_kv_heads=3, rotary=True, sinks=True),
]


def layer_of(tp: Group | None, sequence_parallel: bool = False, **options: Any) -> MultiQueryAttention:
    settings = dict(attn_impl="torch", device="cpu", seed=3) | options
    return MultiQueryAttention(D, tp=tp, sequence_parallel=sequence_parallel, **settings).double()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair_of(tp: Group, sequence_parallel: bool, options: dict[str, Any]) -> tuple[MultiQueryAttention, ...]:
    """(whole, part) with the same random parameters, biases and norms included, through the state dict."""
    whole, part = layer_of(None, **options), layer_of(tp, sequence_parallel, **options)
    whole.cut_over = single_process_mesh()  # the same dropout on every rank
    assert_same(part.state_dict(), whole.state_dict())  # the same from the start
    state = {name: draw(*t.shape, seed=i) / 2 for i, (name, t) in enumerate(whole.state_dict().items())}
    whole.load_state_dict(state)
    part.load_state_dict(state)
    assert_same(part.state_dict(), state)
    return whole, part


def own(x: Tensor, tp: Group, cut: bool) -> Tensor:
    return x.chunk(tp.size, 1)[tp.rank] if cut else x


def assert_gradients(part: MultiQueryAttention, whole: MultiQueryAttention, tp: Group) -> None:
    """Every rank has the gradient of one process for what it holds."""
    width = part.head_dim * len(part.mine.queries)
    first = part.head_dim * part.mine.queries.start
    columns = Part.of(part.heads * part.head_dim, [(range(first, first + width),) * 2], dim=1)
    parts = {"Wqkv.weight": part.qkv, "Wqkv.bias": part.qkv, "out_proj.weight": columns}
    expected = dict(whole.named_parameters())
    for name, param in part.named_parameters():
        grad = expected[name].grad
        assert grad is not None and param.grad is not None, name
        grad = parts[name].take(grad) if name in parts else grad
        torch.testing.assert_close(param.grad, grad, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def check_layouts() -> None:
    for tp in (create_mesh(1, size).tp for size in (2, 4)):
        for options in CASES:
            for cut in (False, True)[tp.size == 2 :]:
                whole, part = pair_of(tp, cut, options)
                x, weight = draw(B, S, D), draw(B, S, D, seed=2)
                biases = [draw(1 if cut else options["heads"], S, S, seed=1).requires_grad_() for _ in range(2)]
                mask = torch.rand(B, S, generator=torch.Generator().manual_seed(4)) > 0.2
                one, mine = x.clone().requires_grad_(), own(x, tp, cut).clone().requires_grad_()
                expected = whole(one, bias=biases[0], attention_mask=mask)[0]
                y = part(mine, bias=biases[1], attention_mask=mask)[0]
                torch.testing.assert_close(y, own(expected, tp, cut), rtol=1e-9, atol=1e-11)
                (expected * weight).sum().backward()
                (y * own(weight, tp, cut)).sum().backward()
                assert one.grad is not None and biases[0].grad is not None
                torch.testing.assert_close(biases[1].grad, biases[0].grad, rtol=1e-9, atol=1e-11)
                torch.testing.assert_close(mine.grad, own(one.grad, tp, cut), rtol=1e-9, atol=1e-11)
                assert_gradients(part, whole, tp)


def check_what_is_held() -> None:
    """A rank holds its query rows and the key/value rows that these read, no others."""
    tp = create_mesh(1, 4).tp
    part = layer_of(tp, heads=4, num_kv_heads=1)
    assert part.Wqkv.weight.shape == (D // 4 + 2 * 4, D) and part.out_proj.weight.shape == (D, D // 4)
    part = layer_of(tp, heads=8, num_kv_heads=8)
    assert part.Wqkv.weight.shape == (3 * D // 4, D) and part.held_kv_heads == 2


def check_weights_and_caches() -> None:
    """Weights of all heads on every rank, with their gradient; caches of the rank's own heads, in chunks."""
    tp = create_mesh(1, 4).tp
    for options in (CASES[0], CASES[5], dict(heads=4, num_kv_heads=4, alibi=True)):
        whole, part = pair_of(tp, False, options)
        x, factor = draw(B, S, D), draw(B, options["heads"], S, S, seed=1)
        for layer in (whole, part):
            y, weights, _ = layer(x, needs_weights=True)
            (y.sum() + (weights * factor).sum()).backward()
        torch.testing.assert_close(weights, whole(x, needs_weights=True)[1])
        assert_gradients(part, whole, tp)
        expected = whole(x)[0]
        for past in ((), KVCache(B, S, part.held_kv_heads, part.head_dim, dtype=torch.float64)):
            found = []
            for chunk in x.split([3, 1, 4], 1):
                y, _, past = part(chunk, past)
                found.append(y)
            torch.testing.assert_close(torch.cat(found, 1), expected)


def check_packed() -> None:
    if find_spec("moe_dist.kernels.attention.varlen") is None:
        return
    tp, cu_seqlens = create_mesh(1, 4).tp, torch.tensor([0, 3, 3, 8, 24])
    for options in (CASES[0], CASES[1], CASES[5]):
        for cut in (False, True):
            whole, part = pair_of(tp, cut, options)
            x, weight = draw(24, D), draw(24, D, seed=1)
            expected = whole(x, cu_seqlens=cu_seqlens)[0]
            mine, factor = (t.chunk(4)[tp.rank] if cut else t for t in (x, weight))
            y = part(mine, cu_seqlens=cu_seqlens)[0]
            torch.testing.assert_close(y, expected.chunk(4)[tp.rank] if cut else expected)
            (expected * weight).sum().backward()
            (y * factor).sum().backward()
            assert_gradients(part, whole, tp)


def check_fp32_and_autocast() -> None:
    """Low-precision norms cut over ranks are those of one process."""
    tp = create_mesh(1, 4).tp
    for norm_type in ("low_precision_layernorm", "low_precision_rmsnorm"):
        whole, part = pair_of(tp, False, dict(heads=8, qk_ln=True, norm_type=norm_type))
        whole, part, x = whole.float(), part.float(), draw(B, S, D).float()
        torch.testing.assert_close(part(x)[0], whole(x)[0], rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = part(x)[0], whole(x)[0]
        assert y.dtype == torch.bfloat16
        assert (y - expected).abs().max() <= 2e-2 * expected.abs().max()


def check_training() -> None:
    """Four steps of Adam stay those of one process, and rows held by several ranks stay equal."""
    tp = create_mesh(1, 4).tp
    whole, part = pair_of(tp, False, CASES[2])
    optimizers = [torch.optim.Adam(layer.parameters(), 1e-2, eps=1e-4) for layer in (whole, part)]
    for step in range(4):
        for layer, optimizer in zip((whole, part), optimizers, strict=True):
            optimizer.zero_grad()
            layer(draw(B, S, D, seed=step))[0].square().sum().backward()
            optimizer.step()
    assert_same(part.state_dict(), whole.state_dict(), rtol=1e-7, atol=1e-9)
    assert_same(deepcopy(part).state_dict(), part.state_dict())
    shared = part.Wqkv.weight.detach()[part.head_dim * len(part.mine.queries) :]
    held = whole.Wqkv.weight.detach()[part.qkv.index_N[part.head_dim * len(part.mine.queries) :]]
    torch.testing.assert_close(shared, held, rtol=1e-7, atol=1e-9)


def check_mistakes() -> None:
    tp = create_mesh(1, 4).tp
    assert "give a seed" in raised(ValueError, lambda: layer_of(tp, heads=4, seed=None))
    assert f"heads=1 is not divisible by tp={tp.size}" in raised(ValueError, lambda: layer_of(tp, heads=1))
    part = layer_of(tp, heads=4)
    state = part.state_dict()
    message = raised(RuntimeError, part.load_state_dict, state | {"Wqkv.weight": state["Wqkv.weight"][:5]})
    assert "size mismatch for Wqkv.weight: [5, 16], but the logical tensor is [24, 16]" in message
    message = raised(RuntimeError, part.load_state_dict, {k: v for k, v in state.items() if k != "Wqkv.bias"})
    assert "Wqkv.bias" in message
    assert all_reduce(torch.ones(1), tp) == tp.size  # all of them are still here


def test_on_four_ranks() -> None:
    run_checks(
        4,
        [
            check_layouts,
            check_what_is_held,
            check_weights_and_caches,
            check_packed,
            check_fp32_and_autocast,
            check_training,
            check_mistakes,
        ],
    )
