"""What follows `moe-dist train`, commands that take the same, and `moe-dist config`. Light: no torch."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from moe_dist.config.arguments import with_config
from moe_dist.config.flags import Parser
from moe_dist.config.schema import Config

_CONFIG = """Print a configuration as a run would have it: the file, with flags on top and defaults filled in, as YAML.

  moe-dist config configs/quickstart.yaml                                 all of it
  moe-dist config configs/quickstart.yaml --diff                          what differs from the defaults
  moe-dist config configs/quickstart.yaml --resolve --parallel.ep 2       what `auto` and null mean here
  moe-dist config configs/quickstart.yaml model.moe.top_k                 type, default, value and meaning of a key
  moe-dist config model.moe                                               the same of a section, without a file

--diff       leave out what is as by default
--resolve    check it as a run would; put what `auto` means on this machine in its place, and what some nulls mean
             behind them
--ranks      with --resolve: of how many (default: those of torchrun or Slurm here, else 1)
--device     with --resolve: cpu or cuda (default: cuda where there is any)
"""


def run_arguments(command: str, args: list[str], description: str) -> tuple[argparse.Namespace, Config]:
    """What follows `moe-dist train`."""
    parser = Parser(f"moe-dist {command}", add_help=False)
    parser.add_argument("--resume", nargs="?", choices=["never", "auto", "must"], default="never", const="must")
    parser.add_argument("--override")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--profile")
    own = "[--resume [{must,auto,never}]] [--override NAME,..] [--device {cpu,cuda}] [--profile steps=A-B]"
    return with_config(parser, args, own, description)


def config_arguments(args: Sequence[str]) -> argparse.Namespace:
    """config, topics, diff, resolve, ranks and device. Raises ValueError for what does not go together."""
    parser = Parser("moe-dist config", add_help=False)
    parser.add_argument("--diff", action="store_true")
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--device", choices=["cpu", "cuda"])
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
