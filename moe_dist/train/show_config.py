"""`moe-dist config`: a configuration as a run would have it, and what its keys mean; torch only for --resolve.

--resolve says what is settled when a run starts, for so many ranks on this machine:

    auto    its place is taken by what it stands for      dispatch: all_to_all  # auto
    null    stays, as it means something elsewhere too    micro_batch: null  # 8 on 2 ranks
"""

import argparse
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import yaml

from moe_dist.config.describe import explain, keys
from moe_dist.config.model import MoEConfig
from moe_dist.config.read import Dumper
from moe_dist.config.schema import Config
from moe_dist.config.validate import validate


def show_config(own: argparse.Namespace) -> int:
    """own: of config_arguments. Returns the exit code, 0. Raises ValueError for a configuration that no run would
    take, where it is resolved, and for an unknown key."""
    config: Config = own.config
    notes: dict[str, str] = {}
    if own.resolve:
        config, notes = resolved(config, own.ranks, own.device)
    if own.topics:
        print("\n\n".join(explain(topic, config) for topic in own.topics))
    else:
        print(as_yaml(differences(config) if own.diff else asdict(config), notes), end="")
    return 0


def differences(config: Config) -> dict[str, Any]:
    """What is not as by default, in its sections."""
    found: dict[str, Any] = {}
    for path, key in keys().items():
        value, (*homes, name) = key.value_in(config), path.split(".")
        if value != key.default:
            home = found
            for section in homes:
                home = home.setdefault(section, {})
            home[name] = value
    return found


def resolved(config: Config, ranks: int | None, device: str | None) -> tuple[Config, dict[str, str]]:
    """(what a run of so many ranks would settle on, comments by key). Raises ValueError as the run would."""
    import torch  # seconds

    from moe_dist.kernels.grouped_mm.onednn import named
    from moe_dist.models.backends import resolve_backends
    from moe_dist.parallel.launch import rank_from_environment

    world = ranks if ranks is not None else rank_from_environment(os.environ).world
    device_type = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        shape = validate(config, world)
    except ValueError as error:
        raise ValueError(str(error) if ranks else f"{error} (--ranks W says for how many; here {world})") from None
    model = resolve_backends(config.model, config.parallel.expert_ranks, device_type, config.train.seq_len)
    balance: Any = model.moe.balanced_by
    moe = replace(model.moe, balance=balance)
    if moe.experts == "grouped_mm" and moe.cpu_products == "auto" and device_type == "cpu":
        moe = replace(moe, cpu_products=named("auto"))
    settled = replace(config, model=replace(model, moe=moe))
    before, of_world = keys(), f"on {world} rank{'s' if world > 1 else ''}"
    notes = {path: "auto" for path, key in before.items() if key.value_in(config) != key.value_in(settled)}
    nulls = {
        "train.micro_batch": f"{shape.micro_batch} {of_world}",
        "train.accumulation": f"{shape.accumulation} {of_world}",
        "train.data_seed": f"{config.train.order_seed}, the seed",
        "model.head_dim": str(model.head_width),
        **_nulls_of_experts(moe, config.model.d_ff),
    }
    return settled, notes | {path: note for path, note in nulls.items() if before[path].value_in(config) is None}


def _nulls_of_experts(moe: MoEConfig, d_ff: int) -> dict[str, str]:
    if moe.num_experts == 0:
        return {}
    found = {"model.moe.d_ff": str(d_ff), "model.moe.first": str(moe.first_layer)}
    if moe.num_shared_experts and not isinstance(moe.d_ff, list):
        found["model.moe.shared_d_ff"] = str(moe.d_ff or d_ff)
    return found


def as_yaml(values: Mapping[str, Any], notes: Mapping[str, str]) -> str:
    """notes: comments for the ends of lines, by dotted key."""
    text = yaml.dump(dict(values), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    return "".join(f"{line}\n" for line in _commented(text.splitlines(), notes))


def _commented(lines: list[str], notes: Mapping[str, str]) -> Iterator[str]:
    path: list[str] = []
    for line in lines:
        depth, name = (len(line) - len(line.lstrip())) // 2, line.strip().partition(":")[0]
        path = [*path[:depth], name]
        note = notes.get(".".join(path))
        yield line if note is None else f"{line}  # {note}"
