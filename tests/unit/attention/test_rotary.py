"""Rotary embedding is a rotation by the position, so scores depend on the distance alone."""

import pytest
import torch

from moe_dist.attention.rotary import RotaryScaling, apply_rotary, rotary_table, turn_heads


def test_table_by_hand() -> None:
    """P = 4, theta = 100: pairs turn by the position and by a tenth of it."""
    cos, sin = rotary_table(torch.tensor([0, 1, 5]), 4, 100.0)
    angles = torch.tensor([[0.0, 0.0], [1.0, 0.1], [5.0, 0.5]])
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())
    assert cos.dtype == torch.float32
    assert rotary_table(torch.tensor([0.0], dtype=torch.float64), 4, 100.0)[0].dtype == torch.float64


def test_is_a_complex_product() -> None:
    """(x_i, x_{i + P/2}) as a complex number, times e^{i angle}."""
    x_BSHP, positions_S = torch.randn(2, 5, 3, 8, dtype=torch.float64), torch.arange(5).double()
    angles = positions_S[:, None] * 10000.0 ** (-torch.arange(4).double() / 4)
    turned = torch.complex(*x_BSHP.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
    found = apply_rotary(x_BSHP, rotary_table(positions_S, 8, 10000.0))
    torch.testing.assert_close(found, torch.cat((turned.real, turned.imag), -1))


def test_gradient() -> None:
    x_BSHP = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    table = rotary_table(torch.arange(3).double(), 4, 100.0)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, table), x_BSHP)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x.transpose(1, 2)[:, :3], table), x_BSHP.transpose(1, 2))


def test_position_zero_is_left_alone() -> None:
    x_BSHP = torch.randn(1, 1, 2, 6)
    assert torch.equal(apply_rotary(x_BSHP, rotary_table(torch.tensor([0]), 6, 10000.0)), x_BSHP)


def test_norms_are_preserved() -> None:
    x_BSHP = torch.randn(2, 64, 3, 8)
    turned = apply_rotary(x_BSHP, rotary_table(torch.arange(64), 8, 10000.0))
    torch.testing.assert_close(turned.norm(dim=-1), x_BSHP.norm(dim=-1))


@pytest.mark.parametrize("shift", [1, 7, 100])
def test_scores_depend_on_relative_positions(shift: int) -> None:
    q_BSHP, k_BSHP = torch.randn(2, 1, 6, 1, 8, dtype=torch.float64)

    def scores(first: int) -> torch.Tensor:
        table = rotary_table(torch.arange(first, first + 6).double(), 8, 10000.0)
        return apply_rotary(q_BSHP, table)[0, :, 0] @ apply_rotary(k_BSHP, table)[0, :, 0].t()

    torch.testing.assert_close(scores(shift), scores(0))
    assert not torch.allclose(scores(0), q_BSHP[0, :, 0] @ k_BSHP[0, :, 0].t())


@pytest.mark.parametrize(("head_dim", "theta", "length", "factor"), [(64, 1e4, 128, 4.0), (128, 1e6, 4096, 8.0)])
@pytest.mark.parametrize(
    ("kind", "ours", "theirs"),
    [
        ("linear", {}, {}),
        ("yarn", {}, {}),
        ("yarn", dict(truncate=False), dict(truncate=False)),  # GPT-OSS
        ("yarn", dict(fast=16.0, slow=2.0), dict(beta_fast=16.0, beta_slow=2.0)),
        ("llama3", dict(fast=4.0), dict(low_freq_factor=1.0, high_freq_factor=4.0)),
        ("llama3", dict(fast=8.0, slow=2.0), dict(low_freq_factor=2.0, high_freq_factor=8.0)),
        ("dynamic", dict(length=20), {}),  # no longer than the original: as it was
        ("dynamic", dict(length=9000), {}),
    ],
)
def test_scaling_is_that_of_transformers(
    kind: str, ours: dict, theirs: dict, head_dim: int, theta: float, length: int, factor: float
) -> None:
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    rope = dict(rope_type=kind, rope_theta=theta, factor=factor, original_max_position_embeddings=length) | theirs
    config = pytest.importorskip("transformers").LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=length, rope_parameters=rope
    )
    scaling = RotaryScaling(kind, factor, length, **ours)
    frequency, size = utils.ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=scaling.length or None)
    cos, sin = rotary_table(torch.arange(50).double(), head_dim, theta, scaling)
    angles = torch.arange(50)[:, None] * frequency.double()
    torch.testing.assert_close(cos, angles.cos() * size, rtol=0, atol=1e-5)
    torch.testing.assert_close(sin, angles.sin() * size, rtol=0, atol=1e-5)


def test_ntk_keeps_the_fastest_and_divides_the_slowest() -> None:
    scaling, one = RotaryScaling("ntk", 4.0), torch.tensor([1.0], dtype=torch.float64)
    found, plain = (rotary_table(one, 16, 1e4, s)[1].asin()[0] for s in (scaling, None))
    assert found[0] == plain[0]
    torch.testing.assert_close(found[-1], plain[-1] / 4)
    assert (found[1:-1] < plain[1:-1]).all() and (found[1:-1] > plain[1:-1] / 4).all()


def test_the_first_numbers_of_a_head_alone() -> None:
    """GLM-4 turns half of a head; attention experts with odd heads leave the last number."""
    x_BSHP, table = torch.randn(2, 5, 3, 7), rotary_table(torch.arange(5), 4, 100.0)
    turned = turn_heads(x_BSHP, table)
    assert torch.equal(turned[..., 4:], x_BSHP[..., 4:])
    assert torch.equal(turned[..., :4], apply_rotary(x_BSHP[..., :4], table))
    assert torch.equal(turn_heads(x_BSHP, rotary_table(torch.arange(5), 0, 100.0)), x_BSHP)


def test_rows_at_places_of_their_own() -> None:
    x_BSHP, starts_B = torch.randn(2, 3, 2, 8), torch.tensor([0, 5])
    table = rotary_table(starts_B[:, None] + torch.arange(3), 8, 1e4)
    turned = apply_rotary(x_BSHP, table)
    for row, start in enumerate(starts_B.tolist()):
        alone = apply_rotary(x_BSHP[row : row + 1], rotary_table(torch.arange(start, start + 3), 8, 1e4))
        torch.testing.assert_close(turned[row], alone[0], rtol=0, atol=0)
