"""Whether all ranks start the same run: an edit of a file, or an update of a package, that reached some machines only
would train on, and mean nothing.
"""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import moe_dist
from moe_dist.config import Config
from moe_dist.parallel.objects import gather_json
from moe_dist.train.record.run_folder import package_versions

_SHOWN = 8


def require_one_start(config: Config) -> None:
    """Every rank must call. Raises ValueError on every rank, naming what differs and where, unless all of them have the
    same configuration, Python, packages and source of moe_dist."""
    mine = start_of(config)
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    if len(set(gather_json(digest))) == 1:
        return
    differ = differences(gather_json(mine))
    more = f"; and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
    raise ValueError(
        f"ranks do not start the same run: {'; '.join(differ[:_SHOWN])}{more}: "
        "give every machine the same files, flags and packages"
    )


def start_of(config: Config) -> dict[str, str]:
    """What must be equal on all ranks, by name."""
    settings = {key: json.dumps(value) for key, value in leaves(asdict(config)).items()}
    packages = {name: version or "absent" for name, version in package_versions().items()}
    return settings | packages | {"Python": platform.python_version(), "the source of moe_dist": source_digest()}


def source_digest() -> str:
    """Of all files of the package: a revision would not tell two edited copies apart."""
    root, digest = Path(moe_dist.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def leaves(values: Mapping[str, Any], home: str = "") -> dict[str, Any]:
    """Nested settings by dotted name: {"optim": {"lr": 1}} is {"optim.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= leaves(value, f"{home}{key}.") if isinstance(value, dict) else {home + key: value}
    return flat


def differences(starts: Sequence[Mapping[str, str]]) -> list[str]:
    """For example `optim.lr is 0.001 on rank 0, 0.002 on ranks 1 and 3`. starts: of each rank."""
    found = []
    for name in dict.fromkeys(name for start in starts for name in start):
        ranks: dict[str, list[int]] = {}
        for rank, start in enumerate(starts):
            ranks.setdefault(start.get(name, "absent"), []).append(rank)
        if len(ranks) > 1:
            found.append(f"{name} is " + ", ".join(f"{value} on {_ranks(where)}" for value, where in ranks.items()))
    return found


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 4:
        return f"ranks {ranks[0]}, {ranks[1]} and {len(ranks) - 2} more"
    return "ranks " + ", ".join(map(str, ranks[:-1])) + f" and {ranks[-1]}"
