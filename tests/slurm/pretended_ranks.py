"""In place of torchrun on one node of a job: counts steps as a run does on disk, in a hundredth of the time.

    MOE_DIST_PYTHON=SCRIPT, where SCRIPT runs this with `python -ES`: no torch, no moe_dist.

Node 0 writes status.json and metrics.jsonl, saves every tenth step, goes on from there, and saves when a signal asks
for it. All nodes watch one another's heartbeats, as ranks notice a peer that is gone. Files that a test puts into the
run's folder make it fail: die-K, node K notes a rank that died of SIGKILL; stall, node 0 ends with 77; slow, it waits.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

STEPS, TICK, TOGETHER, PATIENCE, START = 120, 0.1, 1.0, 8.0, 60.0  # all but the first in seconds
heard: list[tuple[int, float]] = []


def main(run: Path, node: int, nodes: int) -> int:
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda got, _: heard.append((got, time.time())))
    start = os.environ["MOE_DIST_RANK_LOGS"].rpartition("-")[2]
    step = begin(run) if node == 0 else 0
    began = time.time()
    while True:
        (run / f"beat-{start}-{node}").touch()
        if (run / f"die-{node}").exists():
            (run / f"die-{node}").unlink()
            noted = Path(os.environ["MOE_DIST_ENDS"], f"{os.environ['SLURMD_NODENAME']}.json")
            noted.write_text(json.dumps({node: -9}))
            return 1
        if (run / f"end-{start}").exists():
            return int((run / f"end-{start}").read_text() or 1)
        beats = [run / f"beat-{start}-{other}" for other in range(nodes)]
        oldest = min(beat.stat().st_mtime if beat.exists() else began + START for beat in beats)
        if time.time() - oldest > PATIENCE:
            if node == 0:
                status(run, state="failed", reason=f"RankLost: rank 0 lost another rank; last here: step {step}")
            return 1
        if node == 0:
            step = advance(run, step, start, oldest)
        elif heard:
            (run / f"heard-{start}").write_text(str(heard[0][0]))
        time.sleep(TICK)


def begin(run: Path) -> int:
    """From the newest checkpoint, with the records after it cut off."""
    saved = max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    metrics.write_text("".join(lines[:saved]))
    status(run, state="running")
    return saved


def advance(run: Path, step: int, start: str, oldest: float) -> int:
    """One step, or the end of this start, which all nodes see. oldest: when the last of them was heard of; none may be
    older than the signal when it saves."""
    told = run / f"heard-{start}"
    number = int(told.read_text() or 0) if told.exists() else 0
    if heard:
        number = heard[0][0]
        if oldest < heard[0][1]:
            return step
    if (run / "stall").exists():
        (run / "stall").unlink()
        status(run, state="failed", reason="rank 1 has made no progress for 9 s", code=77)
        (run / f"end-{start}").write_text("1")
    elif number or step == STEPS:
        (run / "checkpoints" / f"step-{step:06d}").mkdir(parents=True, exist_ok=True)
        ended = {"state": "preempted", "signal": signal.Signals(number).name} if number else {"state": "finished"}
        status(run, step=step, **ended)
        (run / f"end-{start}").write_text("1" if number else "0")
    elif time.time() > oldest > time.time() - TOGETHER and not (run / "slow").exists():
        step += 1
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "loss": 1 / step, "step_seconds": TICK}) + "\n")
        if step % 10 == 0:
            (run / "checkpoints" / f"step-{step:06d}").mkdir(parents=True, exist_ok=True)
    return step


def status(run: Path, **told: object) -> None:
    draft = run / "status.draft"
    draft.write_text(json.dumps(told))
    draft.replace(run / "status.json")


if __name__ == "__main__":
    # A step that has the nodes 1 and 3 of a job numbers them 0 and 1.
    sys.exit(main(Path(os.environ["MOE_DIST_ENDS"]).parent, int(os.environ["SLURM_NODEID"]), int(os.environ["NNODES"])))
