"""`moe-dist study plan | run | list | report STUDY.yaml`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from moe_dist.config.flags import Parser
from moe_dist.config.values import user_path
from moe_dist.process import output_never_fatal
from moe_dist.study.grid import Study, load_study
from moe_dist.study.ledger import Ledger

_ABOUT = """A study trains every combination of some settings with several seeds, and reports what they did.

plan    says what it will train, cost and be able to show; times a few steps of its smallest and largest point
run     trains the points that have not finished, one after another; start it again to continue, or beside itself
list    says how far each point is
report  writes a page (HTML and Markdown, with its figures and data) of as many points as have finished: the question
        and its answer first; with --check it only says whether the design supports the question
"""


def study(args: Sequence[str]) -> int:
    """Returns the exit code: 0 done, 1 a point failed, is refused or none has finished, 75 stopped by a signal."""
    options = _parser().parse_args(list(args))
    if options.command == "plan":
        return _plan(options.study, options.probe, options.json)
    chosen = load_study(options.study)
    match options.command:
        case "run":
            from moe_dist.study.runner import Runner

            points = chosen.points if options.point is None else [chosen.point(options.point)]
            with output_never_fatal():  # hours of work, whose record is the ledger
                return Runner(chosen).run(points)
        case "list":
            return _list(chosen, options.count, options.point)
    return _report(chosen, options.check, options.output)


def _report(chosen: Study, only_check: bool, output: Path | None) -> int:
    from moe_dist.study.report import check_study, write_report

    if only_check:
        findings = check_study(chosen)
        print("\n".join(f"{each.level}: {each.line}" for each in findings) or "The design supports the question.")
        return int(any(each.level == "violation" for each in findings))
    written = write_report(chosen, output)
    print("\n".join(str(path) for path in written[:2]) or f"{chosen.ledger}: no point has finished yet")
    return 0 if written else 1


def _plan(path: Path, probe: bool, as_json: bool) -> int:
    """1 where points are refused."""
    from moe_dist.study.plan import make_plan
    from moe_dist.study.plan_text import print_plan
    from moe_dist.study.runner import train_command

    plan = make_plan(path, train_command if probe else None)
    if as_json:
        print(plan.dumps())
    else:
        print_plan(plan)
    return 1 if plan.study.invalid else 0


def _list(chosen: Study, count: bool, point: int | None) -> int:
    if count:
        print(len(chosen.points))
        return 0
    from moe_dist.study.runner import state

    latest = Ledger(chosen.ledger).latest()
    for each in chosen.points if point is None else [chosen.point(point)]:
        print(f"{each.index:3d}  {each.name}  {state(each, latest)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser("moe-dist study", _ABOUT)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{plan,run,list,report}")
    for name in ("plan", "run", "list", "report"):
        command = commands.add_parser(name, prog=f"moe-dist study {name}")
        command.add_argument("study", type=user_path, metavar="STUDY.yaml")
        if name == "plan":
            command.add_argument(
                "--no-probe", dest="probe", action="store_false", help="train nothing to estimate time"
            )
            command.add_argument("--json", action="store_true", help="for programs, with every point")
        if name == "report":
            command.add_argument(
                "--check", action="store_true", help="only check the design; exit code 1 on violations"
            )
            command.add_argument("--output", type=user_path, metavar="FOLDER", help="of the page; else the study's own")
        if name in ("run", "list"):
            command.add_argument("--point", type=int, metavar="N", help="this point alone, from 0; for job arrays")
        if name == "list":
            command.add_argument("--count", action="store_true", help="print how many points there are")
    return parser
