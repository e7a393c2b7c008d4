"""What follows `moe-dist experts`. Light: its help comes without torch."""

import argparse
from collections.abc import Sequence

from moe_dist.config.flags import Parser
from moe_dist.config.values import user_path

_ABOUT = """Change the experts of a trained model, without training.

  moe-dist experts RUN list
  moe-dist experts RUN add 2 --output runs/more        closed copies: outputs stay the same, to the bit
  moe-dist experts RUN open 8,9 --output runs/open     tokens may go to them from here on
  moe-dist experts RUN close 3 --output runs/closed
  moe-dist experts RUN remove 3 --output runs/fewer    closed ones: outputs stay the same, to the bit

RUN is a run folder, whose newest whole checkpoint is taken, or one checkpoint in it. Nothing in it changes. --output
becomes a run folder that `moe-dist train OUTPUT/config.yaml --resume --train.steps N` continues.
"""


def experts_arguments(args: Sequence[str]) -> argparse.Namespace:
    parser = Parser("moe-dist experts", _ABOUT)
    parser.add_argument("run", type=user_path)
    parser.add_argument("action", choices=["list", "add", "open", "close", "remove"])
    parser.add_argument("which", nargs="?", default="", help="how many to add, or numbers of experts: 3 or 0,4,5")
    parser.add_argument("--init", choices=["clone", "random"], default="clone", help="what added experts start from")
    parser.add_argument("--output", type=user_path, help="the new run folder")
    return parser.parse_args(list(args))
