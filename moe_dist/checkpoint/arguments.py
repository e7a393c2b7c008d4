"""What follows `moe-dist checkpoint`. Light: its help comes without torch."""

import argparse
from collections.abc import Sequence

from moe_dist.config.flags import Parser
from moe_dist.config.values import user_path

_ABOUT = """Look into checkpoints, without a model and without the ranks that wrote them.

  moe-dist checkpoint inspect PATH                     what is in it: step, parameters, files, configuration
  moe-dist checkpoint verify PATH                      every file against its SHA-256; exit code 1 names the bad ones
  moe-dist checkpoint convert PATH TARGET [flags]      the same in another precision or number of files
  moe-dist checkpoint diff PATH OTHER                  largest differences by parameter; exit code 1 when there are any

PATH is a checkpoint, or a run's folder: then all of its checkpoints for verify, for inspect the newest, and for convert
and diff the newest that is whole. These two read no file that does not match its SHA-256.
"""
_ACTIONS = {
    "inspect": ("what is in it", "Say what is in a checkpoint: its step, parameters, files and configuration."),
    "verify": (
        "every file against its SHA-256",
        "Read every file and compare it with its SHA-256. Exit code 1 where some differ, which are named.",
    ),
    "convert": (
        "another precision or number of files",
        "Write the same checkpoint anew, in another precision, another number of files, or without moments.",
    ),
    "diff": (
        "largest differences by parameter",
        "Compare two checkpoints: the largest difference of each parameter. Exit code 1 where there are any.",
    ),
}
"""Of each action: what it shows in a few words, and what it does."""


def checkpoint_arguments(args: Sequence[str]) -> argparse.Namespace:
    parser = Parser("moe-dist checkpoint", _ABOUT)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (words, about) in _ACTIONS.items():
        sub = commands.add_parser(name, prog=f"moe-dist checkpoint {name}", help=words, about=about)
        sub.add_argument("path", type=user_path, metavar="PATH", help="a checkpoint, or the folder of a run")
        if name == "diff":
            sub.add_argument("other", type=user_path, metavar="OTHER", help="another one, to compare it with")
        if name == "convert":
            files = "how many, of nearly equal size (default: as many as there are)"
            dtype = "of the weights; moments stay fp32 (default: as they are)"
            sub.add_argument("target", type=user_path, metavar="TARGET", help="the new checkpoint's folder")
            sub.add_argument("--dtype", choices=["fp32", "bf16"], help=dtype)
            sub.add_argument("--files", type=int, metavar="N", help=files)
            sub.add_argument("--weights-only", action="store_true", help="leave out the optimizer's moments")
    return parser.parse_args(list(args))
