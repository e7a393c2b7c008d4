"""Comparing runs: in one process a layout is compared with itself, whole and tampered with."""

from dataclasses import replace

import pytest
import torch

from moe_dist.engine.native import NativeEngine
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.verify.cases import LayoutCase, Options, Setting
from moe_dist.verify.compare import Reference, Report, compare_layout, train_reference

OPTIONS = Options((Setting(),), (LayoutCase(),), steps=2)
CPU = torch.device("cpu")
GOOD = Report(loss=0.0, grad=0.0, worst_parameter="", norm=0.0, near_ties=3, routed=0, dropped=0)


@pytest.mark.parametrize("name", ["loss", "grad", "norm", "routed", "dropped"])
def test_every_difference_counts(name: str) -> None:
    assert GOOD.agrees(OPTIONS)
    assert not replace(GOOD, **{name: 1}).agrees(OPTIONS)
    if name in ("loss", "grad", "norm"):
        assert not replace(GOOD, **{name: float("nan")}).agrees(OPTIONS)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return train_reference(Setting(), OPTIONS, CPU)


def compared(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> Report:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    return compare_layout(Setting(), LayoutCase(), reference, OPTIONS, CPU, {(1, 1): single_process_mesh()})


def spoil_gradient(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """The output norm's gradient is multiplied by `factor` in the last step."""
    whole, calls = NativeEngine.micro_step, []

    def micro_step(engine: NativeEngine, *args: object) -> object:
        output = whole(engine, *args)
        calls.append(output)
        if len(calls) == OPTIONS.steps:
            engine.masters[engine.model.output.norm.weight].grad.mul_(factor)
        return output

    monkeypatch.setattr(NativeEngine, "micro_step", micro_step)


def test_the_same_run_agrees(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    report = compared(reference, monkeypatch)
    assert report == replace(GOOD, near_ties=0)
    assert reference.tape.dropped() > 0
    assert len(reference.losses) == len(reference.norms) == len(reference.grads) == 2


def test_a_wrong_gradient_is_found_and_named(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_gradient(monkeypatch, 1.01)
    report = compared(reference, monkeypatch)
    assert not report.agrees(OPTIONS)
    assert report.grad == pytest.approx(0.01, rel=1e-3)
    assert report.worst_parameter == "output.norm.weight"
    assert report.norm > 0


def test_a_gradient_that_is_not_a_number_is_found(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient and the norm of the last step are NaN; compare_layout reports both as equal."""
    spoil_gradient(monkeypatch, float("nan"))
    assert not compared(reference, monkeypatch).agrees(OPTIONS)


def test_a_loss_that_is_not_a_number_is_found(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(reference, losses=[reference.losses[0], float("nan")])
    assert not compared(broken, monkeypatch).agrees(OPTIONS)
