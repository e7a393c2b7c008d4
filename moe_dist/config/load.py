"""Reads a run's configuration: a YAML file, then flags of the command line, both checked strictly.

Nothing is guessed. A key that does not exist, a value of the wrong type or a key given twice is refused, all problems
at once, each with the file, the key and the nearest right one. Rules that tie two fields together are in `validate.py`.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import tyro
import yaml

from moe_dist.config.parse import parse_dict
from moe_dist.config.read import Dumper, read_yaml
from moe_dist.config.schema import Config


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the YAML file `path` (None: all defaults), changed by flags such as `--model.moe.top-k 1`.

    Raises ValueError naming every unknown key and wrong type. Flags that do not parse end the program, as flags do.
    """
    config = Config() if path is None else parse_dict(read_yaml(Path(path)), str(path))
    return override_config(config, overrides) if overrides else config


def override_config(
    config: Config, args: Sequence[str], prog: str | None = None, description: str | None = None
) -> Config:
    """`config` with command-line flags on top; `--help` lists every field with its docstring and present value."""
    overridden = tyro.cli(Config, default=config, args=list(args), prog=prog, description=description)
    return parse_dict(asdict(overridden), "command line")


def dump_config(config: Config) -> str:
    """YAML with every field, in the order of the schema. Loading it gives an equal Config."""
    return yaml.dump(asdict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
