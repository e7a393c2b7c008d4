"""Reads a run's configuration: a YAML file, then flags of the command line, both checked strictly.

Nothing is guessed. A key that does not exist, a value of the wrong type or a key given twice is refused, all problems
at once, each with the file, the key and the nearest right one. Rules that tie two fields together are in `rules/`.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from moe_dist.config.flags import override_config
from moe_dist.config.parse import parse_dict
from moe_dist.config.read import Dumper, read_yaml
from moe_dist.config.schema import Config
from moe_dist.config.values import user_path


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the YAML file `path` (None: all defaults), changed by flags such as `--model.moe.top-k 1`.

    Raises ValueError naming every unknown key and wrong type.
    """
    config = Config() if path is None else parse_dict(read_yaml(user_path(str(path))), str(path))
    return override_config(config, overrides) if overrides else config


def dump_config(config: Config) -> str:
    """YAML with every field, in the order of the schema. Loading it gives an equal Config."""
    return yaml.dump(asdict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
