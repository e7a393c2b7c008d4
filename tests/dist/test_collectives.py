"""Collectives, sharded layers and the vocabulary-parallel loss against what they mean in a single process."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.attention.multi_query import CausalSelfAttention
from moe_dist.attention.positions import Positions
from moe_dist.attention.rotary import rotary_table
from moe_dist.config.model import AttentionConfig, HeadSizes
from moe_dist.parallel import collectives as c
from moe_dist.parallel.feed_forward import FeedForward
from moe_dist.parallel.linear import PositionEmbedding, VocabParallelEmbedding, enter, leave
from moe_dist.parallel.loss import linear_cross_entropy, token_losses
from moe_dist.parallel.mesh import Group, Mesh, create_mesh, single_process_mesh
from moe_dist.parallel.norm import LayerNorm, RMSNorm
from moe_dist.parallel.sharding import initialize, logical_parameters, spec_of
from moe_dist.step import StepContext
from tests.dist.helpers import KEY, raised, run_checks

T, D = 8, 6


@dataclass(frozen=True)
class Pair:
    """single(inputs of all ranks) -> outputs of all ranks. `shared_input`: one tensor, the same on all ranks.

    `shared_output`: what follows is replicated, so its gradient is the same on all ranks and counts once.
    """

    collective: Callable[[Tensor, Group], Tensor]
    single: Callable[[list[Tensor]], list[Tensor]]
    shared_input: bool = False
    shared_output: bool = False


PAIRS = [
    Pair(c.copy_to_group, lambda xs: xs, shared_input=True),
    Pair(c.reduce_from_group, lambda xs: [sum(xs)] * len(xs), shared_output=True),
    Pair(c.split_to_group, lambda xs: list(xs[0].chunk(len(xs))), shared_input=True),
    Pair(c.gather_from_group, lambda xs: [torch.cat(xs)] * len(xs), shared_output=True),
    Pair(c.gather_sequence, lambda xs: [torch.cat(xs)] * len(xs)),
    Pair(c.scatter_sequence, lambda xs: list(sum(xs).chunk(len(xs)))),
]


def groups() -> Iterator[Group]:
    """The whole world, and neighbours two by two where that is something else."""
    yield create_mesh(1, dist.get_world_size()).tp
    if dist.get_world_size() > 2:
        yield create_mesh(1, 2).tp


def draw(seed: int, *shape: int) -> Tensor:
    """The same on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_pairs() -> None:
    for group in groups():
        for pair in PAIRS:
            for transposed in (False, True):
                compare_pair(pair, group, transposed)


def compare_pair(pair: Pair, group: Group, transposed: bool) -> None:
    """Values and gradients; `transposed` makes both the input and the output's gradient non-contiguous."""
    size = group.size
    if pair.shared_input:
        leaves = [draw(0, T, D).requires_grad_()] * size
    else:
        leaves = [draw(rank, T, D).requires_grad_() for rank in range(size)]
    outputs = pair.single(leaves)
    weights = [draw(100 if pair.shared_output else 100 + rank, *y.shape) for rank, y in enumerate(outputs)]
    counted = 1 if pair.shared_output else size
    sum((y * w).sum() for y, w in zip(outputs[:counted], weights[:counted], strict=True)).backward()

    own = leaves[group.rank].detach().clone()
    if transposed:
        own = own.t().contiguous().t()
    x = own.requires_grad_()
    y = pair.collective(x, group)
    weight = weights[group.rank]
    y.backward(weight.t().contiguous().t() if transposed else weight)
    torch.testing.assert_close(y.detach(), outputs[group.rank].detach())
    torch.testing.assert_close(x.grad, leaves[group.rank].grad)


def check_expanded_gradient() -> None:
    """The gradient of a sum has stride 0."""
    for group in groups():
        for pair in PAIRS:
            x = draw(1, T, D).requires_grad_()
            pair.collective(x, group).sum().backward()
            assert torch.isfinite(x.grad).all()


def exchange_counts(size: int) -> Iterator[list[list[int]]]:
    """counts[sender][receiver]."""
    yield [[2] * size for _ in range(size)]
    yield [[(3 * s + 5 * r) % 4 for r in range(size)] for s in range(size)]  # uneven, with zeros
    yield [[r + 1 if s else 0 for r in range(size)] for s in range(size)]  # rank 0 sends nothing
    yield [[s + 1 if r == 0 else 0 for r in range(size)] for s in range(size)]  # all to rank 0
    yield [[0] * size for _ in range(size)]  # nobody has anything


def check_exchange() -> None:
    for group in groups():
        for counts in exchange_counts(group.size):
            for transposed in (False, True):
                compare_exchange(counts, group, transposed)


