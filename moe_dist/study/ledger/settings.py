"""The settings that a point was trained with, beside those that its study gives it now. Light: no torch.

| where                             | says                                                                      |
|-----------------------------------|---------------------------------------------------------------------------|
| point.yaml, in the point's folder | all of them, as they were when the point first started                    |
| config_hash of the ledger's line  | a hash of them, also where the folder has gone; another version, which    |
|                                   | has keys that this one has not, may give the same settings another        |
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from moe_dist.config import Config
from moe_dist.config.load import dump_config, load_config
from moe_dist.study.design.grid import Point


def config_hash(config: Config) -> str:
    """SHA-256 of everything but run.name and run.root."""
    values = asdict(config)
    del values["run"]["name"], values["run"]["root"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def other_settings(point: Point, record: Mapping[str, Any] | None) -> dict[str, str]:
    """What is not as it was: key -> '8, now 9'. By point.yaml; where there is none, by the config_hash of `record`, the
    point's last line. Empty where nothing is known either.

    Raises ValueError for a point.yaml that is no configuration.
    """
    path, now = point.folder / "point.yaml", config_hash(point.config)
    if not path.exists():
        before = None if record is None else record.get("config_hash")
        return {} if before in (None, now) else {"config_hash": f"{str(before)[:12]}, now {now[:12]}"}
    if path.read_text(encoding="utf-8") == dump_config(point.config):
        return {}
    old, new = (dict(_flat(asdict(config))) for config in (load_config(path), point.config))
    keys = [key for key in old | new if old.get(key) != new.get(key)]
    return {key: f"{old.get(key, 'not set')}, now {new.get(key, 'not set')}" for key in keys}


def _flat(values: Mapping[Any, Any], home: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys; those of a capacity_schedule end in a number."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{home}{key}.")
        else:
            yield f"{home}{key}", json.dumps(value)
