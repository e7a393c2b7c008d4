"""What follows `moe-dist plan`. Light: its help comes without torch."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from moe_dist.config.arguments import with_config
from moe_dist.config.flags import DEVICE, Parser
from moe_dist.config.read import read_value

USAGE = "--ranks W --hardware NAME [--ranks-per-node N] [--search] [--capacity F,..] [--dry-run] [--json]"
ABOUT = """Say what a run needs and takes before it is paid for: memory, bytes, FLOPs and time of a step.

  moe-dist plan configs/quickstart.yaml --ranks 64 --hardware h100
  moe-dist plan configs/quickstart.yaml --ranks 64 --hardware h100 --search
  moe-dist plan configs/quickstart.yaml --ranks 64 --hardware h100 --capacity 1.0,1.25,2.0,null
  moe-dist plan configs/quickstart.yaml --ranks 1024 --dry-run
  torchrun --nproc_per_node 2 -m moe_dist.cli plan --measure here.yaml

CONFIG is what `moe-dist train` takes, and every key of it is a flag here too. No process is started and no memory
taken, but by --measure; --dry-run runs a training step of chosen ranks on tensors without contents.

Exit codes: 0 it fits; 1 it does not, or the dry run found a fault; 2 a mistake of the user.
"""
_HARDWARE = (
    "a file of configs/hardware by its name (h100, h200, a100, b200), or the path of one; needed but with --dry-run"
)
_SKEW = "rows of the busiest rank's experts over an even share, for the time"
_SEARCH = "rank all layouts by planned time: ep, tp, etp, ZeRO stage, micro-batch, recompute, dispatch and wire"
_CAPACITY = "what each of these capacity factors costs; null drops nothing (default: none)"
_DRY_RUN = "run a training step of ranks of every kind in a fake world, and compare what they exchange"
_MEASURE = (
    "no plan: measure this machine, or under torchrun the nodes of this job, and write a hardware file (default: plan)"
)


def plan_arguments(args: Sequence[str]) -> argparse.Namespace:
    """With `measure` set, what `moe-dist plan --measure FILE` takes; else with the configuration as `config`."""
    if any(word.partition("=")[0] == "--measure" for word in args):
        return measure_arguments(args)
    own, config = with_config(plan_parser(), list(args), USAGE, ABOUT)
    own.config = config
    check_plan_arguments(own)
    return own


def plan_parser() -> Parser:
    """Shows the flags of --measure too, which plan_arguments hands to measure_arguments."""
    parser = Parser("moe-dist plan", add_help=False)
    add = parser.add_argument
    add("--ranks", type=int, metavar="W", help="processes of the run (GPUs); needed")
    add("--hardware", metavar="NAME", help=_HARDWARE)
    add("--ranks-per-node", type=int, metavar="N", help="processes on a node (default: those of the hardware)")
    add("--skew", type=float, default=1.0, metavar="X", help=_SKEW)
    add("--search", action="store_true", help=_SEARCH)
    add("--top", type=int, default=10, metavar="N", help="with --search, how many layouts are shown")
    add("--capacity", metavar="F,..", help=_CAPACITY)
    add("--dry-run", action="store_true", help=_DRY_RUN)
    add("--figures", metavar="FOLDER", help="draw memory and time by part there, as SVG and PNG (default: nowhere)")
    add("--json", action="store_true", help="print all numbers, for other programs")
    _add_measure(parser)
    return parser


def _add_measure(parser: Parser, required: bool = False) -> None:
    parser.add_argument("--measure", required=required, metavar="FILE", help=_MEASURE)
    parser.add_argument("--name", metavar="TEXT", help="with --measure: of the hardware (default: its chip and ranks)")
    parser.add_argument("--device", **DEVICE | {"help": f"with --measure: {DEVICE['help']}"})


def measure_arguments(args: Sequence[str]) -> argparse.Namespace:
    """Of `moe-dist plan --measure FILE`, which takes no configuration."""
    parser = Parser("moe-dist plan", add_help=False)
    _add_measure(parser, required=True)
    own, others = parser.parse_known_args(list(args))
    if others:
        raise ValueError(
            f"command line: --measure takes no {others[0]}: measure first, then plan with --hardware {own.measure}"
        )
    return own


def check_plan_arguments(own: argparse.Namespace) -> None:
    """Raises ValueError for what is missing, and for what does not go together."""
    if own.name is not None or own.device is not None:
        raise ValueError("command line: --name and --device are of --measure FILE; a plan has --hardware instead")
    if own.ranks is None:
        raise ValueError("command line: plan needs --ranks W, how many processes the run is for")
    if own.ranks < 1:
        raise ValueError(f"command line: --ranks {own.ranks} is below 1")
    if own.hardware is None and not own.dry_run:
        raise ValueError(
            "command line: plan needs --hardware NAME, such as h100, or the path of a file that --measure has written"
        )
    if own.ranks_per_node is not None and own.ranks_per_node < 1:
        raise ValueError(f"command line: --ranks-per-node {own.ranks_per_node} is below 1")
    if own.top < 1:
        raise ValueError(f"command line: --top {own.top} is below 1")
    if own.dry_run and (own.search or own.capacity):
        raise ValueError("command line: --dry-run is of one configuration; leave out --search and --capacity")
    if own.search and own.capacity:
        raise ValueError("command line: --search and --capacity are two questions; ask one after the other")
    if own.figures and (own.search or own.capacity or own.dry_run):
        raise ValueError("command line: --figures are of one plan; leave out --search, --capacity and --dry-run")
    if own.figures and Path(own.figures).exists() and not Path(own.figures).is_dir():
        raise ValueError(f"command line: --figures {own.figures} is a file: name a folder")


def capacity_factors(text: str) -> list[float | None]:
    """1.0,1.25,null -> [1.0, 1.25, None]. Raises ValueError naming what is no factor."""
    found: list[float | None] = []
    for word in text.split(","):
        value = read_value(word.strip()) if word.strip() else ""
        if value is None:
            found.append(None)
        elif isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf"):
            found.append(float(value))
        else:
            raise ValueError(f"command line: --capacity {word!r} is no capacity factor: write 1.0,1.25,null")
    return found
