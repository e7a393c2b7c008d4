"""`moe-dist study plan | run | submit | list | report | export STUDY.yaml`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from moe_dist.config.flags import Parser
from moe_dist.config.values import user_path
from moe_dist.process import output_never_fatal
from moe_dist.study.design.grid import Study, load_study
from moe_dist.study.ledger.ledger import Ledger

_ABOUT = """A study trains every combination of some settings with several seeds, and reports what they did.

  moe-dist study plan STUDY.yaml        what it will train, cost and be able to show
  moe-dist study run STUDY.yaml         train it; the same again continues it
  moe-dist study report STUDY.yaml      the answer, as a page
"""
_ACTIONS = {
    "plan": (
        "what it trains, costs and can show",
        "Say what a study will train, cost and be able to show. Times a few steps of its smallest and largest point.",
    ),
    "run": (
        "train what has not finished",
        "Train the points that have not finished, at_once at a time. Start it again to continue, or beside itself.",
    ),
    "submit": (
        "hand it to Slurm",
        "Hand the points to Slurm as job arrays, at most at_once at a time. What follows -- are options of sbatch.",
    ),
    "list": ("how far each point is", "Say how far each point is, in a line."),
    "report": (
        "write a page of it",
        "Write a page (HTML and Markdown, with its figures and data) of as many points as have finished: the question\n"
        "and its answer first. With --check only say whether the design supports the question.",
    ),
    "export": (
        "write its data as tables",
        "Write the ledger, and what was measured at each fraction of the schedule, as tables: Parquet or JSONL.",
    ),
}
"""Of each action: what it does in a few words, and in a sentence."""


def study(args: Sequence[str]) -> int:
    """Returns the exit code: 0 done, 1 a point failed, is refused or none has finished, 75 stopped by a signal."""
    own, of_sbatch = _at_dashes(list(args))
    options = _parser().parse_args(own)
    if of_sbatch and options.command != "submit":
        raise ValueError(
            f"command line: {' '.join(of_sbatch)}: moe-dist study {options.command} takes nothing after --"
        )
    if options.command == "plan":
        return _plan(options.study, options.probe, options.json)
    chosen = load_study(options.study)
    match options.command:
        case "run":
            return _run(chosen, options.point, options.at_once)
        case "submit":
            from moe_dist.study.run.submit import submit

            _readable(chosen)
            _warn_of_few_seeds(chosen)
            return submit(chosen, options.at_once, options.dry_run, of_sbatch)
        case "list":
            return _list(chosen, options.count, options.point)
        case "export":
            return _export(chosen, options)
    return _report(chosen, options.check, options.output)


def _plan(path: Path, probe: bool, as_json: bool) -> int:
    """1 where points are refused."""
    from moe_dist.study.plan.plan import make_plan
    from moe_dist.study.plan.text import print_plan
    from moe_dist.study.run.runner import train_command

    plan = make_plan(path, train_command if probe else None)
    if as_json:
        print(plan.dumps())
    else:
        print_plan(plan)
    return 1 if plan.study.invalid else 0


def _report(chosen: Study, only_check: bool, output: Path | None) -> int:
    """1 before any result; of a check, where the design breaks a rule."""
    from moe_dist.study.report.report import check_study, write_report

    if only_check:
        findings = check_study(chosen)
        print("\n".join(f"{each.level}: {each.line}" for each in findings) or "The design supports the question.")
        return int(any(each.level == "violation" for each in findings))
    _readable(chosen)
    written = write_report(chosen, output)
    print("\n".join(str(path) for path in written[:2]) or f"{chosen.ledger}: no point has finished yet")
    return 0 if written else 1


def _run(chosen: Study, point: int | None, at_once: int | None) -> int:
    if chosen.file.executor == "slurm" and point is None:
        raise ValueError(
            f"{chosen.path} has executor: slurm: hand it in with moe-dist study submit {chosen.path}; to run points on "
            "this machine, name one with --point, or set executor: local"
        )
    from moe_dist.study.run.runner import Runner

    points = chosen.points if point is None else [chosen.point(point)]
    with output_never_fatal():  # hours of work, whose record is the ledger
        _readable(chosen)
        if point is None:
            _warn_of_few_seeds(chosen)
        return Runner(chosen, at_once=at_once).run(points)


def _list(chosen: Study, count: bool, point: int | None) -> int:
    if count:
        print(len(chosen.points))
        return 0
    from moe_dist.study.run.state import state

    latest = _readable(chosen).latest()
    for each in chosen.points if point is None else [chosen.point(point)]:
        print(f"{each.index:3d}  {each.name}  {state(each, latest)}")
    return 0


def _export(chosen: Study, options: argparse.Namespace) -> int:
    from moe_dist.study.ledger.export import export

    if options.parquet is not None:
        written = export(chosen, "parquet", options.parquet)
    else:
        written = export(chosen, "jsonl", options.jsonl or chosen.folder / "export")
    print("\n".join(map(str, written)))
    return 0


def _readable(chosen: Study) -> Ledger:
    """The ledger, once its lines that cannot be read are told."""
    ledger = Ledger(chosen.ledger)
    for complaint in ledger.read()[1]:
        print(f"moe-dist: {complaint}", file=sys.stderr, flush=True)
    return ledger


def _warn_of_few_seeds(chosen: Study) -> None:
    from moe_dist.study.plan.text import few_seeds

    if note := few_seeds(chosen.file):
        print(f"moe-dist: {chosen.path}: {note}", file=sys.stderr, flush=True)


def _at_dashes(args: list[str]) -> tuple[list[str], list[str]]:
    """What is before a -- and behind it."""
    at = args.index("--") if "--" in args else len(args)
    return args[:at], args[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = Parser("moe-dist study", _ABOUT)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{plan,run,submit,list,report,export}")
    for name, (words, about) in _ACTIONS.items():
        command = commands.add_parser(name, prog=f"moe-dist study {name}", help=words, about=about)
        command.add_argument("study", type=user_path, metavar="STUDY.yaml", help="the file of the study")
        if name == "plan":
            no_probe = "train nothing to estimate time"
            command.add_argument("--no-probe", dest="probe", action="store_false", help=no_probe)
            command.add_argument("--json", action="store_true", help="print it for programs, with every point")
        if name == "report":
            page = "of the page (default: that of the study, ROOT/NAME)"
            check = "only check the design; exit code 1 on violations"
            command.add_argument("--check", action="store_true", help=check)
            command.add_argument("--output", type=user_path, metavar="FOLDER", help=page)
        if name in ("run", "list"):
            point = "this point alone, from 0; for job arrays (default: all)"
            command.add_argument("--point", type=int, metavar="N", help=point)
        if name in ("run", "submit"):
            at_once = "points at a time (default: at_once of the file)"
            command.add_argument("--at-once", type=int, metavar="N", help=at_once)
        if name == "submit":
            command.add_argument("--dry-run", action="store_true", help="print the calls of sbatch, and make none")
            command.usage = "moe-dist study submit STUDY.yaml [--at-once N] [--dry-run] [-- OPTIONS OF SBATCH]"
        if name == "list":
            command.add_argument("--count", action="store_true", help="print how many points there are")
        if name == "export":
            parquet = "write Parquet there; needs the extra `study` (default: JSONL)"
            jsonl = "write JSONL there (default: ROOT/NAME/export)"
            form = command.add_mutually_exclusive_group()
            form.add_argument("--parquet", type=user_path, metavar="FOLDER", help=parquet)
            form.add_argument("--jsonl", type=user_path, metavar="FOLDER", help=jsonl)
    return parser
