"""`moe-dist chaos`: faults, the reference, the verdict."""

import argparse
import json
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_dist.chaos.draw import Pace
from moe_dist.chaos.fault import Fault
from moe_dist.chaos.harass import Attack, Harassment, leftovers, under_watch
from moe_dist.chaos.judge import losses
from moe_dist.chaos.series import Series, Start
from moe_dist.config import Config, validate
from moe_dist.disk import replace_text
from moe_dist.process import output_never_fatal
from moe_dist.train.exit_codes import DONE, SAVED

_WARM_UP = 5  # steps after which a process should have all that it needs


def chaos(own: argparse.Namespace) -> int:
    """own: of chaos_arguments. Returns the exit code: 0 when nothing was lost and all ended as it should, else 1.

    Raises ValueError for what a user got wrong.
    """
    with output_never_fatal():  # what it found is in chaos.json too
        return _chaos(own.config, own.minutes, own.ranks, own.seed)


def _chaos(config: Config, minutes: float, ranks: int, seed: int) -> int:
    if not 0 < minutes < 10_000:
        raise ValueError(f"--minutes={minutes:g} must be above 0 and below 10000")
    if not 1 <= ranks <= 64:
        raise ValueError(f"--ranks={ranks} must be from 1 to 64: all run on this machine")
    config, changed = under_watch(config, ranks)
    validate(config, ranks)
    room = Pace().reach(config.run.save_every) + 2 * config.run.save_every
    if config.train.steps < room:
        raise ValueError(f"train.steps={config.train.steps} leaves no room for a fault: make it {room} at least")
    console = Console()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    broken, reference = both(config, ranks)
    say(f"faults for {minutes:g} minutes against {broken.run}, on {ranks} ranks; changed: {', '.join(changed)}")
    with _ended_like_ctrl_c():
        harassment = Harassment(broken, seed, say)
        step = harassment.run(minutes)
        if not step:
            say(f"LOST: no whole checkpoint is left in {broken.checkpoints}")
            return 1
        say(f"the same without faults, to step {step}: {reference.run}")
        undisturbed(reference, step)
    report = judged(harassment, reference, step) | {"seed": seed, "minutes": minutes}
    replace_text(broken.run / "chaos.json", json.dumps(report, indent=1))
    show(report, console)
    return 0 if not report["lost"] and not report["problems"] else 1


def both(config: Config, ranks: int) -> list[Series]:
    """The run to break, and its reference. Raises ValueError when the folder of either holds anything."""
    configs = [replace(config, run=replace(config.run, name=f"{config.run.name}-{s}")) for s in ("chaos", "reference")]
    folders = [each.run.folder for each in configs]
    for folder in folders:
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty: remove it, or choose another --run.name")
    return [Series(each, folder / "starts", ranks) for each, folder in zip(configs, folders, strict=True)]


def undisturbed(reference: Series, step: int) -> Start:
    """The run without faults, to the checkpoint of `step`: a signal in that step makes it save there and leave."""
    last = step == reference.config.train.steps
    faults = [] if last else [Fault(kind="term", rank=0, step=step, phase="update")]
    start = reference.start(faults, seconds=24 * 3600)
    if start.codes != [DONE if last else SAVED] * reference.world:
        raise ValueError(f"the run without faults ended with codes {start.codes}: see {start.log}")
    return start


def judged(harassment: Harassment, reference: Series, step: int) -> dict[str, Any]:
    """The whole report, as plain data."""
    series, attacks = harassment.series, harassment.attacks
    starts, whole = series.starts, reference.starts[0]
    taken = max(end.time for end in starts[-1].ends) - starts[0].began
    needed = max(end.time for end in whole.ends) - whole.began
    ready = [attack.ready for attack in attacks[1:] if attack.ready is not None]
    grown = [growth for start in starts for growth in _growth(start)]
    survived = Counter(attack.kind for attack in attacks if attack.kind and attack.came and not attack.problems)
    return {
        "run": str(series.run),
        "ranks": series.world,
        "step": step,
        "survived": dict(sorted(survived.items())),
        "lost": losses(series, reference, step),
        "problems": [f"start {n}: {problem}" for n, a in enumerate(attacks, 1) for problem in a.problems],
        "steps_trained_again": sum(attack.lost for attack in attacks),
        "steps_again_per_fault": sum(attack.lost for attack in attacks) / max(1, survived.total()),
        "seconds": taken,
        "reference_seconds": needed,
        "goodput": needed / taken,
        "restart_seconds": median(ready) if ready else None,
        "memory_growth_bytes": max((memory for memory, _ in grown), default=None),
        "open_files_growth": max((files for _, files in grown), default=None),
        "leftover_files": leftovers(series.run),
        "starts": [_told(attack) for attack in attacks],
    }


def _told(attack: Attack) -> dict[str, Any]:
    return asdict(attack) | {"faults": [str(fault) for fault in attack.faults]}


def _growth(start: Start) -> Iterator[tuple[int, int]]:
    """Of each rank that lived long enough, from its first steps to its end: resident bytes and open files."""
    for rank, end in enumerate(start.ends):
        updates = start.noted(rank, "phase", phase="update")
        if len(updates) > _WARM_UP:
            seen = [usage for usage in end.usage if usage.memory and usage.time >= updates[_WARM_UP]["time"]]
            if len(seen) > 1:
                yield seen[-1].memory - seen[0].memory, seen[-1].files - seen[0].files


def show(report: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{report['run']}, {report['step']} steps", show_header=False)
    memory, files = report["memory_growth_bytes"], report["open_files_growth"]
    rows = {
        "faults survived": ", ".join(f"{kind} {count}" for kind, count in report["survived"].items()) or "none",
        "steps trained again": f"{report['steps_trained_again']}, {report['steps_again_per_fault']:.1f} a fault",
        "goodput": f"{report['goodput']:.1%}: {report['reference_seconds']:.0f} s without faults, "
        f"{report['seconds']:.0f} s with",
        "restart": "unknown" if report["restart_seconds"] is None else f"{report['restart_seconds']:.1f} s to a step",
        "growth within a start": "no start was long enough"
        if memory is None
        else f"at most {memory / 2**20:.1f} MiB and {files} open files a rank",
        "left over": ", ".join(report["leftover_files"]) or "nothing",
        "lost": "NOTHING: weights, moments, metrics and samples are those of the run without faults"
        if not report["lost"]
        else "\n".join(report["lost"]),
    }
    if report["problems"]:
        rows["problems"] = "\n".join(report["problems"])
    for name, text in rows.items():
        table.add_row(name, text)
    console.print(table, markup=False, highlight=False)


@contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """So that SIGTERM and a terminal that is closed, too, leave no rank behind."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    heard = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]  # nohup ignores it
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
