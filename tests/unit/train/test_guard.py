import os
import signal

import pytest
import torch

from moe_dist.parallel.mesh import Group
from moe_dist.train.guard import SIGNALS, StopGuard

ALONE, CPU = Group(), torch.device("cpu")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_nothing_else_happens(number: signal.Signals) -> None:
    with StopGuard() as guard:
        assert guard.agreed(ALONE, CPU) is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # some launchers signal twice
        assert guard.agreed(ALONE, CPU) == number.name


def test_the_old_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(RuntimeError), StopGuard():
        raise RuntimeError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_other_signals_keep_their_meaning() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell starts with it ignored
    with pytest.raises(KeyboardInterrupt), StopGuard():
        os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)
