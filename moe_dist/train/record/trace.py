"""`moe-dist train --profile steps=10-12`: what these steps did, call by call, and what memory they held.

Of each rank, in profile/ of the run's folder:

| file                     | what                                                                                      |
|--------------------------|-------------------------------------------------------------------------------------------|
| rank-00000.json          | a Chrome trace for ui.perfetto.dev: calls on the host and kernels on a GPU, with a span   |
|                          | `step N` around each step and a counter `memory` of what torch held on each device        |
| rank-00000-memory.pickle | on a GPU, each allocation and where it was made, for docs.pytorch.org/memory_viz          |

The steps themselves are slower while they are looked at; before and after them nothing is.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile, record_function

FOLDER = "profile"
_MEMORY_EVENTS = 200_000


def profiled_steps(text: str | None, steps: int) -> range:
    """Of --profile, counted from 1; none for None. Raises ValueError when they are not steps of a run of `steps`."""
    if text is None:
        return range(0)
    found = re.fullmatch(r"steps=(\d+)(?:-(\d+))?", text, re.ASCII)
    if found is None:
        raise ValueError(f"--profile {text} is not of the form steps=10-12 or steps=10")
    first, last = int(found[1]), int(found[2] or found[1])
    if not 1 <= first <= last <= steps:
        raise ValueError(f"--profile {text} must name steps from 1 to train.steps={steps}, the first one first")
    return range(first, last + 1)


class StepProfiler:
    """Use as a context around the run, and `around` for each step: what came of the steps until then is written when it
    ends. begin: steps done before this start. say: takes a line."""

    def __init__(
        self, run: Path, rank: int, device: torch.device, steps: range, begin: int, say: Callable[[str], None]
    ) -> None:
        self.path, self.on_gpu, self.say = run / FOLDER / f"rank-{rank:05d}.json", device.type == "cuda", say
        self.steps = range(max(steps.start, begin + 1), steps.stop)
        self._profile: profile | None = None
        if steps and not self.steps:
            say(f"profile: nothing, steps {steps[0]} to {steps[-1]} are done already")

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Step `step`, counted from 1. A second time, after the run went back, it is not profiled."""
        if step not in self.steps:
            yield
            return
        if self._profile is None:
            self._begin()
        with record_function(f"step {step}"):
            yield
        if step == self.steps[-1]:
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._profile is not None:
            self._end()

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        if self.on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profile.start()

    def _end(self) -> None:
        assert self._profile is not None
        done, self._profile, self.steps = self._profile, None, range(0)
        done.stop()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.on_gpu:
                torch.cuda.memory._dump_snapshot(str(self.path.with_name(f"{self.path.stem}-memory.pickle")))
                torch.cuda.memory._record_memory_history(enabled=None)
            done.export_chrome_trace(str(self.path))
            _draw_memory(self.path)
        except (OSError, RuntimeError, ValueError) as error:  # nobody ends a run for it
            self.say(f"warning: {self.path} is not written: {error}")


def _draw_memory(path: Path) -> None:
    """Counters, which viewers draw, beside the profiler's notes of allocations, which they list."""
    trace: dict[str, Any] = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    events: list[dict[str, Any]] = trace["traceEvents"]
    for event in [event for event in events if event.get("name") == "[memory]"]:
        told = event["args"]
        device = "GPU" if told.get("Device Type") == 1 else "host"
        counter = {
            "ph": "C",
            "cat": "memory",
            "name": f"memory of the {device}",
            "ts": event["ts"],
            "pid": event["pid"],
        }
        events.append(counter | {"args": {"bytes": told.get("Total Allocated", 0)}})
    path.write_text(json.dumps(trace), encoding="utf-8")