def compare_exchange(counts: list[list[int]], group: Group, transposed: bool) -> None:
    me, everybody = group.rank, range(group.size)
    rows = [draw(rank, sum(counts[rank]), D) for rank in everybody]
    cut = [x.split(row) for x, row in zip(rows, counts, strict=True)]
    expected = torch.cat([cut[sender][me] for sender in everybody])
    own = rows[me].t().contiguous().t() if transposed else rows[me]
    send, receive = counts[me], [row[me] for row in counts]
    assert torch.equal(c.exchange_rows(own, send, receive, group), expected)
    assert torch.equal(c.exchange_rows(expected, receive, send, group), rows[me])
    # Two under way at once, one of them into a given buffer.
    first, buffer = c.start_exchange(own, send, receive, group), torch.empty_like(expected)
    second = c.start_exchange(own * 2, send, receive, group, buffer)
    assert torch.equal(first.wait(), expected)
    assert second.wait() is buffer and torch.equal(buffer, expected * 2)


def check_slices_that_do_not_fit_are_refused() -> None:
    for group in groups():
        assert f"cut into {group.size} equal slices" in raised(ValueError, c.split_to_group, draw(0, 7, D), group)


def check_a_group_of_one_is_the_identity() -> None:
    x, alone = draw(0, T, D), Group()
    for pair in PAIRS:
        assert pair.collective(x, alone) is x
    assert c.exchange_rows(x, [T], [T], alone) is x


def check_loss() -> None:
    """Against torch, with more tokens than one chunk holds, and targets at the edges of every slice."""
    vocab, tokens = 48, 70
    for group in groups():
        local = vocab // group.size
        x_TD, weight_VD = draw(0, tokens, D).requires_grad_(), draw(1, vocab, D).requires_grad_()
        edges = torch.arange(group.size) * local
        targets_T = torch.cat((edges, edges + local - 1, torch.arange(tokens - 2 * group.size) * 5 % vocab))
        expected = F.cross_entropy(x_TD @ weight_VD.t(), targets_T)
        (3.0 * expected).backward()

        own_TD = x_TD.detach().clone().requires_grad_()
        own_VD = weight_VD.detach().chunk(group.size)[group.rank].clone().requires_grad_()
        with mock.patch("moe_dist.parallel.loss._CHUNK_LOGITS", 1):  # 16 tokens a chunk
            loss = linear_cross_entropy(own_TD, own_VD, targets_T, group)
            (3.0 * loss).backward()
            each_T = token_losses(own_TD, own_VD, targets_T, group)
        torch.testing.assert_close(loss.detach(), expected.detach())
        torch.testing.assert_close(c.all_reduce(own_TD.grad, group), x_TD.grad)
        torch.testing.assert_close(own_VD.grad, weight_VD.grad.chunk(group.size)[group.rank])
        torch.testing.assert_close(each_T, F.cross_entropy(x_TD @ weight_VD.t(), targets_T, reduction="none").detach())


def check_loss_against_megatron() -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    vocab, tokens = 64, 40
    for group in groups():
        parallel_state._TENSOR_MODEL_PARALLEL_GROUP = group.process_group
        x_TD, weight_VD = draw(0, tokens, D).float(), draw(1, vocab, D).float()
        targets_T = torch.arange(tokens) * 11 % vocab
        shard_VD = weight_VD.chunk(group.size)[group.rank].clone()
        theirs_TD, theirs_VD = x_TD.clone().requires_grad_(), shard_VD.clone().requires_grad_()
        theirs = vocab_parallel_cross_entropy((theirs_TD @ theirs_VD.t())[:, None], targets_T[:, None]).mean()
        theirs.backward()
        ours_TD, ours_VD = x_TD.clone().requires_grad_(), shard_VD.clone().requires_grad_()
        ours = linear_cross_entropy(ours_TD, ours_VD, targets_T, group)
        ours.backward()
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(ours_TD.grad, theirs_TD.grad)
        torch.testing.assert_close(ours_VD.grad, theirs_VD.grad)


def check_layers() -> None:
    """Whole tensor-parallel regions, with and without sequence parallelism."""
    for group in groups():
        for sequence_parallel in (False, True):
            plain = (feed_forward, multi_query, grouped_query, multi_head, norm, embedding)
            plain = (*plain, layer_norm, biased_feed_forward, positions)
            for build in (*plain, *attention_options()):
                compare_layer(build, mesh_of(group, sequence_parallel))


Layer = tuple[nn.Module, Callable[[Tensor], Tensor]]


def mesh_of(tp: Group, sequence_parallel: bool) -> Mesh:
    return replace(single_process_mesh(), tp=tp, sequence_parallel=sequence_parallel)


def feed_forward(mesh: Mesh) -> Layer:
    layer = FeedForward(D, 16, "swiglu", mesh, 0.3)
    return layer, layer


