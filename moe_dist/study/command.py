"""`moe-dist study run | list | report | export STUDY.yaml`."""

import argparse
from collections.abc import Sequence

from moe_dist.config.flags import Parser
from moe_dist.config.values import user_path
from moe_dist.process import output_never_fatal
from moe_dist.study.grid import Study, load_study
from moe_dist.study.ledger import Ledger

_ABOUT = """A study trains every combination of some settings with several seeds, and reports what they did.

run     trains the points that have not finished, one after another; start it again to continue, or beside itself
list    says how far each point is
report  draws the figure (PNG and SVG) and writes report.md from the ledger, for as many points as have finished
export  writes the ledger and what was measured at each fraction of the schedule as tables, Parquet or JSONL
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
                return Runner(chosen).run(points)
        case "list":
            return _list(chosen, options.count, options.point)
        case "export":
            return _export(chosen, options)
    from moe_dist.study.report import write_report

    written = write_report(chosen, Ledger(chosen.ledger).latest())
    print("\n".join(str(path) for path in written) or f"{chosen.ledger}: no point has finished yet")
    return 0 if written else 1


def _list(chosen: Study, count: bool, point: int | None) -> int:
    if count:
        print(len(chosen.points))
        return 0
    from moe_dist.study.runner import state

    latest = Ledger(chosen.ledger).latest()
    for each in chosen.points if point is None else [chosen.point(point)]:
        print(f"{each.index:3d}  {each.name}  {state(each, latest)}")
    return 0


def _export(chosen: Study, options: argparse.Namespace) -> int:
    from moe_dist.study.export import export

    if options.parquet is not None:
        written = export(chosen, "parquet", options.parquet)
    else:
        written = export(chosen, "jsonl", options.jsonl or chosen.folder / "export")
    print("\n".join(map(str, written)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser("moe-dist study", _ABOUT)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{run,list,report,export}")
    for name in ("run", "list", "report", "export"):
        command = commands.add_parser(name, prog=f"moe-dist study {name}")
        command.add_argument("study", type=user_path, metavar="STUDY.yaml")
        if name in ("run", "list"):
            command.add_argument("--point", type=int, metavar="N", help="this point alone, from 0; for job arrays")
        if name == "list":
            command.add_argument("--count", action="store_true", help="print how many points there are")
        if name == "export":
            form = command.add_mutually_exclusive_group()
            form.add_argument("--parquet", type=user_path, metavar="FOLDER", help="as Parquet; needs the extra `study`")
            form.add_argument(
                "--jsonl",
                type=user_path,
                metavar="FOLDER",
                help="as JSONL; where neither is given, into ROOT/NAME/export",
            )
    return parser
