"""`moe-dist submit`: a configuration that is right for its ranks, as a job of slurm/train.sbatch."""

import shlex
from pathlib import Path

from moe_dist.cluster import history
from moe_dist.cluster.arguments import Request
from moe_dist.cluster.queue import state_of
from moe_dist.cluster.sbatch import (
    file_pattern,
    flags,
    hand_in,
    refuse_control_characters,
    refuse_without_sbatch,
    repository,
)
from moe_dist.config import validate
from moe_dist.disk import locked
from moe_dist.train.record.status import is_finished

_SCRIPT = Path("slurm/train.sbatch")


def submit(request: Request) -> int:
    """Returns the exit code: 0 handed in, shown, or nothing was left to do.

    Raises ValueError for a configuration that breaks a rule on so many ranks, or is planned not to fit into the memory
    of request.hardware, outside the repository, without Slurm, and when the run is in a job already.
    """
    planned = checked(request)
    folder, steps = request.config.run.folder.absolute(), request.config.train.steps
    root = repository(_SCRIPT)
    command = sbatch_command(request, root)
    refuse_control_characters([*command, str(request.site or "")])
    if request.show:
        print(shlex.join(command))
        return 0
    refuse_without_sbatch(f"launch/torchrun.sh {request.ranks} {shlex.join(request.train)}")
    if is_finished(folder, steps):
        print(f"{folder} has finished its {steps} steps already")
        return 0
    (folder / "slurm").mkdir(parents=True, exist_ok=True)
    with locked(folder / "submit.lock"):  # of two at the same moment, one sees what the other has handed in
        before = history.job_of(history.read(folder))
        state = state_of(before) if before is not None else None
        if state is not None:
            raise ValueError(f"{folder} is in job {before} already ({state}): moe-dist cancel {folder}, or wait for it")
        job = hand_in(command, root, {} if request.site is None else {"MOE_DIST_SITE": str(request.site)})
        history.append(folder, "submitted", job=job)
    spare = f" and {request.spare} spare" if request.spare else ""
    print(f"job {job}: {request.config.run.name} on {request.nodes} nodes x {request.ranks} ranks{spare}")
    print(f"  {planned}")
    print(f"  moe-dist status {shlex.quote(str(folder))}        how far it is; watch shows more")
    print(f"  moe-dist cancel {shlex.quote(str(folder))}        has it save and end")
    return 0


def checked(request: Request) -> str:
    """What the plan says of a rank's memory, in a line. Raises ValueError for broken rules, or if it is too much."""
    validate(request.config, request.world)
    from moe_dist.plan.advice import planned_memory  # torch is for those that rules admit

    device = "cuda" if request.gpus else "cpu"
    return planned_memory(request.config, request.world, request.ranks, request.hardware, device_type=device)


def sbatch_command(request: Request, root: Path) -> list[str]:
    """Later options win in sbatch: ours, then those that were written for it; but how the run is cut is ours.

    Whatever somebody wrote is one word, and either follows an `=` or the script's name, behind which sbatch reads no
    options.
    """
    folder = request.config.run.folder.absolute()
    own: dict[str, str | int | bool] = {
        "job-name": request.config.run.name,
        "comment": str(folder),  # by which `moe-dist cancel JOB` finds the run
        "output": f"{file_pattern(folder)}/slurm/{'%A_%a' if 'array' in request.sbatch else '%j'}.out",
        **request.sbatch,
    }
    fixed: dict[str, str | int | bool] = {"nodes": request.nodes + request.spare, "ntasks-per-node": 1}
    if request.gpus:
        fixed["gpus-per-node"] = request.gpus
    if request.spare:
        fixed["no-kill"] = True  # a lost node is replaced in the job, which Slurm would else end
    cut = [f"--ranks-per-node={request.ranks}", f"--spare-nodes={request.spare}"]
    script = [str(root / _SCRIPT), *cut, *request.train]
    return ["sbatch", *flags(own), *request.more, *flags(fixed), "--parsable", *script]