def attention(kv_heads: int, mesh: Mesh, heads: int = 4, **options: Any) -> Layer:
    config = AttentionConfig(backend="torch", **options)
    layer = CausalSelfAttention(HeadSizes(D, heads, kv_heads, 4), config, mesh, out_std=0.3)
    rotary = rotary_table(torch.arange(T // 2).double(), 4, 10000.0)
    return layer, lambda x_TD: layer(x_TD, (2, T // 2), Positions(rotary), StepContext(KEY))[0]


def multi_query(mesh: Mesh) -> Layer:
    return attention(1, mesh)


def grouped_query(mesh: Mesh) -> Layer:
    return attention(2, mesh)


def multi_head(mesh: Mesh) -> Layer:
    return attention(4, mesh)


def attention_options() -> Iterator[Callable[[Mesh], Layer]]:
    """Key/value heads that are cut, that all ranks hold, and (12 on 3) that a rank's query heads read in part."""
    for heads, kv_heads in ((4, 1), (4, 2), (4, 4), (12, 3)):
        for options in (dict(qk_norm="head"), dict(qk_norm="width", clip_qkv=1.0), dict(qkv_bias=True, out_bias=True)):
            yield partial(attention, kv_heads, heads=heads, **options)


def norm(mesh: Mesh) -> Layer:
    layer = RMSNorm(D, 1e-5, mesh)
    return layer, layer


def embedding(mesh: Mesh) -> Layer:
    """Added to the input, so that it has the signature of the others."""
    layer = VocabParallelEmbedding(16, D, mesh.tp, 1.0)
    ids_T = torch.arange(T) * 5 % 16
    return layer, lambda x_TD: x_TD + leave(layer(ids_T), mesh)


def layer_norm(mesh: Mesh) -> Layer:
    layer = LayerNorm(D, 1e-5, mesh)
    return layer, layer


def biased_feed_forward(mesh: Mesh) -> Layer:
    layer = FeedForward(D, 16, "swiglu", mesh, 0.3, bias=True)
    return layer, layer


def positions(mesh: Mesh) -> Layer:
    """Added to the input, some of them twice."""
    layer, places_T = PositionEmbedding(7, D, mesh, 1.0), torch.arange(T) * 5 % 6
    own_T = c.own_slice(places_T, mesh.tp) if mesh.sequence_parallel else places_T
    return layer, lambda x_TD: x_TD + layer(own_T)


@torch.no_grad()
def fill(layer: nn.Module) -> None:
    """Initial values, and scales and biases that differ from head to head."""
    initialize(layer.double(), seed=3)
    for number, (_, param, spec) in enumerate(logical_parameters(layer)):
        if param.dim() == 1:
            param += draw(100 + number, *spec.logical_shape)[spec.flat_start :][: len(param)] / 4


def compare_layer(build: Callable[[Mesh], Layer], mesh: Mesh) -> None:
    whole, call_whole = build(single_process_mesh())
    fill(whole)
    x_TD, weight_TD = draw(0, T, D).requires_grad_(), draw(1, T, D)
    expected_TD = call_whole(x_TD)
    (expected_TD * weight_TD).sum().backward()

    part, call_part = build(mesh)
    fill(part)
    cut = (lambda x: x.chunk(mesh.tp.size)[mesh.tp.rank]) if mesh.sequence_parallel else (lambda x: x)
    own_TD = cut(x_TD.detach()).clone().requires_grad_()
    y_TD = call_part(own_TD)
    (y_TD * cut(weight_TD)).sum().backward()
    torch.testing.assert_close(y_TD.detach(), cut(expected_TD.detach()))
    torch.testing.assert_close(own_TD.grad, cut(x_TD.grad))
    for (name, param), (_, reference) in zip(part.named_parameters(), whole.named_parameters(), strict=True):
        first = spec_of(param).flat_start // prod(param.shape[1:])
        rows = slice(first, first + param.shape[0])
        torch.testing.assert_close(param.detach(), reference.detach()[rows])
        torch.testing.assert_close(param.grad, reference.grad[rows], msg=lambda text, name=name: f"{name}: {text}")


def check_enter_and_leave_are_each_others_adjoint() -> None:
    """<enter(x), y> summed over ranks = <x, leave(y)>: what one moves forward, the other moves backward."""
    for tp in groups():
        mesh = mesh_of(tp, True)
        x_TD, y_TD = draw(tp.rank, T, D), draw(50 + tp.rank, T * tp.size, D)
        left = c.all_reduce((enter(x_TD, mesh) * y_TD).sum(), tp)
        right = c.all_reduce((x_TD * leave(y_TD, mesh)).sum(), tp)
        torch.testing.assert_close(left, right)


CHECKS = [
    check_pairs,
    check_expanded_gradient,
    check_exchange,
    check_slices_that_do_not_fit_are_refused,
    check_a_group_of_one_is_the_identity,
    check_loss,
    check_loss_against_megatron,
    check_layers,
    check_enter_and_leave_are_each_others_adjoint,
]


@pytest.mark.parametrize("ranks", [2, 4])
def test_single_process_meaning(ranks: int) -> None:
    run_checks(ranks, CHECKS)
