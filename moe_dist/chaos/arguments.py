"""What follows `moe-dist chaos`. Light: its help comes without torch."""

import argparse
from collections.abc import Sequence

from moe_dist.config.arguments import with_config
from moe_dist.config.flags import Parser

_ABOUT = """Break a training run on purpose, again and again, and prove that nothing was lost.

Starts the run root/NAME-chaos on its own ranks and, start after start, breaks it: SIGKILL at random moments and inside
saves, SIGSTOP, SIGTERM, a hang, a delay, a full disk, a flipped bit, a damaged checkpoint; each start resumes the one
before. It saves often and watches closely for that, and says what it sets. In the end it trains the same steps without
faults, root/NAME-reference, and compares weights, both moments, metrics.jsonl and the samples of each step, bit by bit.

  moe-dist chaos configs/chaos.yaml --minutes 10

What it saves on the way lies in NAME-chaos/starts, the report in NAME-chaos/chaos.json. Exit codes: 0 nothing was lost
and every start ended as its fault should end it; 1 otherwise, and the report says what; 2 a mistake of the user.
"""


def chaos_arguments(args: Sequence[str]) -> argparse.Namespace:
    """minutes, ranks, seed and config."""
    parser = Parser("moe-dist chaos", add_help=False)
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="how long faults come")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes, on this machine")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the faults")
    own, config = with_config(parser, list(args), "[--minutes M] [--ranks N] [--seed S]", _ABOUT)
    own.config = config
    return own
