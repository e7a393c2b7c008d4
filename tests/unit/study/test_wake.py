"""Waiting that a process, a signal or the time ends."""

import os
import signal
import subprocess
import time

from moe_dist.study.run.wake import STOP_SIGNALS, woken


def test_what_happens_first_ends_the_wait() -> None:
    heard: list[int] = []
    before = [signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGCHLD)]
    with woken(heard.append) as wait:
        start = time.monotonic()
        process = subprocess.Popen(["true"])
        while process.poll() is None:
            wait(60.0)
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)
        wait(60.0)
        assert time.monotonic() - start < 60 and heard == list(STOP_SIGNALS)
        wait(0.0)  # whatever has been heard already is not heard again
        start = time.monotonic()
        wait(0.05)
        assert time.monotonic() - start >= 0.05
    assert [signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGCHLD)] == before


def test_a_hangup_under_nohup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        heard: list[int] = []
        with woken(heard.append):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
