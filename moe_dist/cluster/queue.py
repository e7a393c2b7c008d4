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
        said = ask("squeue", "--noheader", f"--jobs={','.join(jobs)}", "--format=%F %i %T")
    except ValueError as error:
        if "Invalid job id" in str(error):  # it has forgotten them all
            return {}
        raise
    found: dict[str, str] = {}
    for line in said.splitlines():
        array, number, state = line.split()
        found |= {array: state, number: state}
    return {job: found[job] for job in jobs if job in found}
