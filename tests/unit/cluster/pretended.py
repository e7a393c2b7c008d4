"""Commands of Slurm that pretend: each writes down what it was called with, and answers what a test has put there."""

import json
import os
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[3]
_SCRIPT = """#!/bin/bash
tools={tools}
{{ printf '%s\x1f' "$@"; printf '\x1e'; }} >>"$tools/{name}.calls"
"""
_SRUN = """
if [[ "${@: -1}" == true ]]; then # is this node there?
  node=$(printf '%s\\n' "$@" | sed -n 's/^--nodelist=//p')
  ! grep -qx "$node" "$tools/dead"
  exit
fi
case "$*" in *moe_dist.cluster.keeper*) exec sleep 60 ;; esac
n=$(( $(cat "$tools/started") + 1 )); echo $n >"$tools/started"
env >"$tools/environ"
source "$tools/start-$n"
"""
_ANSWERS = {
    "sbatch": 'cat "$tools/job"',
    "squeue": """
case "$*" in
  *RestartCnt*) cat "$tools/requeues" ;;
  *%B*) cat "$tools/where" ;;
  *) cat "$tools/queue" ;;
esac
""",
    "sinfo": 'cat "$tools/nodes"',
    "scontrol": "true",
    "scancel": "true",
    "srun": _SRUN,
}


class Slurm:
    """Of a job 7 on nodes a, b and c, if nothing else is said."""

    def __init__(self, tools: Path, run: Path) -> None:
        self.tools, self.run = tools, run
        self.starts = 0
        tools.mkdir()
        for name, answer in _ANSWERS.items():
            script = _SCRIPT.format(tools=shlex.quote(str(tools)), name=name) + answer + "\n"
            (tools / name).write_text(script)
            (tools / name).chmod(0o755)
        self.say(job="41;cluster\n", queue="", requeues="0\n", started="0\n", dead="")
        self.say(where="a UNLIMITED a,b,c\n", nodes="a mixed\nb mixed\nc mixed\n")

    def say(self, **files: str) -> None:
        for name, text in files.items():
            (self.tools / name).write_text(text)

    def start(self, shell: str = "", leaves: int = 1, step: int | None = None, **status: object) -> None:
        """What the next start of the ranks does: logs `step`, writes `status`, runs `shell`, and srun `leaves` so."""
        self.starts += 1
        lines = [f"cd {shlex.quote(str(self.run))}"]
        if status:
            lines.append(f"printf %s {shlex.quote(json.dumps(status))} >status.json")
        if step is not None:
            lines.append(
                f"echo {shlex.quote(json.dumps({'step': step, 'loss': 2.0, 'step_seconds': 0.5}))} >>metrics.jsonl"
            )
        self.say(**{f"start-{self.starts}": "\n".join([*lines, shell, f"exit {leaves}"])})

    def calls(self, name: str) -> list[list[str]]:
        path = self.tools / f"{name}.calls"
        calls = path.read_text().split("\x1e")[:-1] if path.exists() else []
        return [call.split("\x1f")[:-1] for call in calls]

    def nodes_of_starts(self) -> list[str]:
        """Those that each start of the ranks was given."""
        steps = [call for call in self.calls("srun") if any(word.endswith("torchrun.sh") for word in call)]
        return [word.removeprefix("--nodelist=") for call in steps for word in call if word.startswith("--nodelist=")]

    def environ(self, **more: str) -> dict[str, str]:
        """Of the job's batch script."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MOE_DIST"))}
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a,b,c", "SLURM_JOB_NUM_NODES": "3", "SLURMD_NODENAME": "a"}
        return kept | {"PATH": f"{self.tools}:{os.environ['PATH']}"} | slurm | more
