"""The parts of a cut layer, computed one after another in this process, make up the whole one."""

import pytest
import torch
from torch import nn

from moe_dist.parallel.collectives import own_slice
from moe_dist.parallel.linear import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from moe_dist.parallel.mesh import Group, single_process_mesh
from moe_dist.parallel.norm import RMSNorm
from moe_dist.parallel.sharding import initialize

LAYERS = ((ColumnParallelLinear, (4, 6)), (RowParallelLinear, (6, 4)))


def started(module: nn.Module) -> nn.Module:
    initialize(module, seed=0)
    return module


def parts(tp: int) -> list[Group]:
    return [Group(tuple(range(tp)), rank) for rank in range(tp)]


@pytest.mark.parametrize("tp", [2, 3, 6])
def test_columns_join_and_rows_add_up(tp: int) -> None:
    x_TD, hidden_TF = torch.randn(5, 4), torch.randn(5, 6)
    up, down = (started(layer(*sizes, Group(), 1.0)) for layer, sizes in LAYERS)
    ups, downs = ([started(layer(*sizes, group, 1.0)) for group in parts(tp)] for layer, sizes in LAYERS)
    torch.testing.assert_close(torch.cat([part(x_TD) for part in ups], dim=-1), up(x_TD))
    pieces = hidden_TF.chunk(tp, dim=-1)
    torch.testing.assert_close(sum(part(piece) for part, piece in zip(downs, pieces, strict=True)), down(hidden_TF))
    torch.testing.assert_close(up(x_TD), x_TD @ up.weight.t())
    torch.testing.assert_close(down(hidden_TF), hidden_TF @ down.weight)


def test_embedding_rows_lie_on_one_rank_each() -> None:
    ids_T = torch.tensor([0, 5, 2, 3, 3])
    whole = started(VocabParallelEmbedding(6, 4, Group(), 1.0))(ids_T)
    first, second = (started(VocabParallelEmbedding(6, 4, group, 1.0))(ids_T) for group in parts(2))
    assert torch.equal(first + second, whole)
    assert torch.equal(first[[1, 3, 4]], torch.zeros(3, 4))  # ids 5, 3, 3 are in the upper half
    assert torch.equal(second[[0, 2]], torch.zeros(2, 4))


def test_rms_norm_is_the_formula() -> None:
    norm = RMSNorm(4, eps=0.5, mesh=single_process_mesh())
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    # mean square of (1, 1, 1, 3) is 3; sqrt(3 + 0.5) divides
    expected = torch.tensor([[1.0, 2.0, 3.0, 12.0]]) / 3.5**0.5
    torch.testing.assert_close(norm(torch.tensor([[1.0, 1.0, 1.0, 3.0]])), expected)


def test_rms_norm_gradients() -> None:
    norm = RMSNorm(5, eps=0.1, mesh=single_process_mesh()).double()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    x_TD, weight_TD = torch.randn(7, 5, dtype=torch.float64, requires_grad=True), torch.randn(7, 5, dtype=torch.float64)
    expected = x_TD / (x_TD.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight
    inputs = (x_TD, norm.weight)
    found = torch.autograd.grad((norm(x_TD) * weight_TD).sum(), inputs)
    torch.testing.assert_close(found, torch.autograd.grad((expected * weight_TD).sum(), inputs))


def test_rms_norm_of_low_precision_is_fp32_inside() -> None:
    norm, x_TD = RMSNorm(64, 1e-5, single_process_mesh()), torch.randn(7, 64).bfloat16()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    norm.bfloat16()
    wide = x_TD.float()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.float()
    assert (norm(x_TD) != expected.bfloat16()).float().mean() < 0.02  # rounded once, at the end


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda tp: ColumnParallelLinear(4, 7, tp, 1.0), "out_dim=7 is not divisible by tp=2"),
        (lambda tp: RowParallelLinear(7, 4, tp, 1.0), "in_dim=7 is not divisible by tp=2"),
        (lambda tp: VocabParallelEmbedding(7, 4, tp, 1.0), "vocab_size=7 is not divisible by tp=2"),
        (lambda tp: own_slice(torch.zeros(7, 2), tp), "7 tokens cannot be cut into 2 equal slices"),
    ],
)
def test_what_cannot_be_cut(layer: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(parts(2)[0])
