"""What a job has, as its batch script is told by Slurm. Light: no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from moe_dist.parallel.slurm import Variables, hosts


@dataclass(frozen=True, slots=True)
class Allocation:
    """The job, from the variables that Slurm sets for its script. nodes: how many the run gets, spares apart. tasks,
    cpus: what sbatch was asked for, a node and a task. restarts: how often it was requeued before."""

    job: str
    nodelist: tuple[str, ...]
    nodes: int
    ranks: int
    tasks: int
    cpus: int | None
    restarts: int

    @staticmethod
    def of(environ: Mapping[str, str], ranks: int | None, spare: int) -> "Allocation":
        """ranks: a node. Raises ValueError when a variable is missing, wrong, or does not fit the others."""
        told = Variables(environ)

        def number(name: str) -> int | None:
            return told.number(name) if environ.get(name) else None

        nodelist, tasks, gpus = told.text("SLURM_JOB_NODELIST"), number("SLURM_NTASKS_PER_NODE") or 1, None
        if environ.get("SLURM_GPUS_ON_NODE"):
            gpus = told.number("SLURM_GPUS_ON_NODE")
        each = environ.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2]
        if each and each != str(gpus):
            raise ValueError(
                f"--gpus-per-task={environ['SLURM_GPUS_PER_TASK']} leaves a node's one task here fewer GPUs than the "
                "job has there: use --gpus-per-node, or start ranks as tasks (srun moe-dist train)"
            )
        ranks = ranks or number("RANKS_PER_NODE") or gpus or tasks
        nodes = told.number("SLURM_JOB_NUM_NODES") - spare
        if nodes < 1 or spare < 0:
            raise ValueError(f"--spare-nodes {spare} leaves {nodes} of the job's nodes: ask for more with --nodes")
        job, cpus = str(told.number("SLURM_JOB_ID")), number("SLURM_CPUS_PER_TASK")
        restarts = number("SLURM_RESTART_COUNT") or 0
        return Allocation(job, tuple(hosts(nodelist)), nodes, ranks, tasks, cpus, restarts)

    @property
    def spare(self) -> int:
        return len(self.nodelist) - self.nodes
