"""moe-dist: the command line."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import moe_dist
from moe_dist.process import EarlySignals, interrupts_held, output_never_fatal

_USAGE = """usage: moe-dist COMMAND ...       (each has --help)

  train CONFIG [flags]          train a Mixture-of-Experts language model or text classifier
  status [RUN | ROOT | CONFIG]  how far that run is, or all runs under a folder
  submit CONFIG --nodes N ...   that run as a job of Slurm, which survives what happens to it
  cancel RUN | JOB              have such a job save, and end
  watch [RUN | STUDY]           loss, drops and expert loads in the terminal while it runs
  plan CONFIG [flags]           memory, bytes and time of a run before it is paid for; search, dry run, measuring
  study ACTION STUDY            a grid of runs over capacity factors and seeds: plan, run, submit, list, report, export
  compare RUN... [flags]        a page that shows a few runs side by side
  data ACTION ...               prepare and inspect corpora, learn a tokenizer
  generate RUN [flags]          text from the model of a run
  import hf PATH, export hf RUN models from Hugging Face and to it
  chaos CONFIG [flags]          break that run on purpose, again and again, and prove that nothing was lost
  experts RUN ACTION            add, open, close, remove or list the experts of a trained model
  checkpoint ACTION PATH        inspect, verify, convert or diff checkpoints
  verify [flags]                prove that training means the same in every layout, on this machine
  version"""

_TRAIN = """Train a Mixture-of-Experts language model, or with `task: classification` a text classifier.

CONFIG is a YAML file (configs/ has some); every key of it is a flag too, with the same name and meaning:
  moe-dist train configs/quickstart.yaml --model.moe.top-k 1 --model.moe.capacity-factor null
Under torchrun or as a Slurm step each rank runs this same command:
  torchrun --nproc_per_node 4 -m moe_dist.cli train configs/quickstart.yaml --parallel.ep 4

--resume continues the run from its newest checkpoint. --resume auto also starts a run that has none yet, and returns at
once when it has finished: the same command, again and again, brings a run to its end.
A run is continued with the same data, tokenizer, seed, seq_len, global_batch and model, or refused. What is changed on
purpose is named: --override data,seed.
SIGUSR2, SIGTERM, SIGINT (Ctrl-C) and run.time_limit make it save after the step at hand, and leave with exit code 75
and `preempted` in status.json. A second Ctrl-C ends it at once.

--profile steps=10-12 writes a trace of these steps, counted from 1, and their memory to profile/ of the run's folder.

Exit codes; torchrun returns 1 for all but 0, so status.json has the code of a failure too:
  0  done                                       76  diverged: going back to a checkpoint did not help
  1  failed; the reason is in status.json       77  a rank stood still (guard.stall_seconds)
  2  a mistake of the user                      78  copies of a parameter differ (guard.check_replicas)
  75 saved and stopped: run it again            79  starts again and again without a checkpoint (guard.max_restarts)
"""

_STATUS = """Print in one line how far a run is: none, running, interrupted (its process is gone), finished, preempted
or failed, with its last step and its loss, or how it ended; in a second one its effective training time ratio: seconds
in steps that were kept over those since it was first submitted or started, the queue apart.

Takes the folder of a run, or what `moe-dist train` takes, and reads status.json, metrics.jsonl and the starts of the
run. For a folder that holds runs, or without anything for runs/, a table of all of them: state, step, loss, time left,
restarts, effective training time ratio (ETTR), last job.
"""


_CHAOS = """Break a training run on purpose, again and again, and prove that nothing was lost.

Starts the run root/NAME-chaos on its own ranks and, start after start, breaks it: SIGKILL at random moments and inside
saves, SIGSTOP, SIGTERM, a hang, a delay, a full disk, a flipped bit, a damaged checkpoint; each start resumes the one
before. It saves often and watches closely for that, and says what it sets. In the end it trains the same steps without
faults, root/NAME-reference, and compares weights, both moments, metrics.jsonl and the samples of each step, bit by bit.

  moe-dist chaos configs/chaos.yaml --minutes 10

--minutes    how long faults come (default 10)
--ranks      processes, on this machine (default 2)
--seed       of the faults (default 0)

