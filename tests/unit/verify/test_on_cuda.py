"""Verification on a GPU, run on a device that only pretends to be one."""

from dataclasses import replace

import pytest
import torch

from moe_dist.config.model import ModelConfig
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.verify import compare
from moe_dist.verify.cases import LayoutCase, Options, Setting, case_config
from moe_dist.verify.compare import backends_of, compare_layout, train_reference
from tests.unit.pretended_cuda import HostTensorError, pretended_cuda

OPTIONS = Options((), (), steps=1)
CPU = torch.device("cpu")
# Every value of every axis of the settings once.
SETTINGS = (
    Setting(top_k="1", balance_scope="sequence"),
    Setting(drops="score", router="jitter", attention="options"),
    Setting(drops="random", overflow="reroute", router="groups", experts="bmm"),
    Setting(router="sigmoid", attention="switch", recompute="block"),
    Setting(router="noisy", balance_scope="local", experts="loop", recompute="activation"),
    Setting(router="expert_choice", attention="dropout"),
    Setting(router="sinkhorn", drops="dropless"),
    Setting(router="hash", accumulation="4"),
    Setting(attention="routed"),
)


def without_triton(model: ModelConfig, expert_ranks: int, device_type: str) -> ModelConfig:
    """The kernels of a GPU need one; all the rest runs here."""
    assert device_type == "cuda"
    return backends_of(replace(model, kernels="torch"), expert_ranks, device_type)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_run_on_cuda_leaves_nothing_on_the_host_and_computes_the_same(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = train_reference(setting, OPTIONS, CPU)
    monkeypatch.setattr(compare, "backends_of", without_triton)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    with pretended_cuda() as cuda:
        report = compare_layout(setting, LayoutCase(), alone, OPTIONS, cuda, {(1, 1, 1, 2): single_process_mesh()})
    assert report.agrees(OPTIONS), report


def test_the_backends_are_those_of_the_device() -> None:
    """What has no float64 on a GPU is not asked for it: torch's grouped_mm and the Triton kernels."""
    alone = {str(s): backends_of(case_config(s, None, 1).model, 1, "cuda") for s in SETTINGS}
    plain, routed = alone[str(SETTINGS[0])], alone[str(Setting(attention="routed"))]
    assert (plain.kernels, plain.moe.experts, plain.attention.backend) == ("triton", "grouped_mm", "flash")
    assert (routed.kernels, routed.moe.experts) == ("torch", "bmm")
    looped = case_config(Setting(attention="routed", experts="loop"), None, 1).model
    assert backends_of(looped, 1, "cuda").moe.experts == "loop"
    on_cpu = backends_of(case_config(Setting(attention="routed"), None, 1).model, 1, "cpu")
    assert (on_cpu.kernels, on_cpu.moe.experts) == ("torch", "grouped_mm")


def test_what_a_gpu_refuses_is_refused_here() -> None:
    with pretended_cuda() as cuda:
        x, here = torch.ones(3, device=cuda, requires_grad=True), torch.ones(3)
        for wrong in (lambda: x + here, lambda: x.index_select(0, torch.tensor([0])), lambda: torch.cat([here, x])):
            with pytest.raises(HostTensorError, match="on the host"):
                wrong()
        y = (x * torch.tensor(2.0))[[0, 1]][torch.tensor([1])] + x.new_tensor([1.0]) + torch.tensor([1.0], device=cuda)
        y.sum().backward()
        assert y.tolist() == [4.0] and int(y) == 4 and y.device == x.grad.device == cuda
        assert x.grad.tolist() == [0.0, 2.0, 0.0] and (here + x.cpu()).device.type == "cpu"
