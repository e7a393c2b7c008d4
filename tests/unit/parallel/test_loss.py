"""The fused projection and cross-entropy against torch's two separate operations."""

import pytest
import torch
import torch.nn.functional as F

from moe_dist.parallel import loss
from moe_dist.parallel.mesh import Group


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32, 33])
def test_value_and_gradients(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_CHUNK_LOGITS", 1)  # chunks of 16 tokens
    torch.manual_seed(tokens)
    x_TD = torch.randn(tokens, 5, dtype=torch.float64, requires_grad=True)
    weight_VD = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets_T = torch.randint(11, (tokens,))
    expected = F.cross_entropy(x_TD @ weight_VD.t(), targets_T)
    grads = torch.autograd.grad(3 * expected, (x_TD, weight_VD))
    found = loss.linear_cross_entropy(x_TD, weight_VD, targets_T, Group())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * found, (x_TD, weight_VD)), grads)


def test_token_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_CHUNK_LOGITS", 1)
    torch.manual_seed(0)
    x_TD, weight_VD, targets_T = 50 * torch.randn(20, 5), torch.randn(11, 5), torch.randint(11, (20,))
    expected = F.cross_entropy(x_TD @ weight_VD.t(), targets_T, reduction="none")
    found = loss.token_losses(x_TD, weight_VD, targets_T, Group())
    torch.testing.assert_close(found, expected)
    assert torch.equal(loss.linear_cross_entropy(x_TD, weight_VD, targets_T, Group()), found.mean())
