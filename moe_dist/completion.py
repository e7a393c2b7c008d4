"""`moe-dist completion`: what a shell needs to complete commands, flags, choices, paths and keys of the configuration.

shtab makes the script of the parsers; it is static, so that a press of Tab starts no Python. What takes neither a
number nor one of several words may be a path, and is completed as one.
"""

import argparse
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from moe_dist.config.describe import Key, keys, sections
from moe_dist.config.flags import Parser

SHELLS = ("bash", "zsh", "fish")
_ABOUT = """Print a script that completes moe-dist in a shell: commands, flags, choices, files, keys of configurations.

  moe-dist completion bash > ~/.local/share/bash-completion/completions/moe-dist
  moe-dist completion zsh > ~/.zfunc/_moe-dist                              with fpath+=~/.zfunc before compinit
  moe-dist completion fish > ~/.config/fish/completions/moe-dist.fish

New shells have it then. For this one alone: source <(moe-dist completion bash)
"""


def completion_arguments(args: Sequence[str]) -> argparse.Namespace:
    """shell. Raises ValueError where shtab is missing."""
    parser = Parser("moe-dist completion", _ABOUT)
    parser.add_argument("shell", choices=SHELLS, help="which shell the script is for")
    own = parser.parse_args(list(args))
    if find_spec("shtab") is None:
        raise ValueError("moe-dist completion needs shtab, which is not installed: pip install shtab")
    return own


def script(shell: str, commands: Iterable[tuple[str, str, Parser]]) -> str:
    """commands: (name, a line about it, what reads the words behind it) of each."""
    import shtab

    root = argparse.ArgumentParser("moe-dist")
    below = root.add_subparsers()
    for name, about, parser in commands:
        parents = [_with_keys(parser, name == "config") if parser.takes_config else parser]
        below.add_parser(name, help=about, parents=parents, add_help=False)
    _complete_paths(root, shtab.FILE)
    text: str = shtab.complete(root, shell)
    return text


def _with_keys(parser: Parser, explains: bool) -> argparse.ArgumentParser:
    """With the words that argparse does not see: the file, --help with its topics, and the keys; explains: `moe-dist
    config`, which takes topics too."""
    topics = [name for name in (*sections(), *keys()) if name]
    whole = argparse.ArgumentParser(add_help=False)
    whole.add_argument("config", nargs="?", help="YAML file of a configuration")
    if explains:
        whole.add_argument("topics", nargs="*", choices=topics, help="section or key")
    whole.add_argument("--help", nargs="?", choices=["all", *topics], help="of the command, a section or a key")
    whole = argparse.ArgumentParser(parents=[whole, parser], add_help=False)
    for key in keys().values():
        whole.add_argument(key.flag, help=_first_sentence(key.text), **_takes(key))
    return whole


def _takes(key: Key) -> dict[str, Any]:
    """What follows the flag of a key, in argparse's words."""
    kinds = get_args(key.hint) if get_origin(key.hint) in (Union, UnionType) else (key.hint,)
    several = any(get_origin(kind) in (list, dict) for kind in kinds)
    choices = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if bool in kinds:
        return {"nargs": "?", "choices": ["true", "false"]}
    return {
        "nargs": "*" if several else None,
        "choices": choices or None,
        "type": str if str in kinds or list[str] in kinds else float,
    }


def _complete_paths(parser: argparse.ArgumentParser, file: Any) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _complete_paths(inner, file)
        elif action.nargs != 0 and not action.choices and action.type not in (int, float):
            action.complete = file  # type: ignore[attr-defined]  # of shtab


def _first_sentence(text: str) -> str:
    """For zsh and fish, which show it beside the flag; % would be argparse's."""
    return " ".join(text.split()).partition(". ")[0].rstrip(".").replace("%", "%%")
