"""What a person sees of a study that runs: a live table on a terminal, plain lines elsewhere. Light until asked for the
time left, which needs the FLOPs of each point (models/flops.py).

Time left: a point takes as many seconds for a FLOP as the finished ones did on average, or while there are none, as the
running ones do; a running one goes on at the pace of its last steps. Start-up, evaluations and saves are counted where
this process has seen a point from its start to its end.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from moe_dist.study.design.grid import Point, Study
from moe_dist.study.ledger.ledger import Ledger
from moe_dist.train.record.history import last_record
from moe_dist.train.record.progress import duration, smoothed

_EVERY = 1.0  # seconds between frames
_ROWS = 20  # of running points that are shown


@dataclass(frozen=True, slots=True)
class Row:
    """A running point, as its metrics.jsonl has it. step_seconds: smoothed over the looks at it; None before a step."""

    point: Point
    step: int
    loss: float | None
    step_seconds: float | None

    @property
    def steps(self) -> int:
        return self.point.config.train.steps

    @property
    def left(self) -> float | None:
        return None if self.step_seconds is None else self.step_seconds * (self.steps - self.step)


class Standing:
    """How far `points` are, cheap enough to ask every second: the end of a file for each that runs."""

    def __init__(self, points: Sequence[Point], ledger: Ledger) -> None:
        self.points, self.ledger = points, ledger
        self._paces: dict[str, float] = {}
        self._work: dict[str, float] = {}
        self._besides: list[float] = []

    def took(self, point: Point, seconds: float) -> None:
        """A finished point, by the clock."""
        record = self.ledger.of(point.name) or {}
        self._besides.append(max(0.0, seconds - float(record.get("seconds", seconds))))

    def look(self, name: str, running: Sequence[Point], at_once: int) -> tuple[str, Group]:
        """A line of the whole study; it, and a table of the running points."""
        latest, rows = self.ledger.latest(), [self._row(point) for point in running]
        self._work = self._work or {point.name: work(point) for point in self.points}
        besides = fmean(self._besides) if self._besides else 0.0
        seconds = left_seconds(self._work, latest, rows, at_once, besides)
        line = headline(name, self.points, latest, rows, seconds)
        if not rows:
            return line, Group(Text(line))
        table = Table(box=None, pad_edge=False)
        for title in ("running", "step", "loss", "ms a step", "left"):
            table.add_column(title, justify="left" if title == "running" else "right")
        for row in rows[:_ROWS]:
            cells = [f"{row.step}/{row.steps}", "" if row.loss is None else f"{row.loss:.4f}"]
            cells.append("" if row.step_seconds is None else f"{1e3 * row.step_seconds:.1f}")
            cells.append("" if row.left is None else duration(row.left))
            table.add_row(Text(row.point.name), *cells)
        more = [Text(f"and {len(rows) - _ROWS} more")] if len(rows) > _ROWS else []
        return line, Group(Text(line), table, *more)

    def _row(self, point: Point) -> Row:
        record = last_record(point.run)
        seconds = record.get("step_seconds")
        if seconds is not None:
            self._paces[point.name] = smoothed(self._paces.get(point.name), seconds)
        return Row(point, record.get("step", 0), record.get("loss"), self._paces.get(point.name))


class Screen:
    """Lines as they come, above a live table on a terminal. A context manager."""

    def __init__(self, study: Study, ledger: Ledger, points: Sequence[Point], at_once: int) -> None:
        self._standing, self._name, self._at_once = Standing(points, ledger), study.file.name, at_once
        self._said: set[str] = set()
        self._console = Console()
        self._shown = -_EVERY
        self._live: Live | None = None
        if self._console.is_interactive:
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        if self._live is None:
            print(text, flush=True)
        else:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    def took(self, point: Point, seconds: float) -> None:
        """A point has finished that ran from its start to its end within so many seconds."""
        self._standing.took(point, seconds)

    def show(self, running: Sequence[Point]) -> None:
        """Draw the table anew, unless that was within the last second."""
        now = time.monotonic()
        if self._live is not None and now - self._shown >= _EVERY:
            self._shown = now
            _, shown = self._standing.look(self._name, running, self._at_once)
            self._live.update(shown, refresh=True)


def headline(
    name: str,
    points: Sequence[Point],
    latest: Mapping[str, dict[str, Any]],
    rows: Sequence[Row],
    seconds: float | None,
) -> str:
    """`capacity-cpu  12 of 40 finished, 1 failed, 2 running, 25 left  time left 35m12s`"""
    running = {row.point.name for row in rows}
    states = [latest.get(point.name, {}).get("status") for point in points if point.name not in running]
    finished, failed = states.count("finished"), states.count("failed")
    counts = [f"{finished} of {len(points)} finished", *([f"{failed} failed"] if failed else [])]
    counts += [f"{len(rows)} running", f"{len(states) - finished - failed} left"]
    return f"{name}  {', '.join(counts)}" + ("" if seconds is None else f"  time left {duration(seconds)}")


def work(point: Point) -> float:
    """FLOPs of the whole run, what is dropped included."""
    from moe_dist.models.flops import classifier_flops_per_token, train_flops_per_token

    config, train = point.config, point.config.train
    of_token = classifier_flops_per_token if config.task == "classification" else train_flops_per_token
    return of_token(config.model, train.seq_len) * train.seq_len * train.global_batch * train.steps


def left_seconds(
    work: Mapping[str, float],
    latest: Mapping[str, dict[str, Any]],
    rows: Sequence[Row],
    at_once: int,
    besides: float = 0.0,
) -> float | None:
    """work: of every point by its name; besides: seconds that a point takes beside its steps. None while nothing tells.

    (what the running ones have left + what the others have to do) / at_once, at least as long as the longest running
    """
    finished = [name for name in work if latest.get(name, {}).get("status") == "finished"]
    running = {row.point.name: row for row in rows}
    seen = [(row.step_seconds * row.steps, work[name]) for name, row in running.items() if row.step_seconds is not None]
    seen = [(float(latest[name]["seconds"]), work[name]) for name in finished] or seen
    flops = sum(flops for _, flops in seen)
    if flops == 0:
        return None
    pace = sum(seconds for seconds, _ in seen) / flops
    others = [flops for name, flops in work.items() if name not in running and name not in finished]
    waiting = pace * sum(others) + besides * len(others)
    lefts = [pace * work[name] if row.left is None else row.left for name, row in running.items()]
    return max((waiting + sum(lefts)) / at_once, *lefts, 0.0)
