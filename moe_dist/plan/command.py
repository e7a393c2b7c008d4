"""`moe-dist plan`: ask, and print what was found."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from moe_dist.config import Config
from moe_dist.plan.arguments import capacity_factors
from moe_dist.plan.figures import write_figures
from moe_dist.plan.hardware import Hardware, load_hardware
from moe_dist.plan.plan import Plan, make_plan
from moe_dist.plan.search import Price, Search, prices, search
from moe_dist.plan.text import console, print_plan, print_prices, print_search
from moe_dist.process import interrupts_held

FITS, DOES_NOT = 0, 1


def plan(own: argparse.Namespace) -> int:
    """own: of plan_arguments. Returns the exit code. Raises ValueError for what a user got wrong."""
    if own.measure is not None:
        with interrupts_held():
            from moe_dist.plan.measure import measure
        return measure(own)
    config: Config = own.config
    if own.dry_run:
        return _run_dry(config, own)
    hardware = hardware_of(own)
    if own.search:
        found = search(config, own.ranks, hardware, own.skew, own.top)
        if own.json:
            _print_json(search_as_json(found))
        else:
            print_search(found, hardware, console())
        return FITS if found.ranked else DOES_NOT
    if own.capacity is not None:
        priced = prices(config, own.ranks, hardware, capacity_factors(own.capacity), own.skew)
        if own.json:
            _print_json(prices_as_json(priced))
        else:
            print_prices(priced, console())
        return FITS if any(price.plan.fits for price in priced) else DOES_NOT
    made = make_plan(config, own.ranks, hardware, own.skew)
    if own.json:
        _print_json(made.as_json())
    else:
        print_plan(made, console())
    if own.figures:
        _draw(made, Path(own.figures), own.json)
    return FITS if made.fits else DOES_NOT


def hardware_of(own: argparse.Namespace) -> Hardware:
    """The file, with nodes of --ranks-per-node where that is given."""
    hardware = load_hardware(own.hardware)
    if own.ranks_per_node is None:
        return hardware
    return replace(hardware, ranks_per_node=own.ranks_per_node)


def search_as_json(found: Search) -> dict[str, Any]:
    """The fastest whole, and the reasons."""
    ranked = [asdict(choice) | {"flags": choice.flags(), "plan": plan.as_json()} for choice, plan in found.ranked]
    return {"tried": found.tried, "ranked": ranked, "fell_out": [asdict(reason) for reason in found.reasons]}


def prices_as_json(found: Sequence[Price]) -> list[dict[str, Any]]:
    return [
        {"capacity_factor": price.factor, "flops_at_most": price.flops, "plan": price.plan.as_json()} for price in found
    ]


def _run_dry(config: Config, own: argparse.Namespace) -> int:
    from moe_dist.plan.dry_run import dry_run, text  # it makes engines, and what they import takes seconds

    hardware = None if own.hardware is None else hardware_of(own)
    per_node = own.ranks_per_node or (None if hardware is None else hardware.ranks_per_node)
    limit = None if hardware is None else hardware.memory.usable
    found = dry_run(config, own.ranks, per_node, memory_limit=limit)
    if own.json:
        ranks = [
            {"rank": run.rank, "held": run.held, "peak": run.peak, "transfers": list(map(asdict, run.transfers))}
            for run in found.ranks
        ]
        _print_json({"problems": found.problems, "compared": found.compared, "ranks": ranks})
    else:
        print(text(found))
    return DOES_NOT if found.problems else FITS


def _draw(made: Plan, folder: Path, quiet: bool) -> None:
    files = write_figures(made, folder)
    if not quiet:
        print("figures: " + ", ".join(map(str, files)))


def _print_json(values: Any) -> None:
    print(json.dumps(values, indent=1))
