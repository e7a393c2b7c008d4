"""Before a run: whether it fits. Its first lines: what is trained, how it is cut, on what."""

import os
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean

import numpy as np
import torch

from moe_dist.config import BatchShape, Config
from moe_dist.config.model import MoEConfig
from moe_dist.config.rules.memory import host_memory
from moe_dist.config.schema import TrainConfig
from moe_dist.data import SequenceSampler
from moe_dist.data.blending import BlendSampler
from moe_dist.disk import remove_drafts
from moe_dist.engine.adamw import describe_implementation
from moe_dist.models.backends import describe_backends
from moe_dist.parallel.launch import rank_from_environment
from moe_dist.parallel.mesh import Layout, Mesh
from moe_dist.parallel.objects import gather_json
from moe_dist.plan.advice import shortage
from moe_dist.train.record.effective_time import tell_start
from moe_dist.train.record.profile import Peak
from moe_dist.train.record.progress import short_number
from moe_dist.train.record.run_folder import RunFolder
from moe_dist.train.schedule import schedule_notes
from moe_dist.train.tasks.task import Task

_LOOKED_AT = 1024  # sequences


def refuse_what_cannot_fit(
    config: Config, shape: BatchShape, mesh: Mesh, device: torch.device, say: Callable[[str], None]
) -> None:
    """Raises ValueError with advice on every rank, which must all call, where one surely has too little memory; says
    so where it may have too little. Ranks on CPU share the memory of their machine."""
    ranks, here = range(mesh.rank, mesh.rank + 1), rank_from_environment(os.environ)
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    else:
        available, first = host_memory(), mesh.rank - here.local_rank
        if first >= 0 and first + here.local_world <= mesh.layout.world:
            ranks = range(first, first + here.local_world)
    found = gather_json(shortage(config, shape, mesh.layout, ranks, available, device.type))
    for impossible, _ in found:
        if impossible is not None:
            raise ValueError(impossible)
    for doubt in dict.fromkeys(doubt for _, doubt in found if doubt is not None):
        say(f"note      {doubt}")


def opening_lines(
    config: Config,
    task: Task,
    layout: Layout,
    shape: BatchShape,
    device: torch.device,
    peak: Peak,
    first: int,
    beginnings: Sequence[str] = (),
) -> list[str]:
    """first: steps done already. beginnings: lines on where the weights come from, and which of them stay."""
    counts = task.parameter_counts(config.model)
    backends = ", ".join(f"{k} {v}" for k, v in describe_backends(config.model, device.type).items())
    engine = config.engine.name + (f" ZeRO-{config.engine.zero_stage}" if config.engine.name == "deepspeed" else "")
    if config.optim.implementation != "torch":
        engine += f" with {describe_implementation(config.optim)}"
    ep = f"ep {layout.ep}" + (f" x etp {layout.etp}" if layout.etp > 1 else "")
    return [
        f"layout    world {layout.world} = dp {layout.dp} x tp {layout.tp}, {ep}, edp {layout.edp}; "
        f"{engine}, {config.engine.precision}, {torch.get_num_threads()} threads a rank",
        f"model     {short_number(counts.total)} parameters, {short_number(counts.active)} active a token; {backends}",
        *beginnings,
        f"data      {task.describe()}",
        *step_lines(config, shape, first),
        *(f"note      {note}" for note in task.notes(config.model)),
        *(f"note      {note}" for note in schedule_notes(config.train.steps, config.optim)),
        f"peak      {peak.flops_per_second / 1e9:.0f} GFLOP/s a rank ({peak.source})",
    ]


def step_lines(config: Config, shape: BatchShape, first: int) -> Iterator[str]:
    """What a step is and which are to come; first: steps done already."""
    steps, model = config.train.steps, config.model
    factors = [
        factor for moe in model.moe_sections for factor in (moe.capacity_factor, *moe.capacity_schedule.values())
    ]
    compete = "" if all(map(MoEConfig.is_dropless, factors)) else " that compete for capacity"
    ahead = f"steps {first + 1} to {steps}" if first < steps else f"all {steps} steps are done"
    yield (
        f"step      {shape.global_batch} sequences of {shape.seq_len} in {shape.accumulation} micro-steps of "
        f"{shape.micro_step_sequences * shape.seq_len} tokens{compete}; {ahead}"
    )
    if first >= steps:
        yield (
            f"note      nothing is left to train: this run ends at train.steps={steps}; to train longer, resume it "
            f"with more, such as --resume --train.steps {2 * steps}"
        )


def write_opening(
    folder: RunFolder,
    config: Config,
    task: Task,
    mesh: Mesh,
    device: torch.device,
    shape: BatchShape,
    sampler: SequenceSampler | BlendSampler,
    *,
    ahead: bool,
) -> None:
    """All that is known at the start, into the run's folder, by rank 0. ahead: there are steps to train."""
    remove_drafts(folder.path)
    folder.write_config(config)
    documents = documents_per_micro_step(task, sampler, shape, config.train)
    folder.write_environment(config, mesh, device, task.data_record() | {"documents_per_micro_step": documents})
    task.prepare(folder)
    if ahead:
        tell_start(folder.path)
    folder.write_status("running")


def documents_per_micro_step(
    task: Task, sampler: SequenceSampler | BlendSampler, shape: BatchShape, train: TrainConfig
) -> float:
    """Documents that the sequences of a micro-step touch: the mean over micro-steps of the first steps, about as many
    as have a thousand sequences."""
    steps = range(min(train.steps, max(1, _LOOKED_AT // train.global_batch)))
    micro_steps = (np.split(sampler.indices(step), shape.accumulation) for step in steps)
    return fmean(task.documents(places) for of_step in micro_steps for places in of_step)
