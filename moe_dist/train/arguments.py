"""What follows `moe-dist train`, and commands that take the same. Light: its help comes without torch."""

import argparse

from moe_dist.config.arguments import with_config
from moe_dist.config.flags import Parser
from moe_dist.config.schema import Config


def run_arguments(command: str, args: list[str], description: str) -> tuple[argparse.Namespace, Config]:
    """What follows `moe-dist train`."""
    parser = Parser(f"moe-dist {command}", add_help=False)
    parser.add_argument("--resume", nargs="?", choices=["never", "auto", "must"], default="never", const="must")
    parser.add_argument("--override")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--profile")
    own = "[--resume [{must,auto,never}]] [--override NAME,..] [--device {cpu,cuda}] [--profile steps=A-B]"
    return with_config(parser, args, own, description)
