"""What follows `moe-dist plan`. Light: its help comes without torch."""

import argparse
from collections.abc import Sequence

from moe_dist.config.arguments import with_config
from moe_dist.config.flags import Parser
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

--ranks           processes of the run (GPUs)
--hardware        a file of configs/hardware by its name (h100, h200, a100, b200), or the path of one
--ranks-per-node  where it differs from the hardware's
--skew            rows of the busiest rank's experts over an even share, for the time (default 1.0)
--search          rank all layouts by planned time: ep, tp, etp, ZeRO stage, micro-batch, recompute, dispatch and wire;
                  with --top, how many are shown (default 10)
--capacity        what each of these capacity factors costs; null drops nothing
--dry-run         run a training step of ranks of every kind in a fake world, and compare what they exchange
--measure FILE    no plan: measure this machine, or under torchrun the nodes of this job, and write a hardware file;
                  --device and --name as for it
--figures FOLDER  memory and time by part, as SVG and PNG
--json            all numbers, for other programs

Exit codes: 0 it fits; 1 it does not, or the dry run found a fault; 2 a mistake of the user.
"""


def plan_arguments(args: Sequence[str]) -> argparse.Namespace:
    """With `measure` set, what `moe-dist plan --measure FILE` takes; else with the configuration as `config`."""
    if any(word.partition("=")[0] == "--measure" for word in args):
        return measure_arguments(args)
    own, config = with_config(plan_parser(), list(args), USAGE, ABOUT)
    own.config = config
    own.measure = None
    check_plan_arguments(own)
    return own


def plan_parser() -> Parser:
    parser = Parser("moe-dist plan", add_help=False)
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--hardware")
    parser.add_argument("--ranks-per-node", type=int)
    parser.add_argument("--skew", type=float, default=1.0)
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--top", type=int, default=10)
    parser.add_argument("--capacity")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--figures")
    parser.add_argument("--json", action="store_true")
    return parser


def measure_arguments(args: Sequence[str]) -> argparse.Namespace:
    """Of `moe-dist plan --measure FILE`, which takes no configuration."""
    parser = Parser("moe-dist plan", add_help=False)
    parser.add_argument("--measure", required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--name")
    own, others = parser.parse_known_args(list(args))
    if others:
        raise ValueError(
            f"command line: --measure takes no {others[0]}: measure first, then plan with --hardware {own.measure}"
        )
    return own


def check_plan_arguments(own: argparse.Namespace) -> None:
    """Raises ValueError for what is missing, and for what does not go together."""
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
