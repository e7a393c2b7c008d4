"""`moe-dist watch`: a run or a study in the terminal while it runs. Reads its files alone, so it may start and end at
any time and from any machine that sees them. Light for a run: no torch.

    run     the loss over the steps, drop rate, load of each expert in the last step, time of a step, time left
    study   the table of `moe-dist study run`, whoever runs the points
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from moe_dist.config.flags import Parser
from moe_dist.config.load import load_config
from moe_dist.config.read import read_yaml
from moe_dist.config.values import user_path
from moe_dist.disk import is_locked
from moe_dist.process import output_never_fatal
from moe_dist.study.design.grid import Study, load_study
from moe_dist.study.ledger.ledger import Ledger
from moe_dist.study.ledger.lines import Lines
from moe_dist.study.run.live import Standing
from moe_dist.study.run.plot import bars, curve
from moe_dist.study.run.whereabouts import is_study_folder, lock_of, study_of
from moe_dist.train.record.progress import duration, smoothed
from moe_dist.train.record.status import FILE, folders_with, status_now

_ABOUT = """Show a run or a study in the terminal until it ends: loss curve, drop rate, load of the experts, step time
and time left of a run; the points of a study.

Takes the folder of a run, its configuration, STUDY.yaml or the folder of a study; without one, the newest run under
runs/. Where standard output is no terminal, a line each time that there is something new. Ctrl-C leaves, and the run
goes on.
"""
_EVERY, _EVERY_LINE = 1.0, 10.0  # seconds between frames, and between lines where there is no terminal
_KEPT = 4096  # points of a curve; of longer runs every second, fourth, ... step
_WIDEST = 100

Frame = Callable[[int, bool], tuple[RenderableType, str, bool]]
"""(width, without Unicode) -> what to show, in one line, whether it has ended."""


def watch(args: Sequence[str]) -> int:
    """Returns the exit code: 0 when what is watched has ended, or Ctrl-C came."""
    options = _parser().parse_args(list(args))
    frame = _frames(newest_run(Path("runs")) if options.what is None else options.what)
    with suppress(KeyboardInterrupt), output_never_fatal():
        console = Console()
        plain = not console.encoding.lower().startswith("utf")
        if options.once or not console.is_interactive:
            _print(console, frame, plain, options.once)
        else:
            with Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live:
                ended = False
                while not ended:
                    shown, _, ended = frame(min(_WIDEST, console.width), plain)
                    live.update(shown, refresh=True)
                    if not ended:
                        time.sleep(_EVERY)
    return 0


def newest_run(root: Path) -> Path:
    """The run under `root` whose status was written last. Raises ValueError when there is none."""
    found = [folder for folder in folders_with(root, FILE) if (folder / "config.yaml").exists()]
    if not found:
        raise ValueError(f"no run under {root.absolute()}; name one: moe-dist watch root/NAME")
    return max(found, key=lambda folder: max((folder / name).stat().st_mtime for name in (FILE, "config.yaml")))


@dataclass(slots=True)
class History:
    """What a run's metrics.jsonl says so far. Curves are of (step, value)."""

    last: dict[str, Any] = field(default_factory=dict)
    loss: list[tuple[float, float]] = field(default_factory=list)
    validation: list[tuple[float, float]] = field(default_factory=list)
    drops: list[tuple[float, float]] = field(default_factory=list)
    pace: float | None = None
    seen: int = 0
    stride: int = 1

    def add(self, lines: Iterable[bytes]) -> None:
        """Of a long run, what is not drawn is not even parsed; but the last line is."""
        skipped = None
        for line in lines:
            skipped = line if self.seen % self.stride and b'"validation_loss"' not in line else None
            self.seen += 1
            if skipped is None:
                self._take(line)
        if skipped is not None:
            self._take(skipped)

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
        except ValueError:  # a machine went down; the run itself says so when it goes on
            return
        if len(self.loss) >= _KEPT:
            self.stride *= 2
            del self.loss[1::2], self.drops[1::2]
        self.last = record
        for name, points in (("loss", self.loss), ("validation_loss", self.validation), ("drop_rate", self.drops)):
            if record.get(name) is not None:
                points.append((record["step"], record[name]))
        if record.get("step_seconds") is not None:
            self.pace = smoothed(self.pace, record["step_seconds"])


