"""`moe-dist train`: start the rank, train, and tell the person what came out and where."""

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from rich.console import Console
from rich.text import Text

from moe_dist.config import Config, validate
from moe_dist.config.rules.memory import machine_memory
from moe_dist.generate.decode import CachedDecoder, generate
from moe_dist.generate.sampling import Sampling
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.launch import rank_from_environment, said_once, start, stop
from moe_dist.parallel.objects import lost_ranks_told
from moe_dist.parallel.trail import Trail
from moe_dist.process import EarlySignals
from moe_dist.train.agreement import require_one_start
from moe_dist.train.exit_codes import DONE, SAVED, EndRun
from moe_dist.train.health.signals import StopGuard
from moe_dist.train.health.watchdog import Watchdog
from moe_dist.train.loop import Outcome, Trainer
from moe_dist.train.record.effective_time import effective_time_of
from moe_dist.train.record.progress import duration, print_summary, short_number
from moe_dist.train.record.run_folder import RunFolder
from moe_dist.train.record.trace import profiled_steps
from moe_dist.train.record.wandb_board import check_wandb
from moe_dist.train.resume import Resume
from moe_dist.train.run_lock import run_lock

_PROMPT = "def "


def train(
    config: Config,
    resume: Resume,
    device: str | None,
    override: Sequence[str] = (),
    early: EarlySignals | None = None,
    profile: str | None = None,
) -> int:
    """Run one rank from start to end. Returns the exit code, one of exit_codes.py.

    override: names of what a resumed run may have changed, keys of resume.OVERRIDES. early: signals that have come
    before. profile: steps to profile, as `steps=10-12`.

    Raises ValueError for what a user got wrong.
    """
    rank = rank_from_environment(os.environ)
    with said_once(rank):
        validate(config, rank.world, machine_memory())  # before anything starts
        check_wandb(config.run.wandb)
        profiled = profiled_steps(profile, config.train.steps)
    console, folder = Console(quiet=rank.rank != 0), RunFolder(config.run.folder)
    with StopGuard(config.run.time_limit, early) as guard, ExitStack() as held:
        chosen, trail = start(rank, device, config.train.threads, config.train.deterministic), Trail()
        try:
            noted = folder.failures_noted(rank.rank, but=(ValueError, SystemExit))
            with said_once(rank), noted, lost_ranks_told(trail):
                require_one_start(config)
                held.enter_context(run_lock(folder.path, console.print))
                held.enter_context(Watchdog(folder.path, rank.rank, rank.world, trail, config.guard.stall_seconds))
                trainer = Trainer(config, chosen, console, trail)
                newest = trainer.checkpoint_to_continue(resume, override)
            outcome = trainer.run(newest, guard, profiled)
        except EndRun as error:
            if rank.rank == 0:
                print(f"moe-dist: {error}", file=sys.stderr, flush=True)
            stop()
            return error.code
        _tell(trainer, outcome)
        stop()
    return SAVED if outcome.stopped_by else DONE


def _tell(trainer: Trainer, outcome: Outcome) -> None:
    """What came out; every rank must call."""
    console, config = trainer.console, trainer.config
    if outcome.stopped_by:
        line = f"stopped by {outcome.stopped_by} after step {outcome.last['step']}, saved; continue with --resume"
        console.print(line, highlight=False)
        return
    print_summary(console, summary_rows(trainer, outcome), f"run {config.run.name}")
    if config.run.sample_tokens:
        text = sample(trainer, config.run.sample_tokens)
        console.print(Text(f"\nsample after {_PROMPT!r}:"))
        console.print(Text(_PROMPT + text), style="dim", soft_wrap=True)
    console.print(Text(_next_steps(trainer, outcome)), soft_wrap=True)


def summary_rows(trainer: Trainer, outcome: Outcome) -> dict[str, str]:
    """The end of a run in a few lines."""
    last, config = outcome.last, trainer.config
    rows = {"steps": f"{last['step']} in {duration(outcome.seconds)}"}
    if "loss" in last:
        unit = "text" if config.task == "classification" else "token"
        rows["training loss"] = f"{last['loss']:.4f} nats/{unit}"
    rows |= trainer.task.summary(last)
    if "drop_rate" in last:
        rows["dropped"] = f"{last['drop_rate']:.2%} of the last step's assignments"
        rows["fullest expert"] = f"{last['load_max_over_mean']:.2f} times the mean load"
    if "tokens_per_second" in last:
        rows["throughput"] = f"{short_number(last['tokens_per_second'])} tokens/s, MFU {last['mfu']:.1%}"
        if "mfu_executed" in last and "drop_rate" in last:  # records of earlier versions do not say
            rows["throughput"] += f" ({last['mfu_executed']:.1%} without what was dropped)"
        rows["memory"] = f"{short_number(last['memory_bytes'])}B a rank at most"
    slowest = trainer.clock.describe_slowest()
    if slowest is not None:
        rows["slowest rank"] = slowest
    effective = effective_time_of(outcome.folder.path)
    if effective is not None:
        rows["effective time"] = effective.describe()
    newest = outcome.folder.newest_checkpoint()
    rows["checkpoint"] = str(newest) if newest else f"none under {config.run.root}"
    return rows


def sample(trainer: Trainer, tokens: int) -> str:
    """Text that the model writes; every rank must call."""
    tokenizer, engine, train = trainer.task.text_tokenizer, trainer.engine, trainer.config.train
    assert isinstance(engine.model, Decoder), "a rule refuses sample_tokens for other tasks"
    assert tokenizer is not None, "the task refuses sample_tokens without"
    model = CachedDecoder(engine.model, trainer.device, engine.evaluate)
    prompts = [tokenizer.encode(_PROMPT)]
    return tokenizer.decode(ids[0] for ids in generate(model, prompts, tokens, train.seq_len, train.seed, Sampling()))


def _next_steps(trainer: Trainer, outcome: Outcome) -> str:
    """What to look at, and the file or the command, in two columns."""
    folder = shlex.quote(str(outcome.folder.path))
    rows = {
        "every number of every step": f"{folder}/metrics.jsonl",
        "curves in the terminal": f"moe-dist watch {folder}",
        "curves in a browser": f"tensorboard --logdir {folder}/tensorboard",
        "text that it writes": f"moe-dist generate {folder} --prompt {shlex.quote(_PROMPT)}",
        "the same in every layout": "moe-dist verify",
    }
    if not trainer.config.run.tensorboard:
        del rows["curves in a browser"]
    if trainer.task.text_tokenizer is None:
        del rows["text that it writes"]
    width = max(map(len, rows))
    return "\n".join(["\nWhere to look next", *(f"  {what:{width}}  {how}" for what, how in rows.items())]) + "\n"
