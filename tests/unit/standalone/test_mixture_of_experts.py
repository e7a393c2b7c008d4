"""`MixtureOfExperts`: the formula, counts, capacity, dropout, precision, seeds and surgery, seen from outside."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moe_dist
from moe_dist import MixtureOfExperts
from tests.unit.helpers import gradients

D, WIDTH = 16, 24
POLICIES = ["position", "score", "random"]


def mixture(**options: object) -> MixtureOfExperts:
    return MixtureOfExperts(**(dict(d_model=D, d_ff=WIDTH, num_experts=4, dropout=0.0, seed=3) | options))


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 2) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def identity(layer: MixtureOfExperts) -> MixtureOfExperts:
    """Every expert is E(x) = relu(x) - relu(-x) = x."""
    eye = torch.eye(D)
    with torch.no_grad():
        layer.moe.experts.w_up.copy_(torch.cat([eye, -eye]).expand(4, -1, -1))
        layer.moe.experts.w_out.copy_(torch.cat([eye, -eye]).expand(4, -1, -1))
    return layer


def test_importing_moe_dist_does_not_import_torch() -> None:
    code = "import sys, moe_dist; assert 'torch' not in sys.modules; print(moe_dist.MixtureOfExperts.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.stdout.strip() == "MixtureOfExperts", done.stderr
    with pytest.raises(AttributeError, match=r"'Mixture'; it has .*MixtureOfExperts"):
        moe_dist.Mixture  # noqa: B018
    assert "MixtureOfExperts" in dir(moe_dist)


def test_the_signature_of_the_document() -> None:
    layer = MixtureOfExperts(64, 128, 8, 2, 0.1, 1.25)
    y = layer(torch.randn(2, 10, 64))
    assert y.shape == (2, 10, 64)
    assert (layer.num_experts, layer.moe.config.top_k, layer.moe.config.capacity_factor) == (8, 2, 1.25)
    assert layer.expert_counts.sum() == 2 * 10 * 2


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_formula(top_k: int) -> None:
    """Token after token, with gelu experts: sum over the chosen of p_i E_i(x), p renormalised at top_k > 1."""
    layer = mixture(top_k=top_k).eval()
    x_TD, held = tokens(7), layer.moe.experts
    for x_D, y_D in zip(x_TD, layer(x_TD), strict=True):
        chosen = (layer.moe.router.weight @ x_D).softmax(-1).topk(top_k)
        weights_K = chosen.values / (chosen.values.sum() if top_k > 1 else 1)
        outs = [F.gelu(held.w_up[i] @ x_D) @ held.w_out[i] for i in chosen.indices]
        torch.testing.assert_close(y_D, sum(w * out for w, out in zip(weights_K, outs, strict=True)))


WEIGHTS = [
    dict(top_k=1),
    dict(),
    dict(renormalize=False),
    dict(router="sigmoid"),
    dict(router="sigmoid", top_k=1, expert_capacity_factor=0.5),
    dict(expert_capacity_factor=0.5),
]


@pytest.mark.parametrize("options", WEIGHTS, ids=str)
def test_identity_experts_return_the_weight_times_x(options: dict) -> None:
    """Neither weight^2 * x nor x: the sum of the weights of the kept assignments."""
    layer, x_TD = identity(mixture(d_ff=2 * D, activation="relu", **options)), tokens(30)
    context = layer._context(x_TD, None, step=0)
    routing = layer.moe.gate.routing(x_TD, context)
    plan = layer.moe.gate.capacity(routing, context)
    weight_T1 = (routing.weights_TK * plan.kept_TK).sum(1, keepdim=True)
    torch.testing.assert_close(layer(x_TD), weight_T1 * x_TD)
    assert plan.kept_TK.all() == ("expert_capacity_factor" not in options)


@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (2, 3, 5), (0,), (2, 0)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    layer, x = mixture().eval(), tokens(*shape)
    y = layer(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y.reshape(-1, D), layer(x.reshape(-1, D)))
    assert layer(x.mT.contiguous().mT if x.dim() > 1 else x).shape == x.shape  # not contiguous


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("router", ["softmax", "sigmoid", "noisy", "expert_choice", "sinkhorn", "hash"])
def test_other_precisions(router: str, dtype: torch.dtype) -> None:
    layer, ids = mixture(router=router, dropout=0.1), torch.arange(40)
    expected, aux = layer(tokens(40), True, token_ids=ids, step=0)
    layer.to(dtype)
    y, low = layer(tokens(40).to(dtype), True, token_ids=ids, step=0)
    assert y.dtype == dtype
    (y.sum() + low).backward()
    assert {grad.dtype for grad in gradients(layer).values()} <= {dtype}
    if dtype == torch.float64:
        torch.testing.assert_close(y, expected.to(dtype), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(low.double(), aux.double(), rtol=1e-4, atol=1e-5)
    else:
        far_T = (y - expected).abs().amax(-1) > 0.1  # a near tie in bfloat16 may fall the other way
        assert far_T.float().mean() < 0.3


@pytest.mark.parametrize("training", [True, False])
def test_the_auxiliary_loss_comes_whenever_asked_for(training: bool) -> None:
    layer, x = mixture(balance_loss_coef=0.1, z_loss_coef=0.0, dropout=0.0).train(training), tokens(2, 9)
    _, aux = layer(x, return_aux_loss=True)
    probs_TE = (x.reshape(-1, D) @ layer.moe.router.weight.t()).softmax(-1)
    share_E = probs_TE.topk(2).indices.flatten().bincount(minlength=4) / 36
    torch.testing.assert_close(aux, 0.1 * 4 * (share_E * probs_TE.mean(0)).sum())
    aux.backward()
    assert layer.moe.router.weight.grad.abs().max() > 0
    assert isinstance(layer(x), Tensor)


def test_counts_are_of_the_last_forward_and_before_dropping() -> None:
    layer = mixture(expert_capacity_factor=0.25)
    assert layer.expert_counts.tolist() == [0, 0, 0, 0]
    for count in (12, 5):
        x_TD = tokens(count)
        layer(x_TD)
        chosen = (x_TD @ layer.moe.router.weight.t()).topk(2).indices
        assert layer.expert_counts.tolist() == chosen.flatten().bincount(minlength=4).tolist()


def test_capacity_is_for_training_unless_evaluation_has_its_own() -> None:
    x_TD, free = tokens(40), mixture(expert_capacity_factor=None)
    layer, both = mixture(expert_capacity_factor=0.5), mixture(expert_capacity_factor=0.5, eval_capacity_factor=0.5)
    whole = free(x_TD)
    dropped = layer(x_TD)
    assert (dropped == 0).all(1).any()
    assert not torch.equal(dropped, whole)
    assert torch.equal(layer.eval()(x_TD), whole)
    assert torch.equal(both.eval()(x_TD), dropped)


def test_dropout() -> None:
    layer, x_TD = mixture(dropout=0.25, expert_capacity_factor=None), tokens(400)
    whole = layer.eval()(x_TD)
    first, second = layer.train()(x_TD), layer(x_TD)
    gone = first == 0
    assert abs(float(gone.float().mean()) - 0.25) < 0.02
    torch.testing.assert_close(first[~gone], (whole / 0.75)[~gone])
    assert not torch.equal(gone, second == 0)
    assert torch.equal(layer(x_TD, step=0), first)


def test_a_seed_fixes_everything_and_a_step_differs_from_the_next() -> None:
    options = dict(dropout=0.1, expert_capacity_factor=0.5, drop_policy="random", jitter=0.1)
    layer, again, other = mixture(**options), mixture(**options), mixture(**options, seed=4)
    x_TD = tokens(60)
    steps = [layer(x_TD) for _ in range(3)]
    assert [torch.equal(again(x_TD), y) for y in steps] == [True] * 3
    assert not torch.equal(steps[0], steps[1]) and not torch.equal(steps[1], steps[2])
    assert torch.equal(layer(x_TD, step=1), steps[1])
    assert not torch.equal(other(x_TD), steps[0])
    assert layer.step == 3
    layer.eval()(x_TD)
    assert layer.step == 3  # evaluation draws nothing


def test_without_a_seed_layers_differ_and_torch_decides() -> None:
    torch.manual_seed(5)
    first, second = mixture(seed=None), mixture(seed=None)
    assert not torch.equal(first.moe.router.weight, second.moe.router.weight)
    torch.manual_seed(5)
    assert torch.equal(mixture(seed=None).moe.router.weight, first.moe.router.weight)


def test_the_state_dict_holds_all() -> None:
    options = dict(dropout=0.1, expert_capacity_factor=0.5, drop_policy="random", router="sigmoid")
    layer, other, x_TD = mixture(**options), mixture(**options, seed=9), tokens(60)
    for _ in range(2):
        layer(x_TD)
    layer.balance()
    assert layer.moe.router.bias_E.abs().max() > 0
    other.load_state_dict(layer.state_dict())
    assert other.step == 2
    assert torch.equal(other(x_TD), layer(x_TD))


def test_balancing_uses_the_passes_since_the_last() -> None:
    layer, x_TD = mixture(router="sigmoid", bias_update_rate=0.5, dropout=0.0), tokens(60)
    layer.eval()(x_TD)
    layer.balance()
    assert layer.moe.router.bias_E.tolist() == [0, 0, 0, 0]
    layer.train()(x_TD)
    load_E = layer.expert_counts.double()
    layer(x_TD)
    layer.balance()
    assert layer.moe.router.bias_E.tolist() == (0.5 * (load_E.mean() - load_E).sign()).tolist()


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_token_changes_no_other_when_nothing_is_dropped(top_k: int) -> None:
    """To the bit where the choice stays; where it moves, other experts' products have another size, and may round
    differently."""
    layer, x_BSD = mixture(top_k=top_k).eval(), tokens(2, 20)
    y = layer(x_BSD)
    near, far = x_BSD.clone(), x_BSD.clone()
    near[1, 7] *= 1.001
    far[1, 7] = -x_BSD[1, 7]
    others = torch.ones(2, 20, dtype=torch.bool)
    others[1, 7] = False
    for changed, same_bits in ((near, True), (far, False)):
        counts = layer.expert_counts
        z = layer(changed)
        assert torch.equal(layer.expert_counts, counts) == same_bits
        assert (z[1, 7] - y[1, 7]).abs().max() > 1e-5
        if same_bits:
            assert torch.equal(z[others], y[others])
        torch.testing.assert_close(z[others], y[others], rtol=1e-6, atol=1e-6)
        layer(x_BSD)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_token_changes_only_those_it_displaces_when_some_are_dropped(policy: str) -> None:
    layer, x_TD = mixture(expert_capacity_factor=0.5, drop_policy=policy), tokens(40)

    def kept(x_TD: Tensor) -> tuple[Tensor, Tensor]:
        context = layer._context(x_TD, None, step=0)
        plan = layer.moe.gate.capacity(layer.moe.gate.routing(x_TD, context), context)
        return plan.kept_TK, layer(x_TD, step=0)

    before_TK, y_TD = kept(x_TD)
    displaced = 0
    for token in range(0, 40, 5):
        changed_TD = x_TD.clone()
        changed_TD[token] = -2 * x_TD[token]
        after_TK, z_TD = kept(changed_TD)
        same_T = (after_TK == before_TK).all(1)
        same_T[token] = False
        displaced += int((~same_T).sum()) - 1
        torch.testing.assert_close(z_TD[same_T], y_TD[same_T], rtol=1e-6, atol=1e-6)
        moved_T = ~same_T
        moved_T[token] = False
        assert ((z_TD - y_TD)[moved_T].abs().amax(-1) > 1e-4).all()
        if policy == "position":
            assert same_T[:token].all()  # causal
    assert displaced > 0


def test_surgery_from_outside() -> None:
    layer, x_TD = mixture(expert_capacity_factor=None), tokens(50)
    y, loaded = layer(x_TD), int(layer.expert_counts.argmax())
    (new,) = layer.add_experts(1)
    assert (new, layer.num_experts) == (4, 5)
    assert torch.equal(layer.moe.experts.w_up[4], layer.moe.experts.w_up[loaded])  # the most loaded is cloned
    assert torch.equal(layer(x_TD), y)
    layer.open_experts([new])
    assert not torch.equal(layer(x_TD), y)
    layer.close_experts([new])
    assert layer.remove_experts([new]) == [0, 1, 2, 3]
    assert torch.equal(layer(x_TD), y)
    assert layer.merge_experts([[0, 2]]) == [[0, 2], [1], [3]]
    assert layer(x_TD).shape == y.shape
    assert len(layer.expert_counts) == layer.num_experts == 3


def test_random_experts_are_those_of_a_larger_layer() -> None:
    layer, larger = mixture(), mixture(num_experts=6)
    layer.open_experts(layer.add_experts(2, "random"))
    x_TD = tokens(30)
    assert torch.equal(layer(x_TD), larger(x_TD))


def test_it_learns() -> None:
    layer, x_TD = mixture(d_ff=32, dropout=0.0), tokens(200)
    target_TD = torch.sin(3 * x_TD)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        y, aux = layer(x_TD, return_aux_loss=True)
        loss = F.mse_loss(y, target_TD)
        (loss + aux).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_mistakes_are_refused() -> None:
    for options, message in (
        (dict(top_k=5), "top_k=5 is larger than num_experts=4"),
        (dict(dropout=1.0), "dropout=1.0"),
        (dict(num_experts=0), "num_experts=0"),
        (dict(d_ff=0), "d_ff=0 is below 1"),
        (dict(expert_capacity_factor=0.0), "capacity_factor=0.0"),
        (dict(activation="tanh"), "unknown activation 'tanh'"),
        (dict(num_groups=3), "not divisible by num_groups=3"),
    ):
        with pytest.raises(ValueError, match=message):
            mixture(**options)
    with pytest.raises(TypeError, match="unknown options \\['drop_polcy'\\]: did you mean drop_policy\\? There are "):
        mixture(drop_polcy="score")
    with pytest.raises(ValueError, match="last dimension must be d_model=16"):
        mixture()(torch.randn(3, 8))
    with pytest.raises(ValueError, match="id of every token"):
        mixture(router="hash")(tokens(3))
