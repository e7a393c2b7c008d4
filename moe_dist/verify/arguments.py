"""What follows `moe-dist verify`. Light: its help comes without torch."""

import argparse
from collections.abc import Sequence

from moe_dist.config.flags import Parser
from moe_dist.verify.cases import (
    LAYOUT_AXES,
    QUICK_LAYOUTS,
    QUICK_SETTINGS,
    SETTING_AXES,
    Axes,
    Options,
    every_layout,
    every_setting,
    layouts_of,
    parse_axes,
    settings_of,
)

_ABOUT = """Prove that training means the same in every layout.

Trains a tiny model once in a single process, then under each layout, and compares the losses, every gradient, the
gradient norm and the set of dropped tokens of every step. Exits with 1 when anything differs by more than rounding.
A routing decision that two equal scores could have taken either way is counted as a near tie, not as a difference.

Starts its own ranks on this machine; with --device cuda they share its GPUs where these are fewer. Under torchrun it
uses those ranks: torchrun --nproc_per_node 8 -m moe_dist.cli verify
"""


def verify_arguments(args: Sequence[str]) -> argparse.Namespace:
    """options, ranks and device. Raises ValueError for axes and values that do not exist."""
    parser = Parser("moe-dist verify", _ABOUT)
    add = parser.add_argument
    add("--layouts", nargs="+", default=[], metavar="AXIS=V,V", help=_axes_help("layouts", LAYOUT_AXES))
    add("--settings", nargs="+", default=[], metavar="AXIS=V,V", help=_axes_help("settings", SETTING_AXES))
    add("--all", action="store_true", help="every layout and setting (4 ranks on 2 cores: hours)")
    add("--ranks", type=int, default=4, metavar="W", help="processes to start")
    add("--steps", type=int, default=50, metavar="N", help="optimizer steps of each run")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where ranks compute")
    given = parser.parse_args(list(args))
    if given.steps < 1 or given.ranks < 1:
        raise ValueError(f"--steps={given.steps} and --ranks={given.ranks} must be at least 1")
    if given.all and not given.settings:
        settings = every_setting()
    else:
        settings = settings_of(parse_axes(given.settings, SETTING_AXES, QUICK_SETTINGS))
    if given.all and not given.layouts:
        layouts = every_layout()
    else:
        layouts = layouts_of(parse_axes(given.layouts, LAYOUT_AXES, QUICK_LAYOUTS))
    given.options = Options(settings, layouts, given.steps)
    return given


def _axes_help(what: str, axes: Axes) -> str:
    known = "; ".join(f"{name}={','.join(values)}" for name, values in axes.items())
    return f"{what} to compare (default: a few quick ones), of {known}"
