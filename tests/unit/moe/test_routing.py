"""The router: which experts, with which weight, and what reaches its gradient."""

import torch
from torch import Tensor

from moe_dist.moe.routing import SoftmaxRouter
from moe_dist.parallel.mesh import Group
from moe_dist.parallel.sharding import initialize
from tests.unit.helpers import context


def router(top_k: int, renormalize: bool = True, num_experts: int = 4) -> SoftmaxRouter:
    made = SoftmaxRouter(8, num_experts, top_k, renormalize, layer=0, slices=Group())
    initialize(made, seed=0)
    return made


def tokens(count: int = 16) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(1))


def test_by_hand() -> None:
    """Logits log(1, 2, 4, 1) are probabilities 1/8, 2/8, 4/8, 1/8; the best two, renormalised, are 2/3 and 1/3."""
    made = SoftmaxRouter(1, 4, 2, True, layer=0, slices=Group())
    with torch.no_grad():
        made.weight.copy_(torch.tensor([[1.0], [2.0], [4.0], [1.0]]).log())
    routing = made(torch.ones(1, 1), context())
    torch.testing.assert_close(routing.probs_TE, torch.tensor([[1.0, 2.0, 4.0, 1.0]]) / 8)
    assert routing.experts_TK.tolist() == [[2, 1]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[2.0, 1.0]]) / 3)


def test_top_1_is_never_renormalised() -> None:
    for renormalize in (True, False):
        made = router(1, renormalize)
        routing = made(tokens(), context())
        assert torch.equal(routing.weights_TK[:, 0], routing.probs_TE.max(-1).values)
        routing.weights_TK.sum().backward()
        assert made.weight.grad.abs().max() > 1e-3


def test_top_k_weights() -> None:
    routing = router(3)(tokens(), context())
    torch.testing.assert_close(routing.weights_TK.sum(-1), torch.ones(16))
    raw = router(3, renormalize=False)(tokens(), context())
    assert torch.equal(raw.experts_TK, routing.experts_TK)
    assert torch.equal(raw.weights_TK, raw.probs_TE.gather(1, raw.experts_TK))
    assert (raw.weights_TK.diff(dim=-1) <= 0).all()  # best first
    assert (raw.experts_TK.sort(-1).values.diff(dim=-1) > 0).all()  # K different experts


def test_renormalised_weights_bring_gradient_to_the_router() -> None:
    made = router(2)
    made(tokens(), context()).weights_TK[:, 0].sum().backward()
    assert made.weight.grad.abs().max() > 1e-3


def test_low_precision_tokens_are_routed_in_fp32() -> None:
    made, x_TD = router(2).bfloat16(), tokens().bfloat16()
    routing = made(x_TD, context())
    assert {routing.logits_TE.dtype, routing.probs_TE.dtype, routing.weights_TK.dtype} == {torch.float32}
    assert torch.equal(routing.logits_TE, x_TD.float() @ made.weight.float().t())
    assert not torch.equal(routing.logits_TE, routing.logits_TE.bfloat16().float())


def test_float64_stays_float64() -> None:
    assert router(2).double()(tokens().double(), context()).probs_TE.dtype == torch.float64


def test_an_earlier_choice_is_repeated_with_todays_weights() -> None:
    made, chosen_TK = router(2), torch.tensor([[3, 0]]).expand(16, 2)
    routing = made(tokens(), context(), chosen_TK)
    assert torch.equal(routing.experts_TK, chosen_TK)
    raw = routing.probs_TE[:, [3, 0]]
    torch.testing.assert_close(routing.weights_TK, raw / raw.sum(-1, keepdim=True))
