"""Saves in the background, in runs of two ranks: a signal, a step back or a full disk while one is pending."""

import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from moe_dist.checkpoint import store
from moe_dist.checkpoint.layout import ShardFile
from moe_dist.checkpoint.reader import Reader
from moe_dist.checkpoint.store import checkpoints
from moe_dist.config import Config
from moe_dist.train.loop import Trainer
from moe_dist.train.record.run_folder import RunFolder
from tests.dist.helpers import raised, run_checks
from tests.dist.test_divergence import config, healthy, loss_at, status, stored, train

SECONDS = 0.5  # that a save is held up


class Slow:
    """Files of `step` are written when `go` has been called, SECONDS later; `events` says what happened, in order."""

    def __init__(self, step: int) -> None:
        self.step, self.events, self.released = step, list[str](), threading.Event()
        self.at_once, self.most, self.lock = 0, 0, threading.Lock()

    def go(self, why: str) -> None:
        self.events.append(why)
        threading.Timer(SECONDS, self.released.set).start()

    @contextmanager
    def writing(self) -> Iterator[None]:
        write = store.write_shard

        def held_up(path: Path, *args: Any) -> ShardFile:
            step = int(path.parent.name.removeprefix(".step-"))
            with self.lock:
                self.at_once += 1
                self.most = max(self.most, self.at_once)
            assert step != self.step or self.released.wait(60)
            written = write(path, *args)
            self.events.append(f"wrote {step}")
            self.at_once -= 1
            return written

        with mock.patch.object(store, "write_shard", held_up):
            yield


def whole(config: Config) -> list[str]:
    """Names of the run's checkpoints; all of them must be as their manifests say."""
    dist.barrier()
    found = checkpoints(RunFolder(Path(config.run.root) / config.run.name).checkpoints)
    assert [problem for path in found for problem in Reader(path).check_digests(0, 1)] == []
    return [path.name for path in found]


def check_a_signal_while_a_save_is_pending(folder: Path) -> None:
    settings = config(folder, "signalled", run__async_save=True, run__save_every=2)
    slow = Slow(2)

    def signalled(trainer: Trainer) -> None:
        update, calls = trainer.engine.update, []

        def faulty(lr: float) -> float:
            calls.append(lr)
            if len(calls) == 3:
                slow.go("signal")
                if trainer.mesh.rank == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
            return update(lr)

        trainer.engine.update = faulty  # type: ignore[method-assign]

    with slow.writing():
        train(settings, signalled)
    assert slow.events == ["signal", "wrote 2", "wrote 3"] and slow.most == 1
    assert status(settings) == {"state": "preempted", "step": 3, "signal": "SIGTERM"}
    assert whole(settings) == ["step-000002", "step-000003"]
    straight = config(folder, "straight", run__save_every=3, train__steps=8)
    train(straight, healthy)
    assert stored(settings, 3) == stored(straight, 3)


def check_a_signal_at_the_step_whose_save_is_pending(folder: Path) -> None:
    """Nothing is left to save, but to wait."""
    settings = config(folder, "at", run__async_save=True, run__save_every=2)
    slow = Slow(2)

    def signalled(trainer: Trainer) -> None:
        update, calls = trainer.engine.update, []

        def faulty(lr: float) -> float:
            calls.append(lr)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGUSR2)
                slow.go("signal")
            return update(lr)

        trainer.engine.update = faulty  # type: ignore[method-assign]

    with slow.writing():
        train(settings, signalled)
    assert slow.events == ["signal", "wrote 2"]
    assert status(settings) == {"state": "preempted", "step": 2, "signal": "SIGUSR2"}
    assert whole(settings) == ["step-000002"]


def check_a_step_back_while_a_save_is_pending(folder: Path) -> None:
    """It waits, and goes to the one that was being written. What comes of it is what saves in line give."""
    trouble, slow = loss_at([5, 6, 7], math.inf, times=1), Slow(4)
    inline, settings = config(folder, "inline"), config(folder, "behind", run__async_save=True)
    train(inline, trouble)

    def then_slow(trainer: Trainer) -> None:
        trouble(trainer)
        discard, calls = trainer.engine.discard, []

        def counted() -> None:
            discard()
            calls.append(1)
            if len(calls) == 3:
                slow.go("trouble")

        trainer.engine.discard = counted  # type: ignore[method-assign]

    with slow.writing():
        train(settings, then_slow)
    assert slow.events == ["wrote 2", "trouble", "wrote 4", "wrote 6", "wrote 8"] and slow.most == 1
    assert whole(settings) == [f"step-{step:06d}" for step in (2, 4, 6, 8)]
    assert stored(settings, 8) == stored(inline, 8)
    assert status(settings) == {"state": "finished", "step": 8}


def check_a_disk_that_is_full_ends_all_ranks(folder: Path) -> None:
    """In the thread of one rank: at the next boundary, or at the end, all of them raise and say why."""
    full = OSError(28, "No space left on device")
    for name, save_every in (("boundary", 2), ("end", 8)):
        settings = config(folder, f"full-{name}", run__async_save=True, run__save_every=save_every)
        broken = mock.patch.object(store, "write_shard", side_effect=full) if dist.get_rank() == 1 else nullcontext()
        with broken:
            said = raised(RuntimeError, train, settings, healthy)
        assert f"step-{save_every:06d} was not written: rank 1: [Errno 28] No space left on device" in said, said
        found = status(settings)
        assert found["state"] == "failed" and "rank 1: [Errno 28] No space left" in found["reason"]
        assert whole(settings) == []


def test_saves_behind_the_training(tmp_path: Path) -> None:
    checks = [
        check_a_signal_while_a_save_is_pending,
        check_a_signal_at_the_step_whose_save_is_pending,
        check_a_step_back_while_a_save_is_pending,
        check_a_disk_that_is_full_ends_all_ranks,
    ]
    run_checks(2, checks, tmp_path)
