import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_dist.plan.live_memory import LiveMemory, Memory


def test_bytes_by_hand() -> None:
    """Views share, autograd keeps, and what nobody needs any more is gone."""
    with LiveMemory() as live:
        x = torch.zeros(1000)
        assert (live.now, live.peak) == (4000, 4000)
        view = x.view(10, 100)[3:]
        assert live.now == 4000
        w = torch.ones(1000, requires_grad=True)
        y = (w * 2).exp()  # 2 w goes, its exponential is kept
        assert (live.now, live.peak) == (12000, 16000)
        total = y.sum()
        del y
        assert live.now == 12004
        live.forget_peak()
        total.backward()
        assert w.grad is not None and live.now == 12004 and live.peak > 12004  # the gradient took its place
        del x
        assert live.now == 12004
        del view
        assert live.now == 8004
        grown = torch.empty(5)
        grown.resize_(100)
        assert live.now == 8404
        del w, total, grown
    assert live.now == 0


def test_what_was_there_before_counts_from_its_first_use() -> None:
    old = torch.zeros(1000)
    with LiveMemory() as live:
        assert live.now == 0
        old.add_(1)
        assert live.now == 4000
    del old
    assert live.now == 0


def test_fake_tensors_have_the_size_of_real_ones() -> None:
    with FakeTensorMode(), LiveMemory() as live:
        x = torch.empty(10**9, 4)
        y = x @ torch.empty(4, 4)
        del x
        assert live.now == 4 * 10**9 * 4 and y.shape == (10**9, 4)
        assert live.peak >= 2 * live.now


def test_where_the_peak_was_and_what_was_too_much() -> None:
    place = ["forward"]
    with LiveMemory(Memory(limit=6000, where=lambda: place[0])) as live:
        x = torch.zeros(1000)
        place[0] = "backward"
        assert live.memory.over == ""
        y = x * 2
        place[0] = "update"
        del x
        torch.zeros(10)
    assert live.peak == 8000 and live.memory.peak_at == "backward" and y.shape == (1000,)
    assert live.memory.over == "aten.mul.Tensor makes 1000 float32 in backward"
