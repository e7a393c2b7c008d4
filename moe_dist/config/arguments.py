"""What follows a command that takes a configuration: its file, flags of the command, flags of the configuration. Light:
its help comes without torch.
"""

import argparse

from moe_dist.config.describe import describe_keys, describe_sections
from moe_dist.config.flags import Parser, override_config
from moe_dist.config.load import load_config
from moe_dist.config.schema import Config


def with_config(
    parser: Parser, args: list[str], own_usage: str, about: str, needed: bool = True
) -> tuple[argparse.Namespace, Config]:
    """A YAML file, flags of the command itself, and flags of the configuration. needed: without either of the first and
    the last ValueError is raised; else the defaults are meant."""
    parser.takes_config, parser.description = True, about
    parser.usage = f"{parser.prog} CONFIG {own_usage} [--KEY VALUE ...]"
    path, rest = (args[0], args[1:]) if args and not args[0].startswith("-") else (None, args)
    asked = next((at for at, word in enumerate(rest) if word in ("-h", "--help")), None)
    if asked is not None:
        topic = next((word for word in rest[asked + 1 : asked + 2] if not word.startswith("-")), "")
        _print_help(parser.usage, about, topic, load_config(path) if path else Config())
        raise SystemExit(0)
    own, flags = parser.parse_known_args(rest)
    if needed and path is None and not flags:
        raise ValueError(
            f"{parser.prog} needs a configuration: {parser.prog} CONFIG, for example configs/tiny.yaml, which one core "
            f"trains in seconds; {parser.prog} --help tells more"
        )
    return own, override_config(load_config(path), flags, [f"--{name.replace('_', '-')}" for name in vars(own)])


def _print_help(usage: str, about: str, topic: str, config: Config) -> None:
    print(describe_keys(topic, config) if topic else f"usage: {usage}\n\n{about}\n{describe_sections()}")
