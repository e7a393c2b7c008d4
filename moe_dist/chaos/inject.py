"""`moe-dist train` with faults on cue: python -m moe_dist.chaos.inject PLAN.json train CONFIG ...

Nothing in the training knows of it. Its own notes of what it does (`Trail.enter`) are the cues of steps; Python's audit
events are those of saving: every file that is opened to be written, every folder that is made or flushed, every rename
and removal under checkpoints/. What was done is written down line by line, so that a kill loses none of it.
"""

import json
import math
import os
import resource
import runpy
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from moe_dist.chaos.fault import SIGNALS, Fault, Plan

_PATHS = {"os.rename": "rename", "os.remove": "remove", "os.rmdir": "rmdir", "os.mkdir": "mkdir"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_SHARD_BYTES = 4096  # of a shard or manifest that still find room on the full disk
_SPIKE = 1000.0


class Injector:
    """The faults of one rank, and its journal."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self.faults = [fault for fault in plan.faults if fault.rank == rank]
        self.checkpoints = Path(plan.checkpoints).absolute()
        Path(plan.journal).mkdir(parents=True, exist_ok=True)
        journal = Path(plan.journal) / f"rank-{rank}.jsonl"
        self._journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._step, self._phase, self._save = 0, "start", 0

    def arm(self) -> None:
        """Before anything else of the run: its imports, too, are moments at which a rank can die."""
        self.note("start")
        for fault in self.faults:
            if fault.after is not None:
                self._timer(fault.after, fault, "")
        from moe_dist.parallel.trail import Trail
        from moe_dist.train import loop

        _wrap(Trail, "enter", self._around_enter)
        _wrap(loop, "rank_starts", self._around_rank_starts)
        _wrap(loop, "make_engine", self._around_make_engine)
        sys.addaudithook(self._audit)

    def note(self, what: str, **details: Any) -> None:
        os.write(self._journal, json.dumps({"time": time.time(), "what": what, **details}).encode() + b"\n")

    def _around_enter(self, enter: Callable[..., None]) -> Callable[..., None]:
        def entered(trail: Any, phase: str, step: int | None = None) -> None:
            enter(trail, phase, step)
            self._step, self._phase = trail.step, phase
            if phase == "checkpoint":
                self._save = trail.step
            self.note("phase", phase=phase, step=trail.step)
            for fault in [f for f in self.faults if (f.step, f.phase) == (trail.step, phase)]:
                if fault.kind not in ("flip", "nan", "spike"):  # those come when the phase is over
                    self._fire(fault)

        return entered

    def _around_rank_starts(self, rank_starts: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any) -> Any:
            mine = rank_starts(*args)
            self.note("samples", step=self._step, starts=mine.tolist())
            return mine

        return recorded

    def _around_make_engine(self, make_engine: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any) -> Any:
            engine = make_engine(*args)
            engine.model.register_forward_hook(self._after_forward)
            update = engine.update

            def updated(lr: float) -> float:
                norm: float = update(lr)
                for fault in self._due("flip"):
                    self._fire(fault, flip_a_bit(engine.model))
                return norm

            engine.update = updated
            return engine

        return made

    def _after_forward(self, module: Any, args: Any, output: Any) -> Any:
        for fault in self._due("nan", "spike"):
            self._fire(fault)
            factor = math.nan if fault.kind == "nan" else _SPIKE
            output = replace(output, loss=output.loss * factor, nll=output.nll * factor)
        return output

    def _due(self, *kinds: str) -> list[Fault]:
        return [f for f in self.faults if f.kind in kinds and (f.step, f.phase) == (self._step, self._phase)]

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        """Python calls this before it does what the event says."""
        name = self._change(event, args) if event == "open" or event in _PATHS else None
        if name is None:
            return
        thread = threading.current_thread().name  # a save in the background has its own, named after its step
        save = int(thread.removeprefix("save-")) if thread.startswith("save-") else self._save
        self.note("change", save=save, name=name)
        for fault in [f for f in self.faults if (f.save, f.change) == (save, name)]:
            self._fire(fault, name)

    def _change(self, event: str, args: tuple[Any, ...]) -> str | None:
        """The change to the checkpoints' folder that this is, for example `rename .step-000020`."""
        if isinstance(args[0], int):
            return None
        path, folder = os.fsdecode(args[0]), -1
        if event == "open":
            verb = "write" if args[2] & _WRITES else "flush"
        else:
            verb, folder = _PATHS[event], args[2] if event in ("os.rename", "os.mkdir") else args[1]
        if folder != -1:  # shutil.rmtree works below open folders
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        whole = os.path.abspath(path)
        if not whole.startswith(str(self.checkpoints)) or (verb == "flush" and not os.path.isdir(whole)):
            return None
        return f"{verb} {os.path.relpath(whole, self.checkpoints)}"

    def _fire(self, fault: Fault, where: str = "") -> None:
        if not fault.again:
            self.faults.remove(fault)
        if fault.later:
            self._timer(fault.later, fault, where)
        else:
            self._act(fault, where)

    def _timer(self, seconds: float, fault: Fault, where: str) -> None:
        timer = threading.Timer(seconds, self._act, (fault, where))
        timer.daemon = True
        timer.start()

    def _act(self, fault: Fault, where: str) -> None:
        self.note("fault", fault=asdict(fault), where=where, step=self._step, phase=self._phase)
        if fault.kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[fault.kind])
        elif fault.kind == "delay":
            time.sleep(fault.seconds)
        elif fault.kind == "fill":
            self._fill(fault)
        while fault.kind == "hang":
            time.sleep(1)

    def _fill(self, fault: Fault) -> None:
        """A limit that the kernel keeps: the next write past it is cut short, the one after fails, and CPython ignores
        the signal that comes with it. In a step: the next line of metrics.jsonl does not fit."""
        metrics = self.checkpoints.parent / "metrics.jsonl"
        room = _SHARD_BYTES if fault.save is not None else metrics.stat().st_size + 10 if metrics.exists() else 10
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def flip_a_bit(model: Any) -> str:
    """The lowest bit of one element of a weight that every rank has a copy of; its name."""
    import torch

    from moe_dist.parallel.sharding import spec_of

    name, param = next((n, p) for n, p in model.named_parameters() if spec_of(p).shard == "replicated")
    bits = {2: torch.int16, 4: torch.int32}[param.element_size()]
    param.data.view(-1).view(bits)[0] ^= 1
    return str(name)


def _wrap(owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    setattr(owner, name, around(getattr(owner, name)))


def main(argv: Sequence[str]) -> None:
    from moe_dist.config.parse import parse_as

    path = Path(argv[0])
    plan = parse_as(Plan, json.loads(path.read_text(encoding="utf-8")), str(path))
    Injector(plan, int(os.environ["RANK"])).arm()
    sys.argv = ["moe-dist", *argv[1:]]
    runpy.run_module("moe_dist.cli", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
