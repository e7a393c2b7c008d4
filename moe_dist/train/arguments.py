"""What follows `moe-dist train`, commands that take the same, and `moe-dist config`. Light: no torch."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_dist.config.arguments import with_config
from moe_dist.config.flags import DEVICE, Parser
from moe_dist.config.schema import Config

_CONFIG = """Print a configuration as a run would have it: the file, with flags on top and defaults filled in, as YAML.

  moe-dist config configs/quickstart.yaml                                 all of it
  moe-dist config configs/quickstart.yaml --diff                          what differs from the defaults
  moe-dist config configs/quickstart.yaml --resolve --parallel.ep 2       what `auto` and null mean here
  moe-dist config configs/quickstart.yaml model.moe.top_k                 type, default, value and meaning of a key
  moe-dist config model.moe                                               the same of a section, without a file
"""


def run_arguments(command: str, args: list[str], description: str) -> tuple[argparse.Namespace, Config]:
    """What follows `moe-dist train`."""
    parser = Parser(f"moe-dist {command}", add_help=False)
    add_train_flags(parser)
    own = "[--resume [{must,auto,never}]] [--override NAME,..] [--device {cpu,cuda}] [--profile steps=A-B]"
    return with_config(parser, args, own, description)


def add_train_flags(parser: Parser, shown: bool = True) -> None:
    """shown: False for a command that takes what `moe-dist train` takes, and has no use for these."""
    flags: dict[str, dict[str, Any]] = {
        "--resume": {
            "nargs": "?",
            "choices": ["never", "auto", "must"],
            "default": "never",
            "const": "must",
            "help": "go on from the run's newest checkpoint; auto: or start it where there is none, and return at once "
            "when it has finished, so that the same command, again and again, brings a run to its end (default: never; "
            "without a word: must)",
        },
        "--override": {
            "metavar": "NAME,..",
            "help": "with --resume, what may differ from the run until now: data, tokenizer, seed, data_seed, seq_len, "
            "global_batch, model (default: nothing)",
        },
        "--device": DEVICE,
        "--profile": {
            "metavar": "steps=A-B",
            "help": "write a trace of these steps, counted from 1, and their memory to profile/ of the run's folder "
            "(default: none)",
        },
    }
    for name, options in flags.items():
        parser.add_argument(name, **(options if shown else options | {"help": argparse.SUPPRESS}))


def config_arguments(args: Sequence[str]) -> argparse.Namespace:
    """config, topics, diff, resolve, ranks and device. Raises ValueError for what does not go together."""
    parser = Parser("moe-dist config", add_help=False)
    parser.add_argument("--diff", action="store_true", help="leave out what is as by default")
    parser.add_argument(
        "--resolve",
        action="store_true",
        help="check it as a run would; put what `auto` means on this machine in its place, and what some nulls mean "
        "behind them",
    )
    ranks = "with --resolve: for how many (default: those of torchrun or Slurm here, else 1)"
    parser.add_argument("--ranks", type=int, metavar="W", help=ranks)
    parser.add_argument("--device", **DEVICE | {"help": "with --resolve: for which (default: cuda where there is any)"})
    words = list(args)
    first = next((at for at, word in enumerate(words) if word.startswith("-")), len(words))
    topics, flags = words[:first], words[first:]
    file = topics[:1] if topics and _names_file(topics[0]) else []
    usage = "[KEY ...] [--diff] [--resolve [--ranks W] [--device {cpu,cuda}]]"
    own, config = with_config(parser, file + flags, usage, _CONFIG, needed=False)
    own.config = config
    own.topics = topics[len(file) :]
    if own.topics and own.diff:
        raise ValueError("command line: --diff prints and a KEY explains: ask one after the other")
    if (own.ranks is not None or own.device is not None) and not own.resolve:
        raise ValueError("command line: --ranks and --device say what to resolve for: give --resolve too")
    if own.ranks is not None and own.ranks < 1:
        raise ValueError(f"command line: --ranks {own.ranks} is below 1")
    return own


def _names_file(word: str) -> bool:
    """Else it is a key or a section."""
    return word.endswith((".yaml", ".yml")) or os.sep in word or Path(word).exists()
