"""`moe-dist study submit`: the points of a study that have not finished, as job arrays of slurm/study.sbatch.

    $ moe-dist study submit STUDY.yaml --at-once 8 -- --gpus-per-node=1
    job 4711: points 0-3,7 of capacity-cpu, at most 8 at once

Slurm numbers the tasks of an array from 0 to MaxArraySize - 1, and a study may have more points: what lies beyond goes
into arrays of its own, which start from an offset. They wait for one another, and the first for those that were handed
in before and are not done, so that no more points run at once than asked for. Which jobs have which points is in
jobs.jsonl in the study's folder: points that wait or run in one of them are not handed in again.
"""

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from moe_dist.cluster.sbatch import (
    file_pattern,
    flags,
    hand_in,
    refuse_control_characters,
    refuse_without_sbatch,
    repository,
)
from moe_dist.disk import locked, replace_text
from moe_dist.parallel.slurm import ask
from moe_dist.study.design.grid import Scalar, Study
from moe_dist.study.ledger.ledger import Ledger
from moe_dist.study.run.whereabouts import remember

_SCRIPT = Path("slurm/study.sbatch")


@dataclass(frozen=True, slots=True)
class Array:
    """One call of sbatch: the points `offset` + each of `tasks`."""

    offset: int
    tasks: tuple[int, ...]

    @property
    def points(self) -> list[int]:
        return [self.offset + task for task in self.tasks]


def submit(study: Study, at_once: int | None, dry_run: bool, options: Sequence[str]) -> int:
    """Returns the exit code: 0 handed in, or nothing was left to do. options: of sbatch, after those of the study.

    Raises ValueError outside the repository, without Slurm, and when all points left are in its queue already.
    """
    if at_once is not None and at_once < 1:
        raise ValueError(f"--at-once {at_once} is below 1; say how many points may run at a time")
    refuse_without_sbatch(f"moe-dist study run {study.path}")
    root, latest = repository(_SCRIPT), Ledger(study.ledger).latest()
    remember(study)
    left = [each.index for each in study.points if latest.get(each.name, {}).get("status") != "finished"]
    if not left:
        print(f"{study.file.name}: all {len(study.points)} points have finished; moe-dist study report {study.path}")
        return 0
    with locked(study.folder / "jobs.lock"):  # of two at the same moment, one sees what the other has handed in
        handed_in = queued(_jobs(study))
        new = [index for index in left if index not in handed_in]
        for job, points in _by_job(handed_in, left):
            print(f"job {job}: points {ranges(points)} wait or run already, and are not handed in again")
        if not new:
            raise ValueError(
                f"all {len(left)} points left wait or run already; to hand them in anew, scancel their job"
            )
        handed, before = list[str](), list(dict.fromkeys(handed_in.values()))
        limit = study.file.at_once if at_once is None else at_once
        for array in arrays(new, max_array_size()):
            command = sbatch_command(study, root, array, limit, before, options)
            refuse_control_characters(command)
            if dry_run:
                print(shlex.join(command))
                before = ["THE_JOB_BEFORE"]
                continue
            before = [_hand_in(study, root, command, array)]
            handed += before
            print(f"job {handed[-1]}: points {ranges(array.points)} of {study.file.name}, at most {limit} at once")
    if not dry_run:
        print(f"  squeue --array --jobs={','.join(handed)}        which of them wait or run")
        print(f"  moe-dist watch {study.path}        how far they are; {study.folder}/slurm has what each task says")
    return 0


def arrays(points: Sequence[int], size: int) -> list[Array]:
    """size: Slurm's MaxArraySize, one more than the highest number of a task.

    >>> arrays([0, 2, 1001, 2500], 1001)
    [Array(offset=0, tasks=(0, 2)), Array(offset=1001, tasks=(0,)), Array(offset=2002, tasks=(498,))]
    """
    parts = groupby(sorted(points), key=lambda index: index // size)
    return [Array(part * size, tuple(index - part * size for index in indices)) for part, indices in parts]


def ranges(numbers: Iterable[int]) -> str:
    """As sbatch --array takes them.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2,5,7-8'
    """
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][-1] == number - 1:
            found[-1] = [found[-1][0], number]
        else:
            found.append([number])
    return ",".join("-".join(map(str, ends)) for ends in found)


def sbatch_command(
    study: Study, root: Path, array: Array, at_once: int, after: Sequence[str], options: Sequence[str]
) -> list[str]:
    """Later options win in sbatch: ours, the study's, those of the command line; but what the array is, is ours. after:
    jobs that have to end first."""
    own: dict[str, Scalar] = {
        "job-name": study.file.name,
        "output": f"{file_pattern(study.folder.absolute())}/slurm/%A_%a.out",
    }
    command = ["sbatch", *flags(own | study.file.slurm), *options, "--parsable"]
    command.append(f"--array={ranges(array.tasks)}%{at_once}")
    if after:
        command.append(f"--dependency=afterany:{':'.join(after)}")
    return [*command, str(root / _SCRIPT), str(study.path.absolute()), *([str(array.offset)] if array.offset else [])]


def max_array_size() -> int:
    """Raises ValueError where Slurm takes no arrays."""
    said = ask("scontrol", "show", "config")
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", said, re.MULTILINE)
    if found is None or int(found[1]) < 2:
        raise ValueError(f"this Slurm takes no job arrays (MaxArraySize {found[1] if found else 'is not told'})")
    return int(found[1])


def queued(jobs: Sequence[dict[str, Any]]) -> dict[int, str]:
    """The points that wait or run, each with its job. jobs: lines of jobs.jsonl."""
    by_number = {job["job"]: job for job in jobs}
    if not by_number:
        return {}
    try:
        said = ask("squeue", "--noheader", "--array", "--format=%F %K", f"--jobs={','.join(by_number)}")
    except ValueError as error:
        if "Invalid job id" not in str(error):  # it has forgotten them all
            raise
        return {}
    tasks = [line.split() for line in said.splitlines()]
    return {by_number[job]["offset"] + int(task): job for job, task in tasks if job in by_number and task.isdigit()}


def _hand_in(study: Study, root: Path, command: Sequence[str], array: Array) -> str:
    """The number of the job."""
    (study.folder / "slurm").mkdir(parents=True, exist_ok=True)
    job = hand_in(command, root)
    jobs = [*_jobs(study), {"job": job, "offset": array.offset, "points": array.points}]
    replace_text(study.folder / "jobs.jsonl", "".join(json.dumps(each) + "\n" for each in jobs))
    return job


def _jobs(study: Study) -> list[dict[str, Any]]:
    path = study.folder / "jobs.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _by_job(handed_in: dict[int, str], left: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
    jobs = {index: handed_in[index] for index in left if index in handed_in}
    for job in dict.fromkeys(jobs.values()):
        yield job, [index for index in jobs if jobs[index] == job]
