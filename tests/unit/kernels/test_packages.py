"""flash-attn and apex: we call what they document, it computes what the references do, and where a package is missing
the way to build it is said. The packages are pretended (pretended_packages.py), but for the tests marked gpu, which
need the real ones."""

from importlib.util import find_spec
from itertools import product

import pytest
import torch
from torch import Tensor

from moe_dist.config.schema import OptimConfig
from moe_dist.engine.adamw import AdamW, ApexAdamW, make_adamw
from moe_dist.kernels.attention import reference
from moe_dist.kernels.attention.backend import attention, describe_attention
from moe_dist.kernels.attention.pattern import Dropout, PackedSequences, Pattern
from moe_dist.kernels.attention.varlen import one_by_one, varlen
from moe_dist.kernels.norm.reference import rms_norm
from moe_dist.kernels.packages import APEX, FLASH_ATTN, check_package
from moe_dist.kernels.random import RandomKey
from moe_dist.kernels.registry import norm_kernel
from tests.unit.kernels.pretended_packages import CALLS, apex, flash_attn, pretended

B, H, K, P = 2, 4, 9, 8
ON_GPU = torch.cuda.is_available()


def leaves(*shapes: tuple[int, ...], device: str = "cpu") -> list[Tensor]:
    """bf16 numbers, so that the packages and the references read the same."""
    return [torch.randn(shape, device=device).bfloat16().requires_grad_() for shape in shapes]