class RunFrames:
    """Frames of one run; reads what its metrics.jsonl has gained since the last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps = load_config(folder / "config.yaml").train.steps
        self._lines, self._history = Lines(folder / "metrics.jsonl"), History()

    def __call__(self, width: int, plain: bool) -> tuple[RenderableType, str, bool]:
        another, lines = self._lines.all_new()
        if another:
            self._history = History()
        self._history.add(lines)
        status = status_now(self.folder)
        line = self._line(status)
        drawn = [*self._curves(width, plain), *self._loads(width, plain)]
        shown = Group(Text(line), *(Text(part, no_wrap=True) for part in drawn))
        return shown, line, status["state"] not in ("none", "running")

    def _line(self, status: dict[str, Any]) -> str:
        history, last = self._history, self._history.last
        words = [str(self.folder), status["state"], f"step {last.get('step', 0)}/{self.steps}"]
        if last.get("loss") is not None:
            words.append(f"loss {last['loss']:.4f}")
        if history.validation:
            words.append(f"validation {history.validation[-1][1]:.4f}")
        if last.get("drop_rate") is not None:
            words.append(f"dropped {last['drop_rate']:.1%}")
        if history.pace is not None:
            words.append(f"{1e3 * history.pace:.1f} ms a step")
            if status["state"] == "running":
                words.append(f"left {duration(history.pace * (self.steps - last['step']))}")
        if "reason" in status:
            words.append(" ".join(str(status["reason"]).split()))
        return "  ".join(words)

    def _curves(self, width: int, plain: bool) -> list[str]:
        parts, history = [], self._history
        for title, points, height in (
            ("training loss", history.loss, 10),
            ("validation loss", history.validation, 4),
            ("drop rate", history.drops, 4),
        ):
            if len(points) > 1:
                parts += ["", title, *curve(points, width, height, plain)]
        return parts

    def _loads(self, width: int, plain: bool) -> list[str]:
        last = self._history.last
        layers = [layer for layer in last.get("layers", []) if sum(layer["load"])]
        if not layers:
            return []
        parts = ["", f"load of each expert, step {last['step']}, over the mean (full: 2)"]
        for layer in layers:
            load = layer["load"]
            over_mean = [count * len(load) / sum(load) for count in load]
            name = f"{layer['layer']:>3} {layer['kind']:<13}"
            told = f"{min(over_mean):.2f} to {max(over_mean):.2f}, dropped {layer['drop_rate']:.1%}"
            parts.append(f"{name}{bars(over_mean, 2.0, max(8, width - 46), plain)}  {told}")
        return parts


class StudyFrames:
    """Frames of a study."""

    def __init__(self, study: Study) -> None:
        self._study, self._ledger = study, Ledger(study.ledger)
        self._standing = Standing(study.points, self._ledger)
        self._ended = False

    def __call__(self, width: int, plain: bool) -> tuple[RenderableType, str, bool]:
        open_points = [point for point in self._study.points if not self._ledger.finished(point.name)]
        running = [point for point in open_points if is_locked(lock_of(point))]
        line, shown = self._standing.look(self._study.file.name, running, max(1, len(running)))
        before, self._ended = self._ended, not running and all(self._ledger.of(point.name) for point in open_points)
        return shown, line, before and self._ended  # a point that has failed may be about to be tried again


def _frames(what: Path) -> Frame:
    """Raises ValueError when it is neither a run nor a study."""
    if what.is_dir():
        if is_study_folder(what):
            return StudyFrames(study_of(what))
        if not (what / "config.yaml").exists():
            raise ValueError(f"{what} holds no config.yaml, so no run, and no study.json, so no study")
        return RunFrames(what)
    if "base" in read_yaml(what):
        return StudyFrames(load_study(what))
    folder = load_config(what).run.folder
    if not (folder / "config.yaml").exists():
        raise ValueError(f"{folder}: no such run yet; start it with moe-dist train {what}")
    return RunFrames(folder)


def _print(console: Console, frame: Frame, plain: bool, once: bool) -> None:
    """The whole frame in the end; before, a line when it is another one, but not too often."""
    said, at, ended = "", -_EVERY_LINE, once
    while True:
        shown, line, over = frame(min(_WIDEST, console.width), plain)
        ended = ended or over
        if ended:
            console.print(shown)
            return
        if line != said and time.monotonic() - at >= _EVERY_LINE:
            print(line, flush=True)
            said, at = line, time.monotonic()
        time.sleep(_EVERY)


def _parser() -> argparse.ArgumentParser:
    parser = Parser("moe-dist watch", _ABOUT)
    what = "as above (default: the newest run)"
    parser.add_argument("what", type=user_path, nargs="?", metavar="RUN|STUDY", help=what)
    parser.add_argument("--once", action="store_true", help="print what there is now, and leave")
    return parser
