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
    """A YAML file, flags of the command itself, and flags of the configuration. own_usage: of the flags, where the
    parser has no usage of its own. needed: without either of the first and the last ValueError is raised; else the
    defaults are meant."""
    parser.takes_config, parser.description = True, about
    parser.usage = parser.usage or f"{parser.prog} CONFIG {own_usage} [--KEY VALUE ...]"
    path, rest = (args[0], args[1:]) if args and not args[0].startswith("-") else (None, args)
    asked = next((at for at, word in enumerate(rest) if word in ("-h", "--help")), None)
    if asked is not None:
        topic = next((word for word in rest[asked + 1 : asked + 2] if not word.startswith("-")), "")
        print(describe_keys(topic, load_config(path) if path else Config()) if topic else _help(parser))
        raise SystemExit(0)
    own, flags = parser.parse_known_args(rest)
    if needed and path is None and not flags:
        raise ValueError(
            f"{parser.prog} needs a configuration: {parser.prog} CONFIG, for example configs/tiny.yaml, which one core "
            f"trains in seconds; {parser.prog} --help tells more"
        )
    return own, override_config(load_config(path), flags, [f"--{name.replace('_', '-')}" for name in vars(own)])


def _help(parser: Parser) -> str:
    return f"usage: {parser.usage}\n\n{parser.description}\n{parser.flags()}\n{describe_sections()}"
