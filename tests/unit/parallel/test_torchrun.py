"""The launcher says which rank came to which end."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from moe_dist.parallel.torchrun import described

HOST = socket.gethostname()
ROOT = Path(__file__).parents[3]
PROGRAM = """
import os, time
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), 9)
time.sleep(60)
"""


def launched(tmp_path: Path, program: str, **told: str) -> subprocess.Popen[str]:
    (tmp_path / "program.py").write_text(program)
    command = [
        sys.executable,
        "-m",
        "moe_dist.parallel.torchrun",
        "--nproc_per_node",
        "2",
        str(tmp_path / "program.py"),
    ]
    environ = os.environ | {"PYTHONPATH": str(ROOT)} | told
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_rank_is_named_in_one_line(tmp_path: Path) -> None:
    launcher = launched(tmp_path, PROGRAM)
    printed, said = launcher.communicate(timeout=60)
    assert launcher.returncode == 1 and printed == ""
    assert said == (
        f"moe-dist: rank 1 on {HOST} died of signal 9 (SIGKILL): by the system for want of memory, or by hand\n"
    )


def test_a_signal_is_passed_on_and_told_in_one_line(tmp_path: Path) -> None:
    """Before there are ranks to pass it on to, and when there are."""
    ready = "import os, time; os.environ['RANK'] == '0' and print('ready', flush=True); time.sleep(60)"
    launcher = launched(tmp_path, ready)
    assert launcher.stdout is not None and launcher.stdout.readline() == "ready\n"
    launcher.send_signal(signal.SIGTERM)
    _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == 1 and said == "moe-dist: SIGTERM, passed on to all ranks\n", said


STOPPED = """
import os, signal
from moe_dist.parallel.launch import rank_from_environment, start
start(rank_from_environment(os.environ), "cpu")
print(os.getpid(), flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_ranks_that_stand_still_end_with_their_launcher(tmp_path: Path) -> None:
    """Who ends the launcher, as Slurm does, cannot reach them: each has a session of its own."""
    launcher = launched(tmp_path, STOPPED)
    assert launcher.stdout is not None
    ranks = [int(launcher.stdout.readline()) for _ in range(2)]
    launcher.kill()
    try:
        launcher.communicate(timeout=60)  # ranks hold the pipe too
        assert not any(map(runs, ranks))
    finally:
        for rank in filter(runs, ranks):
            os.kill(rank, signal.SIGKILL)


def runs(pid: int) -> bool:
    """Whether there is such a process, which has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ends(**codes: int) -> list[str]:
    failures = {int(rank.removeprefix("r")): SimpleNamespace(exitcode=code) for rank, code in codes.items()}
    return described(failures)  # type: ignore[arg-type]


def test_who_ended_the_others_comes_first() -> None:
    assert ends(r0=2, r1=2, r3=2) == [f"moe-dist: ranks 0, 1, 3 on {HOST} ended with exit code 2"]
    assert ends(r0=-15, r1=1, r2=-11) == [
        f"moe-dist: rank 2 on {HOST} died of signal 11 (SIGSEGV)",
        f"moe-dist: rank 1 on {HOST} ended with exit code 1",
    ]
    assert ends(r0=75) == [f"moe-dist: rank 0 on {HOST} saved and stopped (exit code 75): run it again to go on"]
    assert ends(r0=75, r1=1)[0] == f"moe-dist: rank 1 on {HOST} ended with exit code 1"
    assert ends(r0=-15, r1=-15) == [f"moe-dist: ranks 0, 1 on {HOST} died of signal 15 (SIGTERM)"]


SPEAKING = """
import os, sys, time
rank, logs = os.environ["RANK"], os.environ["MOE_DIST_RANK_LOGS"]
print("rank", rank, "speaks", file=sys.stderr, flush=True)
while rank == "1" and not os.path.getsize(logs + "/rank-00000.err"):
    time.sleep(0.1)
if rank == "1":
    os.kill(os.getpid(), 9)
time.sleep(60)
"""


def test_the_ends_of_ranks_and_what_they_say_are_kept_for_who_started_the_launcher(tmp_path: Path) -> None:
    logs, ends = tmp_path / "logs", tmp_path / "ends"
    logs.mkdir()
    ends.mkdir()
    told = {"MOE_DIST_ENDS": str(ends), "MOE_DIST_RANK_LOGS": str(logs), "SLURMD_NODENAME": "node7"}
    launcher = launched(tmp_path, SPEAKING, **told)
    _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    assert json.loads((ends / "node7.json").read_text())["1"] == -signal.SIGKILL
    assert [(logs / f"rank-0000{rank}.err").read_text() for rank in range(2)] == ["rank 0 speaks\n", "rank 1 speaks\n"]
    assert "[rank 1] rank 1 speaks\n" in said and f"rank 1 on {HOST} died of signal 9" in said
