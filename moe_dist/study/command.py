"""`moe-dist study run | list | report STUDY.yaml`."""

import argparse
import sys
from collections.abc import Sequence

from moe_dist.config.flags import Parser
from moe_dist.config.values import user_path
from moe_dist.process import output_never_fatal
from moe_dist.study.grid import Study, load_study
from moe_dist.study.ledger import Ledger

_ABOUT = """A study trains every combination of some settings with several seeds, and reports what they did.

run     trains the points that have not finished, at_once at a time; start it again to continue, or beside itself
list    says how far each point is
report  draws the figure (PNG and SVG) and writes report.md from the ledger, for as many points as have finished
"""


def study(args: Sequence[str]) -> int:
    """Returns the exit code: 0 done, 1 a point failed or none has finished yet, 75 stopped by a signal."""
    options = _parser().parse_args(list(args))
    chosen = load_study(options.study)
    match options.command:
        case "run":
            from moe_dist.study.runner import Runner

            points = chosen.points if options.point is None else [chosen.point(options.point)]
            with output_never_fatal():  # hours of work, whose record is the ledger
                _readable(chosen)
                return Runner(chosen, at_once=options.at_once).run(points)
        case "list":
            return _list(chosen, options.count, options.point)
    from moe_dist.study.report import write_report

    written = write_report(chosen, _readable(chosen).latest())
    print("\n".join(str(path) for path in written) or f"{chosen.ledger}: no point has finished yet")
    return 0 if written else 1


def _list(chosen: Study, count: bool, point: int | None) -> int:
    if count:
        print(len(chosen.points))
        return 0
    from moe_dist.study.state import state

    latest = _readable(chosen).latest()
    for each in chosen.points if point is None else [chosen.point(point)]:
        print(f"{each.index:3d}  {each.name}  {state(each, latest)}")
    return 0


def _readable(chosen: Study) -> Ledger:
    """The ledger, once its lines that cannot be read are told."""
    ledger = Ledger(chosen.ledger)
    for complaint in ledger.read()[1]:
        print(f"moe-dist: {complaint}", file=sys.stderr, flush=True)
    return ledger


def _parser() -> argparse.ArgumentParser:
    parser = Parser("moe-dist study", _ABOUT)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{run,list,report}")
    for name in ("run", "list", "report"):
        command = commands.add_parser(name, prog=f"moe-dist study {name}")
        command.add_argument("study", type=user_path, metavar="STUDY.yaml")
        if name != "report":
            command.add_argument("--point", type=int, metavar="N", help="this point alone, from 0; for job arrays")
        if name == "run":
            command.add_argument("--at-once", type=int, metavar="N", help="points at a time, in place of the study's")
        if name == "list":
            command.add_argument("--count", action="store_true", help="print how many points there are")
    return parser
