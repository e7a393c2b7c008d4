"""The clock of a step on a GPU: parts are those of the stream, and nobody waits to read them."""

import time

import pytest
import torch

from moe_dist.parallel.trail import Trail
from moe_dist.train.record.step_clock import OWN, StepClock

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CYCLES = 200_000_000  # a tenth of a second


def test_parts_are_the_streams() -> None:
    clock, trail = StepClock(torch.device("cuda")), Trail()
    trail.listener = clock.hear
    launched = 0.0
    for step in (1, 2, 3):
        began = time.perf_counter()
        clock.begin(step)
        trail.enter("data", step)
        trail.enter("forward")
        with trail.inside("experts"):
            torch.cuda._sleep(CYCLES)
        trail.enter("bookkeeping")
        own = clock.handed_in()
        launched = time.perf_counter() - began
        if step < 3:
            assert own == [0.0] * len(OWN)
            torch.cuda.synchronize()  # as the statistics of a step do, which are read on the host
    timing = clock.record([own])["timing"]
    assert timing["step"] == 1 and timing["experts"] > 0.03 > timing["forward"]
    assert launched < timing["experts"] / 2, "what was launched last is still running"


def test_a_graph_has_no_events() -> None:
    clock, graph, x = StepClock(torch.device("cuda")), torch.cuda.CUDAGraph(), torch.ones(4, device="cuda")
    clock.begin(1)
    with torch.cuda.graph(graph):
        clock.hear("forward", "")
        x += 1
    graph.replay()
    torch.cuda.synchronize()
    assert clock._lap is not None and len(clock._lap.marks) == 1 and x.tolist() == [2.0] * 4
