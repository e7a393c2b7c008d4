"""Attention against a loop over heads, and the key/value head that each query head reads on every rank."""

from itertools import product

import pytest
import torch
from torch import Tensor

from moe_dist.attention.multi_query import CausalSelfAttention, KeyValueHeads
from moe_dist.attention.positions import Positions
from moe_dist.attention.rotary import rotary_table
from moe_dist.config.model import HeadSizes
from moe_dist.parallel.mesh import Group, single_process_mesh
from moe_dist.parallel.sharding import initialize, spec_of
from tests.unit.helpers import context, tiny_model

D = 16


def attention_of(num_heads: int, num_kv_heads: int, **changes: object) -> CausalSelfAttention:
    model = tiny_model(num_heads=num_heads, num_kv_heads=num_kv_heads, **changes)
    layer = CausalSelfAttention(model.head_sizes, model.attention, single_process_mesh(), out_std=0.25)
    initialize(layer, seed=0)
    return layer.double()


def attend(layer: CausalSelfAttention, x_BSD: Tensor) -> Tensor:
    shape = x_BSD.shape[:2]
    rotary = rotary_table(torch.arange(shape[1]).double(), layer.head_dim, 10000.0)
    return layer(x_BSD.flatten(0, 1), shape, Positions(rotary), context())[0].view_as(x_BSD)


def turned(x_SP: Tensor) -> Tensor:
    half = x_SP.shape[1] // 2
    angles = torch.arange(len(x_SP)).double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
    z = torch.complex(*x_SP.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((z.real, z.imag), -1)


def by_heads(layer: CausalSelfAttention, x_BSD: Tensor, num_heads: int, num_kv_heads: int) -> Tensor:
    """softmax(q k^T / sqrt(P)) v, one sequence, head and query at a time."""
    width = layer.head_dim
    y_BSD = torch.zeros_like(x_BSD)
    for b, head in product(range(len(x_BSD)), range(num_heads)):
        group = head * num_kv_heads // num_heads
        w_k, w_v = layer.key_value.weight[group * 2 * width : (group + 1) * 2 * width].chunk(2)
        mine = slice(head * width, (head + 1) * width)
        q_SP, k_SP, v_SP = x_BSD[b] @ layer.query.weight[mine].t(), x_BSD[b] @ w_k.t(), x_BSD[b] @ w_v.t()
        q_SP, k_SP = turned(q_SP), turned(k_SP)
        for s in range(x_BSD.shape[1]):
            weights = (k_SP[: s + 1] @ q_SP[s] / width**0.5).softmax(0)
            y_BSD[b, s] += (weights @ v_SP[: s + 1]) @ layer.out.weight[mine]
    return y_BSD


@pytest.mark.parametrize("backend", ["torch", "flash"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (4, 2), (4, 4), (1, 1)])
def test_against_a_loop_over_heads(heads: int, kv_heads: int, backend: str) -> None:
    layer, x_BSD = attention_of(heads, kv_heads, attention=backend), torch.randn(2, 7, D, dtype=torch.float64)
    torch.testing.assert_close(attend(layer, x_BSD), by_heads(layer, x_BSD, heads, kv_heads))


def test_scale_follows_the_width_of_a_head() -> None:
    """head_dim 6 is not d_model / num_heads = 4."""
    layer, x_BSD = attention_of(4, 2, head_dim=6), torch.randn(1, 5, D, dtype=torch.float64)
    assert layer.query.weight.shape == (24, D)
    torch.testing.assert_close(attend(layer, x_BSD), by_heads(layer, x_BSD, 4, 2))


@pytest.mark.parametrize("backend", ["torch", "flash"])
def test_backends_have_the_gradients_of_the_loop(backend: str) -> None:
    layer, x_BSD = attention_of(4, 2, attention=backend), torch.randn(2, 5, D, dtype=torch.float64)
    params, weight_BSD = list(layer.parameters()), torch.randn_like(x_BSD)
    found = torch.autograd.grad((attend(layer, x_BSD) * weight_BSD).sum(), params)
    expected = torch.autograd.grad((by_heads(layer, x_BSD, 4, 2) * weight_BSD).sum(), params)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["torch", "flash"])
@pytest.mark.parametrize("changed", [0, 3, 6])
def test_is_causal(backend: str, changed: int) -> None:
    layer, x_BSD = attention_of(4, 1, attention=backend), torch.randn(1, 7, D, dtype=torch.float64)
    other_BSD = x_BSD.clone()
    other_BSD[0, changed] += 1
    difference_S = (attend(layer, x_BSD) - attend(layer, other_BSD)).abs().amax(-1)[0]
    assert (difference_S[:changed] < 1e-14).all()
    assert (difference_S[changed:] > 1e-4).all()


SIZES = [
    (heads, kv_heads, tp)
    for heads in (1, 2, 4, 6, 8, 12)
    for kv_heads in range(1, heads + 1)
    for tp in range(1, heads + 1)
    if heads % kv_heads == heads % tp == 0
]


@pytest.mark.parametrize(("heads", "kv_heads", "tp"), SIZES)
def test_every_query_head_reads_its_own_key_value_head(heads: int, kv_heads: int, tp: int) -> None:
    """Query head h of the whole model reads key/value head h // (H / G), on whatever rank it is."""
    width, shape, x_TD = 2, (2, 3), torch.randn(6, D)
    whole = KeyValueHeads(HeadSizes(D, heads, kv_heads, width), Group())
    initialize(whole, seed=0)
    all_k_BSGP, all_v_BSGP = whole(x_TD, shape)
    assert all_k_BSGP.shape == (*shape, kv_heads, width)
    for rank in range(tp):
        part = KeyValueHeads(HeadSizes(D, heads, kv_heads, width), Group(tuple(range(tp)), rank))
        start = spec_of(part.weight).flat_start // D
        with torch.no_grad():
            part.weight.copy_(whole.weight[start : start + len(part.weight)])
        k_BSGP, v_BSGP = part(x_TD, shape)
        queries = heads // tp
        assert queries % k_BSGP.shape[2] == 0  # attention repeats each held head as often
        for local in range(queries):
            expected = (rank * queries + local) // (heads // kv_heads)
            read = local // (queries // k_BSGP.shape[2])
            torch.testing.assert_close(k_BSGP[:, :, read], all_k_BSGP[:, :, expected])
            torch.testing.assert_close(v_BSGP[:, :, read], all_v_BSGP[:, :, expected])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "rows", "computed"),
    [
        (4, 1, 4, 4, 1),  # multi-query: the one head, whole, on every rank
        (8, 4, 2, 8, 2),  # tp divides G: cut, two heads each
        (8, 2, 4, 8, 1),  # G < tp: whole, and each rank computes the head it reads
        (6, 2, 3, 8, 2),  # rank 1's two query heads straddle both heads
        (6, 3, 2, 12, 2),  # G is no multiple of tp: three queries on two heads
    ],
)
def test_what_a_middle_rank_holds_and_computes(heads: int, kv_heads: int, tp: int, rows: int, computed: int) -> None:
    """With P = 2 a key/value head has 4 rows, 2 of the key and 2 of the value."""
    part = KeyValueHeads(HeadSizes(D, heads, kv_heads, 2), Group(tuple(range(tp)), 1))
    assert part.weight.shape == (rows, D)
    assert part.rows.stop - part.rows.start == 4 * computed