What it saves on the way lies in NAME-chaos/starts, the report in NAME-chaos/chaos.json. Exit codes: 0 nothing was lost
and every start ended as its fault should end it; 1 otherwise, and the report says what; 2 a mistake of the user.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 a failed check, 2 a wrong input; others: train/exit_codes.py."""
    _print_any_text()
    os.umask(os.umask(0o022) | 0o022)  # what is written, others may read where the user lets them, and never change
    command, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    try:
        match command:
            case "train":
                return _train(rest)
            case "status":
                return _status(rest)
            case "submit":
                from moe_dist.cluster.arguments import submit_arguments
                from moe_dist.cluster.submit import submit

                return submit(submit_arguments(rest))
            case "cancel":
                from moe_dist.cluster.arguments import cancel_arguments
                from moe_dist.cluster.cancel import cancel

                own = cancel_arguments(rest)
                return cancel(own.what, own.seconds)
            case "study":
                with interrupts_held():
                    from moe_dist.study.command import study
                return study(rest)
            case "plan":
                return _plan(rest)
            case "watch":
                with interrupts_held():
                    from moe_dist.study.run.watch import watch
                return watch(rest)
            case "compare":
                from moe_dist.study.compare.arguments import compare_arguments

                own = compare_arguments(rest)
                with interrupts_held():
                    from moe_dist.study.compare.command import compare
                return compare(own)
            case "data":
                from moe_dist.data.arguments import data_arguments

                own = data_arguments(rest)
                from moe_dist.data.command import data

                return data(own)
            case "generate":
                from moe_dist.generate.arguments import generate_arguments

                own = generate_arguments(rest)  # help and mistakes come at once, before torch is loaded
                with interrupts_held():
                    from moe_dist.generate.command import generate_text
                return generate_text(own)
            case "import" | "export":
                return _interop(command, rest)
            case "chaos":
                return _chaos(rest)
            case "experts":
                from moe_dist.surgery.arguments import experts_arguments

                own = experts_arguments(rest)
                with interrupts_held():
                    from moe_dist.surgery.command import experts
                return experts(own)
            case "checkpoint":
                from moe_dist.checkpoint.arguments import checkpoint_arguments

                own = checkpoint_arguments(rest)
                with interrupts_held():
                    from moe_dist.checkpoint.command import checkpoint
                return checkpoint(own)
            case "verify":
                from moe_dist.verify.arguments import verify_arguments

                own = verify_arguments(rest)
                with interrupts_held():
                    from moe_dist.verify.command import verify
                return verify(own.options, own.ranks, own.device)
            case "version":
                print(moe_dist.__version__)
                return 0
    except ValueError as error:
        _complain(str(error))
        return 2
    except OSError as error:  # a disk that is full, rights that are missing: a traceback says no more than this
        from moe_dist.train.exit_codes import FAILED

        _complain(str(error))
        return FAILED
    except RuntimeError as error:
        from moe_dist.parallel.objects import RankFailed
        from moe_dist.train.exit_codes import FAILED

        if not isinstance(error, RankFailed):
            raise
        _complain(str(error))
        return FAILED
    except KeyboardInterrupt:
        from moe_dist.train.exit_codes import INTERRUPTED

        _complain("interrupted")
        return INTERRUPTED
    if command in ("help", "-h", "--help"):
        print(_USAGE)
        return 0
    print(f"moe-dist: unknown command {command!r}\n{_USAGE}" if command else _USAGE, file=sys.stderr)
    return 2


def _complain(text: str) -> None:
    """Also where nobody hears it: the exit code says it too. What could not be printed before is given up."""
    with output_never_fatal():
        print(f"moe-dist: {text}", file=sys.stderr)


def _print_any_text() -> None:
    """A character that the terminal's encoding lacks, or a byte of a file's name that is no text, is shown by its
    number: é in ASCII as \\xe9. Python would raise, and end a run for a line of its progress."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _train(args: list[str]) -> int:
    first = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    with EarlySignals(speak=first == "0") as early, output_never_fatal():
        from moe_dist.train.arguments import run_arguments

        own, config = run_arguments("train", args, _TRAIN)
        from moe_dist.train.record.status import is_finished
        from moe_dist.train.resume import as_configured

        folder = config.run.folder
        if own.resume == "auto" and is_finished(folder, config.train.steps) and as_configured(folder, config):
            if first == "0":
                print(f"{folder} has finished its {config.train.steps} steps already")
            return 0
        from moe_dist.train.command import train

        return train(config, own.resume, own.device, _overrides(own), early, own.profile)


def _overrides(own: argparse.Namespace) -> list[str]:
    from moe_dist.train.resume import OVERRIDES

    names = own.override.split(",") if own.override else []
    for name in names:
        if name not in OVERRIDES:
            raise ValueError(f"--override {name!r} is none of {', '.join(OVERRIDES)}")
    if names and own.resume == "never":
        raise ValueError("--override changes what a resumed run must agree on: give --resume too")
    return names


def _status(args: list[str]) -> int:
    folder = Path(args[0] if args else "runs")
    if folder.is_dir():
        if len(args) > 1:
            raise ValueError(f"{args[0]} is the folder of a run, and takes no {args[1]}: flags go with a configuration")
        if not (folder / "config.yaml").exists():
            from moe_dist.cluster.status import print_runs

            print_runs(folder)
            return 0
    else:
        from moe_dist.train.arguments import run_arguments

        _, config = run_arguments("status", args, _STATUS)
        folder = config.run.folder
    from moe_dist.train.record.effective_time import effective_time_of
    from moe_dist.train.record.status import describe_status, status_now

    print(describe_status(status_now(folder)))
    effective = effective_time_of(folder)
    if effective is not None:
        print(f"effective training time: {effective.describe()}")
    return 0


def _interop(command: str, args: list[str]) -> int:
    from moe_dist.interop.arguments import export_arguments, import_arguments

    own = import_arguments(args) if command == "import" else export_arguments(args)
    with interrupts_held():
        from moe_dist.interop.command import export_model, import_model
    return import_model(own) if command == "import" else export_model(own)


def _chaos(args: list[str]) -> int:
    from moe_dist.config.flags import Parser
    from moe_dist.train.arguments import with_config

    parser = Parser("moe-dist chaos", add_help=False)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    own, config = with_config(parser, args, "[--minutes M] [--ranks N] [--seed S]", _CHAOS)
    with interrupts_held():
        from moe_dist.chaos.command import chaos
    with output_never_fatal():  # what it found is in chaos.json too
        return chaos(config, own.minutes, own.ranks, own.seed)


def _plan(args: list[str]) -> int:
    from moe_dist.plan.arguments import ABOUT, USAGE, check_plan_arguments, measure_arguments, plan_parser
    from moe_dist.train.arguments import with_config

    if any(word.partition("=")[0] == "--measure" for word in args):
        measured = measure_arguments(args)
        with interrupts_held():
            from moe_dist.plan.measure import measure
        return measure(measured)
    own, config = with_config(plan_parser(), args, USAGE, ABOUT)
    check_plan_arguments(own)
    with interrupts_held():
        from moe_dist.plan.command import plan
    return plan(config, own)


if __name__ == "__main__":
    sys.exit(main())
