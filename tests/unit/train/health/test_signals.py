import os
import signal

import pytest
import torch

from moe_dist.parallel.mesh import Group
from moe_dist.process import STOP_SIGNALS
from moe_dist.train.health import signals as module
from moe_dist.train.health.signals import TIME_LIMIT, StopGuard

ALONE, CPU = Group(), torch.device("cpu")


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_nothing_else_happens(number: signal.Signals) -> None:
    with StopGuard() as guard:
        assert guard.agreed(ALONE, CPU) is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # some launchers signal twice
        assert guard.agreed(ALONE, CPU) == number.name


def test_the_old_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(RuntimeError), StopGuard():
        raise RuntimeError
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_second_interrupt_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with StopGuard() as guard:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 0.5
        os.kill(os.getpid(), signal.SIGINT)  # the same Ctrl-C, by way of the launcher
        assert guard.agreed(ALONE, CPU) == "SIGINT"
        now[0] += 0.6
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_time_limit_and_a_signal_that_comes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with StopGuard(minutes=2) as guard:
        now[0] += 119
        assert guard.agreed(ALONE, CPU) is None
        now[0] += 2
        assert guard.agreed(ALONE, CPU) == TIME_LIMIT
        os.kill(os.getpid(), signal.SIGTERM)
        assert guard.agreed(ALONE, CPU) == "SIGTERM"