def outcome(attend: object, inputs: list[Tensor], *args: object, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Output and all gradients, in float64 on the CPU."""
    given = [t.detach().to(dtype).requires_grad_() for t in inputs]
    out = attend(*given, *args, 0.3)  # type: ignore[operator]
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    return [t.detach().double().cpu() for t in (out, *torch.autograd.grad((out * weight).sum(), given))]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """As close as bf16 numbers are."""
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def patterns(device: str = "cpu") -> list[Pattern]:
    slopes_H = torch.rand(H, dtype=torch.float64, device=device)
    wanted = product((True, False), (None, 1, 3), (None, slopes_H))
    return [Pattern(causal, window, slopes_H=slopes) for causal, window, slopes in wanted]


@pytest.mark.parametrize("queries", [1, 5, 9])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_flash_attn_is_the_plain_maths(groups: int, queries: int) -> None:
    inputs = leaves((B, H, queries, P), (B, groups, K, P), (B, groups, K, P))
    with pretended(flash_attn()):
        for pattern in patterns():
            found = outcome(attention("flash_attn"), inputs, pattern)
            assert_close(found, outcome(reference.attend, inputs, pattern, dtype=torch.float64))


def test_flash_attn_takes_packed_sequences_as_they_are() -> None:
    cu_q, cu_k = torch.tensor([0, 3, 3, 5], dtype=torch.int32), torch.tensor([0, 4, 5, 9], dtype=torch.int32)
    packed, inputs = PackedSequences(cu_q, cu_k, 3, 4), leaves((5, H, P), (9, 2, P), (9, 2, P))
    with pretended(flash_attn()):
        for pattern in patterns():
            CALLS.clear()
            found = outcome(varlen("flash_attn"), inputs, packed, pattern)
            assert [call["name"] for call in CALLS] == ["varlen"]
            assert_close(found, outcome(one_by_one(reference.attend), inputs, packed, pattern, dtype=torch.float64))


def test_flash_attn_decodes_rows_of_several_lengths() -> None:
    """As a cache has them: what lies past a row's own keys is not read."""
    q, k, v = (t.detach() for t in leaves((B, H, 2, P), (B, 2, K, P), (B, 2, K, P)))
    k[0, :, 5:], v[0, :, 5:] = torch.nan, torch.nan
    starts_B = torch.tensor([3, K - 2])
    with pretended(flash_attn()), torch.no_grad():
        for window, slopes_H in product((None, 4), (None, torch.rand(H))):
            found = attention("flash_attn")(q, k, v, Pattern(True, window, starts_B, slopes_H=slopes_H), 0.3)
            for row, keys in enumerate((5, K)):
                alone = (t[row : row + 1].double() for t in (q, k[:, :, :keys], v[:, :, :keys]))
                expected = reference.attend(*alone, Pattern(True, window, slopes_H=slopes_H), 0.3)
                torch.testing.assert_close(found[row : row + 1].double(), expected, rtol=2e-2, atol=2e-2)
    with pretended(flash_attn()), pytest.raises(ValueError, match="no backward pass for rows at places of their own"):
        attention("flash_attn")(q.requires_grad_(), k, v, Pattern(starts_B=starts_B), None)


def test_flash_attn_repeats_bit_by_bit_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = leaves((1, 2, 3, P), (1, 1, 3, P), (1, 1, 3, P))
    CALLS.clear()
    with pretended(flash_attn()):
        attention("flash_attn")(*inputs, None, None)
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        attention("flash_attn")(*inputs, None, None)
    assert [call["deterministic"] for call in CALLS] == [False, True]
    assert CALLS[0] == dict(name="func", deterministic=False, window_size=(-1, 0), causal=True)


def test_flash_attn_refuses_what_it_has_not() -> None:
    attend, inputs = attention("flash_attn"), leaves((B, H, K, P), (B, 1, K, P), (B, 1, K, P))
    dropout = Dropout(0.1, RandomKey.of("test"))
    for pattern, name in (
        (Pattern(keys_BS=torch.ones(B, K, dtype=torch.bool)), "keys_BS"),
        (Pattern(bias=torch.zeros(K, K)), "bias"),
        (Pattern(sinks_H=torch.zeros(H)), "sinks_H"),
        (Pattern(dropout=dropout), "dropout"),
    ):
        with pytest.raises(ValueError, match=f"flash-attn has no {name} that we could use: take the triton or torch"):
            attend(*inputs, pattern, None)
    with pytest.raises(ValueError, match=r"in float16 and bfloat16, but the queries are float32: cast them, or use"):
        attend(*(t.float() for t in inputs), None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_apex_is_the_plain_maths(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 3, 16).to(dtype).requires_grad_(), torch.rand(16).to(dtype).requires_grad_()
    with pretended(*apex()):
        y = norm_kernel("apex", "cuda")(x, weight, 1e-2)
    found = [y, *torch.autograd.grad(y.square().sum(), (x, weight))]
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = rms_norm(*wide, 1e-2)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for ours, theirs in zip(found, [expected, *torch.autograd.grad(expected.square().sum(), wide)], strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def test_the_optimizer_of_apex_steps_as_torchs_and_goes_on_from_any_step() -> None:
    optim = OptimConfig(implementation="apex", lr=0.1, beta1=0.8, beta2=0.9, eps=1e-5, weight_decay=0.3)
    ours, theirs = ([torch.randn(3, 5), torch.randn(7)] for _ in range(2))
    for mine, other in zip(ours, theirs, strict=True):
        other.copy_(mine)

    def groups(params: list[Tensor]) -> list[tuple[list[Tensor], float]]:
        return [(params[:1], 1.0), (params[1:], 0.0), ([], 0.0)]

    def step(optimizers: list[AdamW | ApexAdamW], lr: float) -> None:
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step(lr)

    with pretended(*apex()):
        fused: AdamW | ApexAdamW = ApexAdamW(groups(ours), optim)
        plain = AdamW(groups(theirs), optim)
        with pytest.raises(AssertionError, match="gradients exist from"):
            fused.step(0.1)
        for lr in (0.1, 0.02):
            step([fused, plain], lr)
        resumed = ApexAdamW(groups(ours), optim)  # as the engine fills it from a checkpoint
        for param in ours:
            there, here = fused.moments(param), resumed.moments(param)
            here.exp_avg.copy_(there.exp_avg)
            here.exp_avg_sq.copy_(there.exp_avg_sq)
        resumed.set_step(2)
        step([resumed, plain], 0.3)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        held, expected = resumed.moments(mine), plain.moments(other)
        torch.testing.assert_close(held.exp_avg, expected.exp_avg)
        torch.testing.assert_close(held.exp_avg_sq, expected.exp_avg_sq)
        assert float(held.step) == float(expected.step) == 3


@pytest.mark.skipif(any(find_spec(name) for name in ("flash_attn", "apex", "amp_C")), reason="they are installed here")
def test_what_is_not_there_is_refused_with_the_way_to_build_it() -> None:
    with pytest.raises(ValueError, match=r"^x=flash_attn needs a GPU, but this run is on cpu: set it to flash$"):
        check_package(FLASH_ATTN, "x=flash_attn", "flash", "cpu")
    with pytest.raises(ValueError, match=r"^x=flash_attn, but flash-attn is not .* pip install flash-attn --no-build"):
        check_package(FLASH_ATTN, "x=flash_attn", "flash", "cuda")
    for modules in ([], apex(optimizer=False)):  # without its extensions it is not there either
        with (
            pretended(*modules),
            pytest.raises(ValueError, match=r"--cpp_ext.*--cuda_ext.*github.com/NVIDIA/apex") as no,
        ):
            make_adamw([], OptimConfig(implementation="apex"), "cuda")
        assert "\n" not in str(no.value)
    with pretended(flash_attn(), *apex()):
        check_package(FLASH_ATTN, "x=flash_attn", "flash", "cuda")
        check_package(APEX, "x=apex", "torch", "cuda")
    assert describe_attention("flash_attn") == "flash-attn" and describe_attention("flash") == "torch-sdpa"


@pytest.mark.gpu
@pytest.mark.skipif(not (ON_GPU and FLASH_ATTN.built), reason="needs a GPU and flash-attn")
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_real_flash_attn(groups: int) -> None:
    inputs = leaves((B, H, 65, 64), (B, groups, 130, 64), (B, groups, 130, 64), device="cuda")
    for pattern in patterns("cuda"):
        expected = outcome(reference.attend, inputs, pattern, dtype=torch.float64)
        found = outcome(attention("flash_attn"), inputs, pattern)
        for ours, theirs in zip(found, expected, strict=True):
            assert float((ours - theirs).norm()) <= 2e-2 * float(theirs.norm()), pattern


@pytest.mark.gpu
@pytest.mark.skipif(not (ON_GPU and APEX.built), reason="needs a GPU and apex")
def test_the_real_apex() -> None:
    x, weight = (t.requires_grad_() for t in (torch.randn(70, 256, device="cuda"), torch.rand(256, device="cuda")))
    found, expected = norm_kernel("apex", "cuda")(x, weight, 1e-5), rms_norm(x, weight, 1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), (x, weight)),
        torch.autograd.grad(expected.square().sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    made = [[torch.ones(40, 7, device="cuda")] for _ in range(2)]
    fused, plain = ApexAdamW([(made[0], 1.0)], OptimConfig()), AdamW([(made[1], 1.0)], OptimConfig())
    for _ in range(3):
        made[0][0].grad = torch.randn(40, 7, device="cuda")
        made[1][0].grad = made[0][0].grad.clone()
        fused.step(0.1)
        plain.step(0.1)
    torch.testing.assert_close(made[0][0], made[1][0], rtol=1e-5, atol=1e-6)
