"""The training run: data in, optimizer steps, metrics, evaluations and checkpoints out.

What a step does is a pure function of (config, seed, step): the step number is the whole state of the data loader.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from logging import Logger
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moe_dist.checkpoint.finite import NotFinite
from moe_dist.checkpoint.layout import Manifest
from moe_dist.checkpoint.reshard import begin_with, refuse_other_parameters
from moe_dist.config import BatchShape, Config, validate
from moe_dist.data import rank_starts
from moe_dist.engine.adamw import check_implementation
from moe_dist.engine.base import Engine, compute_dtype
from moe_dist.engine.make import make_engine
from moe_dist.kernels.random import RandomKey
from moe_dist.models.backends import resolve_backends
from moe_dist.models.flops import executed_flops
from moe_dist.models.freezing import freeze
from moe_dist.parallel.mesh import Layout, Mesh, create_mesh
from moe_dist.parallel.objects import broadcast_json, lost_ranks_told, require_same
from moe_dist.parallel.trail import Trail
from moe_dist.plan.advice import explained
from moe_dist.step import StepContext
from moe_dist.train.changes import changes
from moe_dist.train.health.crash_loop import note_start, refuse_crash_loop, starts_from
from moe_dist.train.health.replicas import check_replicas
from moe_dist.train.health.signals import StopGuard
from moe_dist.train.health.spikes import Health
from moe_dist.train.keeper import Keeper
from moe_dist.train.opening import opening_lines, refuse_what_cannot_fit, write_opening
from moe_dist.train.origin import RECORD, Origin, find_origin, opening_of
from moe_dist.train.products import products_chosen
from moe_dist.train.record.effective_time import tell_end
from moe_dist.train.record.history import recent_losses
from moe_dist.train.record.metrics import MetricsWriter, moe_record, open_metrics
from moe_dist.train.record.profile import matmul_peak, memory_bytes, speed_record
from moe_dist.train.record.progress import Progress
from moe_dist.train.record.run_folder import RunFolder, write_together
from moe_dist.train.record.statistics import gather_statistics
from moe_dist.train.record.step_clock import StepClock
from moe_dist.train.record.trace import StepProfiler
from moe_dist.train.resume import Resume, checkpoint_to_continue, identity
from moe_dist.train.schedule import evaluates_after, learning_rate
from moe_dist.train.tasks import make_task
from moe_dist.train.tasks.task import Task


@dataclass(frozen=True)
class Outcome:
    """What a run that ended in order is known by; `last` is the last record of metrics.jsonl."""

    folder: RunFolder
    last: dict[str, Any]
    seconds: float
    engine: Engine
    stopped_by: str | None = None
    """Name of the signal that asked the run to save and leave before its last step, or `time limit`."""


class Trainer:
    """One rank's run. Construct on every rank, then `run` on every rank."""

    def __init__(self, config: Config, device: torch.device, console: Console, trail: Trail | None = None) -> None:
        world = torch.distributed.get_world_size()
        self.shape: BatchShape = validate(config, world)
        self.task: Task = make_task(config)
        require_same("what ranks read from data.paths", self.task.digest)
        self.device, self.console, parallel = device, console, config.parallel
        layout = Layout(world, parallel.ep, parallel.tp, etp=parallel.etp)
        model = products_chosen(self.task.model, config, self.shape, layout, device, self._say)
        model = resolve_backends(model, parallel.expert_ranks, device.type, config.train.seq_len)
        check_implementation(config.optim, device.type)
        self.config = config = replace(config, model=model)
        # Groups of nodes are for hierarchical dispatch alone; elsewhere the world is one node.
        node_size = parallel.node_size if model.moe.dispatch == "hierarchical" else world
        self.mesh: Mesh = create_mesh(
            parallel.ep,
            parallel.tp,
            parallel.etp,
            node_size,
            trail=trail,
            sequence_parallel=parallel.sequence_parallel,
        )
        self.clock = StepClock(device)
        self.mesh.trail.listener = self.clock.hear
        self.sampler = self.task.sampler(config.train.global_batch, config.train.order_seed)
        refuse_what_cannot_fit(config, self.shape, self.mesh, device, self._say)
        with self._explained():
            built = self.task.build(config.model, self.mesh).to(device)
            self.frozen = freeze(built, config.train.freeze)
            self.engine = make_engine(
                built, self.mesh, config.engine, config.optim, self.shape.micro_batch, self.shape.accumulation
            )
        self.key = RandomKey.of(config.train.seed, "train")
        self.frequency_V = torch.from_numpy(self.task.frequencies.classes_V).to(device)
        self.folder = RunFolder(config.run.folder)
        self.row_bytes = config.model.d_model * compute_dtype(config.engine.precision).itemsize
        self.flops = self.task.flops_per_token(config.model)
        self.peak = matmul_peak(device, compute_dtype(config.engine.precision))
        self.identity, self.override = identity(config, self.task), tuple[str, ...]()
        self.origin: Origin | None = None

    def checkpoint_to_continue(self, resume: Resume, override: Sequence[str] = ()) -> Path | None:
        """What `run` starts from: as `train.resume.checkpoint_to_continue`, for this run and its folder."""
        self.override = tuple(override)
        newest = checkpoint_to_continue(self.folder, resume, self.identity, override, self._say)
        if newest is not None and "model" not in override:
            refuse_other_parameters(newest, self.engine.model)  # before `run` replaces the config of the run
        if newest is not None:
            manifest = Manifest.load(newest)
            for line in changes(manifest.config, self.config, manifest.step):
                self._say(line)
        elif self.config.train.init_from is not None:
            self.origin = find_origin(self.config, self.task.tokenizer, self.engine.model, self._say)
        return newest

    def _explained(self) -> AbstractContextManager[None]:
        return explained(self.config, self.shape, self.mesh.layout, self.mesh.rank, self.device.type)

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)  # a path in a log stays whole

    def run(self, newest: Path | None, guard: StopGuard, profiled: range = range(0)) -> Outcome:
        """Train to the last step, from checkpoint `newest` if given. Status, metrics and checkpoints are on disk
        whatever happens. profiled: steps, counted from 1, that are looked at (record/trace.py).

        Raises ValueError when the checkpoint does not fit, EndRun when the run must not go on, RuntimeError with advice
        when memory does not suffice.
        """
        begin = Manifest.load(newest).step if newest is not None else None
        ahead = begin != self.config.train.steps
        earlier, furthest = broadcast_json(starts_from(self.folder.path, begin) if ahead else (0, 0))
        torch.distributed.barrier()  # nobody writes before everybody has looked at the folder
        log = self._open(ahead)
        log.info("rank %d of %d, %s", self.mesh.rank, self.mesh.layout.world, self.mesh.layout)
        with self.folder.failures_noted(self.mesh.rank, log), lost_ranks_told(self.mesh.trail):
            refuse_crash_loop(self.folder.path, begin, earlier, self.config.guard.max_restarts)
            self._write(lambda: note_start(self.folder.path, begin, earlier + 1, furthest))
            with self._explained():
                outcome = self._steps(newest, guard, log, profiled)
        state = "preempted" if outcome.stopped_by else "finished"
        log.info("%s: %s", state, {k: v for k, v in outcome.last.items() if k != "layers"})
        details: dict[str, Any] = {"signal": outcome.stopped_by} if outcome.stopped_by else {}
        if outcome.stopped_by and outcome.last["step"] == begin:
            details["starts"] = earlier + 1  # unlike the status before, which scripts compare with

        def last() -> None:
            self.folder.write_status(state, step=outcome.last["step"], **details)
            if ahead:
                tell_end(self.folder.path)

        self._write(last)
        return outcome

    def _open(self, ahead: bool) -> Logger:
        """The run's folder, with all that is known at the start; this rank's log. ahead: there are steps to train.
        Raises EndRun."""
        on_what = (self.mesh, self.device, self.shape, self.sampler)
        first = partial(write_opening, self.folder, self.config, self.task, *on_what, ahead=ahead)
        logs: list[Logger] = []
        with self.folder.failures_noted(self.mesh.rank):
            self._write(first)
            self._write(lambda: logs.append(self.folder.rank_log(self.mesh.rank)), everywhere=True)
        return logs[0]

    def _write(self, work: Callable[[], None], everywhere: bool = False) -> None:
        """On rank 0, or everywhere. Raises EndRun on every rank when it failed on one: the disk may be full."""
        mine = work if everywhere or self.mesh.rank == 0 else lambda: None
        write_together(self.folder.path, mine)

    def _steps(self, newest: Path | None, guard: StopGuard, log: Logger, profiled: range) -> Outcome:
        run, total, main = self.config.run, self.config.train.steps, self.mesh.rank == 0
        progress = Progress(self.console, run.log_every)
        keeper = Keeper(self.config, self.folder, self.engine, self.identity, progress.message)
        step, skipped = keeper.load(newest, "model" in self.override) if newest is not None else (0, 0)
        if self.origin is not None:
            begin_with(self.origin.checkpoint, self.engine)
            self._write(partial(self.folder.write_text, RECORD, self.origin.record()))
        writer = open_metrics(self.config, self.folder.path, progress.message) if main else None
        if writer is not None:
            writer.rewind(step)
        health = Health(self.config.guard, skipped, self._recent_losses(), newest is not None)
        profiler = StepProfiler(self.folder.path, self.mesh.rank, self.device, profiled, step, progress.message)
        began = time.monotonic()
        record: dict[str, Any] = {"step": step}
        stopped_by = None
        with progress, keeper, profiler:
            for line in opening_lines(
                self.config, self.task, self.mesh.layout, self.shape, self.device, self.peak, step, self._beginnings()
            ):
                progress.message(line)
            while step < total and (stopped_by := guard.agreed(self.mesh.world, self.device)) is None:
                with profiler.around(step + 1):
                    record, step = self._train_step(step, health), step + 1
                keeper.raise_pending()
                if health.trouble is None:
                    evaluated = self._evaluate(step)
                    health.evaluated(step, evaluated)
                    record |= evaluated
                if writer is not None:
                    writer.log(record)
                    progress.update(record, total)
                due = step == total or (step % run.save_every == 0 and not health.in_a_row)
                if self._should_compare(step, due):
                    check_replicas(self.engine, step)
                if due and health.trouble is None:
                    self._save(keeper, step, health, record, writer)
                if health.trouble is not None:
                    line = f"step {step}  going back to the last checkpoint: {health.trouble}"
                    progress.message(line)
                    log.warning(line)
                    self._write(partial(self.folder.note_roll_back, step, health.trouble))
                    step = keeper.go_back(step, health)
                    self.clock.forget()
                    if writer is not None:
                        writer.rewind(step)
                    health.compare_with(self._recent_losses())  # as after a restart from there
            if stopped_by and keeper.saved != step:
                self._save(keeper, step, health, record, writer)
                if health.trouble is not None:
                    raise health.no_way_back(f"stopped by {stopped_by} there, and not saved")
        if writer is not None:
            writer.close()
        return Outcome(self.folder, record | {"step": step}, time.monotonic() - began, self.engine, stopped_by)

    def _beginnings(self) -> list[str]:
        """What a person should know of where weights come from, and which stay."""
        frozen = [] if self.frozen is None else [f"frozen    {self.frozen.describe()}"]
        return [*(opening_of(self.origin) if self.origin is not None else []), *frozen]

    def _recent_losses(self) -> list[float]:
        """Those that the next loss is compared with, from metrics.jsonl; every rank must call."""
        main, window = self.mesh.rank == 0, self.config.guard.spike_window
        losses: list[float] = broadcast_json(recent_losses(self.folder.path, window) if main else None)
        return losses

    def _evaluate(self, step: int) -> dict[str, Any]:
        """What the record of this step says besides, where it is time for it."""
        steps = self.config.train.steps
        if not evaluates_after(step, steps, self.config.run):
            return {}
        record = self.task.evaluate(self.engine, self.shape, step)
        if step == steps:
            record |= self.task.finish(self.engine, self.shape, step, self.folder, self._say)
        self.mesh.trail.enter("bookkeeping")
        return record

    def _save(
        self, keeper: Keeper, step: int, health: Health, record: dict[str, Any], writer: MetricsWriter | None
    ) -> None:
        """Or finds trouble, and then saves nothing."""
        if writer is not None:
            writer.sync()
        try:
            keeper.save(step, health, record.get("validation_loss"))
        except NotFinite as error:
            health.found(f"after step {step}, {error}")
        self.mesh.trail.enter("bookkeeping")

    def _should_compare(self, step: int, due: bool) -> bool:
        """Before each checkpoint too: one with a flipped bit in it would keep it for ever."""
        every = self.config.guard.check_replicas
        return every is not None and (due or step % every == 0)

    def _train_step(self, step: int, health: Health) -> dict[str, Any]:
        shape, trail = self.shape, self.mesh.trail
        self.clock.begin(step + 1)
        trail.enter("data", step + 1)
        starts = self.sampler.indices(step)
        outputs = []
        for micro in range(shape.accumulation):
            with trail.inside("data"):
                mine = rank_starts(starts, shape.accumulation, shape.dp, self.mesh.dp.rank, micro)
                tokens_BS, targets = (values.to(self.device) for values in self.task.batch(mine))
            key = self.key.fold(step, micro)
            context = StepContext(key, step=step, frequency_V=self.frequency_V, ends=self.task.ends)
            outputs.append(self.engine.micro_step(tokens_BS, targets, context))
        trail.enter("statistics")
        nll, aux, layers, own_RP = gather_statistics(outputs, self.mesh, self.device, self.clock.handed_in())
        lr = learning_rate(step, self.config.train.steps, self.config.optim)
        trail.enter("update")
        notes = self._update(step + 1, nll, aux, lr, health)
        trail.enter("bookkeeping")
        seconds = self.clock.step_seconds()
        tokens = shape.tokens_per_step * self.task.real_share
        executed = executed_flops(self.config.model, self.flops, tokens, layers)
        return {
            "step": step + 1,
            "loss": nll,
            "aux_loss": aux,
            "lr": lr,
            **notes,
            **speed_record(seconds, tokens, tokens * self.flops, executed, self.peak, self.mesh.layout.world),
            "memory_bytes": memory_bytes(self.device)["peak"],
            **self.clock.record(own_RP),
            **moe_record(layers, self.row_bytes),
        }

    def _update(self, step: int, loss: float, aux: float, lr: float, health: Health) -> dict[str, Any]:
        """Apply the step or leave it out. grad_norm, and where there is reason `skipped` and `spike`, of its record."""
        notes: dict[str, Any] = {}
        reason, odd = health.look(step, loss, aux)
        if reason is not None:
            self.engine.discard()
            finite = math.isfinite(loss + aux)
        else:
            notes["grad_norm"] = norm = self.engine.update(lr)
            finite = math.isfinite(norm)
            reason = None if finite else f"gradient norm {norm}"
        health.settle(step, loss, reason, finite)
        if not finite and step == self.config.train.steps:  # no later one tells whether the weights are what is wrong
            health.found(f"the last step, {step}, was left out: {reason}")
        return notes | ({"skipped": reason} if reason else {}) | ({"spike": odd} if odd else {})
