"""What is in Slurm's queue. Light: no torch."""

from moe_dist.parallel.slurm import ask


def state_of(job: str) -> str | None:
    """PENDING, RUNNING, COMPLETING, ..., of an array that of one of its tasks; None for a job that has ended, or that
    Slurm does not know. Raises ValueError when Slurm does not say."""
    return states_of([job]).get(job)


def states_of(jobs: list[str]) -> dict[str, str]:
    """Of those that wait or run."""
    if not jobs:
        return {}
    try:
        said = ask("squeue", "--noheader", f"--jobs={','.join(jobs)}", "--format=%F %A %i %T")
    except ValueError as error:
        if "Invalid job id" in str(error):  # it has forgotten them all
            return {}
        raise
    found: dict[str, str] = {}
    for line in said.splitlines():
        *names, state = line.split()  # 12_3, the fourth of the array 12, is also the job 15, say
        found |= dict.fromkeys(names, state)
    return {job: found[job] for job in jobs if job in found}
