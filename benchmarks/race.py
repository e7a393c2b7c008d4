"""What the benchmarks share: contestants that take turns, the launch scripts' environment, names of what ran."""

import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LAUNCH_ENV = Path(__file__).resolve().parents[1] / "launch/env.sh"


def race(
    contestants: dict[str, Callable[[Any], Any]], draw: Callable[[], Any], steps: int, warm_up: int
) -> dict[str, float]:
    """Median seconds of a step of each contestant.

    They take turns, so a slower moment of the machine meets all of them; all get the same input, a new one each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(warm_up + steps):
        drawn = draw()
        for name, step in contestants.items():
            _wait()
            start = time.perf_counter()
            step(drawn)
            _wait()
            if index >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def restart_like_a_launch_script() -> None:
    """malloc is set when a process starts: begin again with launch/env.sh, for all contestants alike."""
    if os.environ.get("BENCHMARK_ENV") != "ready":
        script = 'source "$0" && BENCHMARK_ENV=ready exec "$@"'
        os.execvp("bash", ["bash", "-c", script, str(LAUNCH_ENV), sys.executable, *sys.argv])


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()


def versions(*packages: str) -> dict[str, str]:
    """Installed versions; what is not installed is left out."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def profile(step: Callable[[Any], Any], draw: Callable[[], Any]) -> None:
    """Print where one contestant's time goes."""
    inputs = [draw() for _ in range(3)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for drawn in inputs:
            step(drawn)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50))
