"""The training run: data in, optimizer steps, metrics, evaluations and checkpoints out.

What a step does is a pure function of (config, seed, step): the step number is the whole state of the data loader.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from moe_dist.checkpoint.background import Saver
from moe_dist.checkpoint.layout import Manifest, RunInfo
from moe_dist.checkpoint.reshard import load, newest_good
from moe_dist.checkpoint.retention import Retention
from moe_dist.config import BatchShape, Config, validate
from moe_dist.data import SequenceSampler, rank_starts
from moe_dist.engine.base import Engine, compute_dtype, make_engine
from moe_dist.kernels.registry import describe_backends, resolve_backends
from moe_dist.models.decoder import DecoderOutput
from moe_dist.moe.routing import StepContext
from moe_dist.parallel.collectives import all_reduce
from moe_dist.parallel.mesh import Mesh, create_mesh
from moe_dist.parallel.objects import require_same
from moe_dist.parallel.random import RandomKey
from moe_dist.train.guard import StopGuard
from moe_dist.train.metrics import LayerLoad, MetricsWriter, moe_record
from moe_dist.train.profile import matmul_peak, memory_bytes
from moe_dist.train.progress import Progress, short_number
from moe_dist.train.run_folder import RunFolder
from moe_dist.train.schedule import learning_rate
from moe_dist.train.task import Task, make_task

Resume = Literal["never", "auto", "must"]


@dataclass(frozen=True)
class Outcome:
    """What a run that ended in order is known by; `last` is the last record of metrics.jsonl."""

    folder: RunFolder
    last: dict[str, Any]
    seconds: float
    engine: Engine
    stopped_by: str | None = None
    """Name of the signal that asked the run to save and leave before its last step."""


class Trainer:
    """One rank's run. Construct on every rank, then `run` on every rank."""

    def __init__(self, config: Config, device: torch.device, console: Console) -> None:
        world = torch.distributed.get_world_size()
        self.shape: BatchShape = validate(config, world)
        self.task: Task = make_task(config)
        require_same("what ranks read from data.paths", self.task.digest)
        model = resolve_backends(self.task.model, config.parallel.expert_ranks, device.type, config.train.seq_len)
        config = replace(config, model=model)
        self.config, self.device, self.console = config, device, console
        parallel = config.parallel
        # Groups of nodes are for hierarchical dispatch alone; elsewhere the world is one node.
        node_size = parallel.node_size if model.moe.dispatch == "hierarchical" else world
        self.mesh: Mesh = create_mesh(parallel.ep, parallel.tp, parallel.etp, node_size)
        self.sampler = SequenceSampler(
            self.task.num_places, self.task.width, config.train.global_batch, config.train.seed
        )
        built = self.task.build(config.model, self.mesh).to(device)
        self.engine = make_engine(
            built, self.mesh, config.engine, config.optim, self.shape.micro_batch, self.shape.accumulation
        )
        self.key = RandomKey.of(config.train.seed, "train")
        self.folder = RunFolder(Path(config.run.root) / config.run.name)
        self.row_bytes = config.model.d_model * compute_dtype(config.engine.precision).itemsize
        self.flops = self.task.flops_per_token(config.model)
        self.peak = matmul_peak(device, compute_dtype(config.engine.precision))

    def checkpoint_to_continue(self, resume: Resume) -> Path | None:
        """What `run` starts from: the newest whole checkpoint, or None for a new run. Nothing is written.

        resume: `never` wants an unused folder, `must` a checkpoint; `auto` continues where there is one and starts
        anew where there is none. Raises ValueError when that is not so, when all checkpoints are damaged, or the
        checkpoint is of another run.
        """
        if resume == "never":
            self.folder.refuse_second_start()
            return None
        newest, damaged = newest_good(self.folder.checkpoints)
        for problem in damaged:
            self.console.print(f"passed over: {problem}", markup=False, highlight=False)
        if newest is None and resume == "auto":
            return None
        if newest is None:
            raise ValueError(
                f"{self.folder.checkpoints} holds no complete checkpoint to resume from: start without --resume"
            )
        run = Manifest.load(newest).run
        for name, value in self._identity().items():
            if run.get(name) != value:
                raise ValueError(
                    f"{newest} was trained with {name}={run.get(name)}, not {value}: "
                    "a resumed run must continue on the same data in the same order"
                )
        return newest

    def run(self, newest: Path | None) -> Outcome:
        """Train to the last step, from checkpoint `newest` if given. Status, metrics and checkpoints are on disk
        whatever happens.

        Raises ValueError when the checkpoint does not fit, FloatingPointError on a non-finite loss.
        """
        torch.distributed.barrier()  # nobody writes before everybody has looked at the folder
        main = self.mesh.rank == 0
        if main:
            self.folder.write_config(self.config)
            self.folder.write_environment(self.config, self.mesh, self.device)
            self.task.prepare(self.folder)
            self.folder.write_status("running")
        torch.distributed.barrier()
        log = self.folder.rank_log(self.mesh.rank)
        log.info("rank %d of %d, %s", self.mesh.rank, self.mesh.layout.world, self.mesh.layout)
        try:
            with StopGuard() as guard:
                outcome = self._steps(newest, guard)
        except BaseException as error:
            log.exception("stopped")
            if main:
                self.folder.write_status("failed", reason=f"{type(error).__name__}: {error}")
            raise
        state = "preempted" if outcome.stopped_by else "finished"
        log.info("%s: %s", state, {k: v for k, v in outcome.last.items() if k != "layers"})
        if main:
            details = {"signal": outcome.stopped_by} if outcome.stopped_by else {}
            self.folder.write_status(state, step=outcome.last["step"], **details)
        return outcome

    def _steps(self, newest: Path | None, guard: StopGuard) -> Outcome:
        run, total = self.config.run, self.config.train.steps
        first = self._resume(newest) if newest is not None else 0
        writer = MetricsWriter(self.folder.path, run.tensorboard) if self.mesh.rank == 0 else None
        progress = Progress(self.console, run.log_every)
        began = time.monotonic()
        record: dict[str, Any] = {"step": first}
        stopped_by = None
        if writer is not None:
            writer.rewind(first)
        with progress, self._saver(progress.message) as saver:
            if self.mesh.rank == 0:
                for line in self._opening(first):
                    progress.message(line)
            for step in range(first, total):
                record = self._train_step(step)
                saver.raise_pending()
                done = step + 1
                if done % run.eval_every == 0 or done == total:
                    record |= self.task.evaluate(self.engine, self.shape, done)
                if done == total:
                    record |= self.task.finish(self.engine, self.shape, done, self.folder)
                if writer is not None:
                    writer.log(record)
                    progress.update(record, total)
                stopped_by = guard.agreed(self.mesh.world, self.device) if done < total else None
                if done % run.save_every == 0 or done == total or stopped_by:
                    if writer is not None:
                        writer.sync()
                    saver.save(self.engine, done, record.get("validation_loss"))
                if stopped_by:
                    break
        if writer is not None:
            writer.close()
        return Outcome(self.folder, record, time.monotonic() - began, self.engine, stopped_by)

    def _train_step(self, step: int) -> dict[str, Any]:
        began, shape = time.monotonic(), self.shape
        starts = self.sampler.indices(step)
        outputs = []
        for micro in range(shape.accumulation):
            mine = rank_starts(starts, shape.accumulation, shape.dp, self.mesh.dp.rank, micro)
            tokens_BS, targets = (values.to(self.device) for values in self.task.batch(mine))
            context = StepContext(self.key.fold(step, micro), step=step)
            outputs.append(self.engine.micro_step(tokens_BS, targets, context))
        nll, aux, layers = self._gather_statistics(outputs)
        if not math.isfinite(nll + aux):
            raise FloatingPointError(f"loss={nll}, auxiliary loss={aux} at step {step + 1}: lower optim.lr, or clip")
        lr = learning_rate(step, self.config.train.steps, self.config.optim)
        norm = self.engine.update(lr)
        if not math.isfinite(norm):
            raise FloatingPointError(f"gradient norm {norm} at step {step + 1}: lower optim.lr")
        seconds = time.monotonic() - began
        rate = shape.tokens_per_step * self.task.real_share / seconds
        achieved = rate * self.flops
        return {
            "step": step + 1,
            "loss": nll,
            "aux_loss": aux,
            "grad_norm": norm,
            "lr": lr,
            "tokens_per_second": rate,
            "step_seconds": seconds,
            "tflops": achieved / 1e12,
            "mfu": achieved / (self.peak.flops_per_second * self.mesh.layout.world),
            "memory_bytes": memory_bytes(self.device)["peak"],
            **moe_record(layers, self.row_bytes),
        }

    def _gather_statistics(self, outputs: list[DecoderOutput]) -> tuple[float, float, list[LayerLoad]]:
        """Means over micro-steps and ranks, in one all-reduce; loads are sums over the world already."""
        per_micro = []
        for output in outputs:
            values = [output.nll, sum((s.aux_loss.detach() for s in output.stats), output.nll.new_zeros(()))]
            for stats in output.stats:
                values += [stats.entropy, stats.balance_loss, stats.z_loss, stats.unserved]
                values.append(torch.tensor(stats.sent_bytes, device=self.device))
            per_micro.append(torch.stack([value.double() for value in values]))
        mean = all_reduce(torch.stack(per_micro).mean(0), self.mesh.world) / self.mesh.layout.world
        nll, aux, *rest = mean.tolist()
        layers = []
        for index, stats in enumerate(outputs[0].stats):
            load_E = torch.stack([output.stats[index].load_E for output in outputs]).sum(0)
            kept_E = torch.stack([output.stats[index].kept_E for output in outputs]).sum(0)
            entropy, balance, z, unserved, sent = rest[5 * index : 5 * index + 5]
            sent = round(sent * self.mesh.layout.world * len(outputs))
            loads = (load_E.tolist(), kept_E.tolist())
            layers.append(LayerLoad(stats.layer, *loads, entropy, balance, z, unserved, sent, stats.kind))
        # Each tp rank added 1/tp of its slice's auxiliary loss, so the world's mean is 1/tp of it.
        return nll, aux * self.mesh.layout.tp, layers

    def _resume(self, newest: Path) -> int:
        step = load(newest, self.engine, checked=True).step
        if self.mesh.rank == 0:
            self.console.print(f"resuming {newest}, step {step}", highlight=False)
        return step

    def _saver(self, say: Callable[[str], None]) -> Saver:
        run = self.config.run
        retention = Retention(keep_last=run.keep_last, keep_every=run.keep_every, keep_best=run.keep_best)
        info = RunInfo(run=self._identity(), config=asdict(self.config), seed=self.config.train.seed)
        return Saver(self.folder.checkpoints, self.mesh, retention, info, run.async_save, say)

    def _identity(self) -> dict[str, Any]:
        """What a continued run must agree on."""
        train, model = self.config.train, asdict(self.config.model)
        return {
            "data": self.task.digest,
            "seed": train.seed,
            "seq_len": train.seq_len,
            "global_batch": train.global_batch,
            "model": model
            | {"attention": model["attention"] | {"backend": None, "moe": None}, "recompute": None, "moe": None},
        }

    def _opening(self, first: int) -> list[str]:
        config, layout, shape = self.config, self.mesh.layout, self.shape
        counts = self.task.parameter_counts(config.model)
        backends = ", ".join(f"{k} {v}" for k, v in describe_backends(config.model, self.device.type).items())
        engine = config.engine.name + (f" ZeRO-{config.engine.zero_stage}" if config.engine.name == "deepspeed" else "")
        return [
            f"layout    world {layout.world} = dp {layout.dp} x tp {layout.tp}, ep {layout.ep}, edp {layout.edp}; "
            f"{engine}, {config.engine.precision}, {torch.get_num_threads()} threads a rank",
            f"model     {short_number(counts.total)} parameters, {short_number(counts.active)} active a token; "
            f"{backends}",
            f"data      {self.task.describe()}",
            f"step      {shape.global_batch} sequences of {shape.seq_len} in {shape.accumulation} micro-steps of "
            f"{shape.micro_step_sequences * shape.seq_len} tokens that compete for capacity; "
            f"steps {first + 1} to {config.train.steps}",
            *(f"note      {note}" for note in self.task.notes(config.model)),
            f"peak      {self.peak.flops_per_second / 1e9:.0f} GFLOP/s a rank ({self.peak.source})",
        ]
