"""What follows `moe-dist compare`. Light: no torch, no matplotlib."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from moe_dist.config.flags import Parser
from moe_dist.config.values import user_path

MOST = 16
"""Runs on a page, beyond which no colour and marker is left to tell them apart."""

_ABOUT = """Write a page that shows a few runs side by side: curves of the losses, drops, load and speed, how they
ended, and in what their configurations, versions and machines differ.

RUN is the folder of a run, root/NAME, of one study, of several or of none. It may still be running. The page is
FOLDER/report.html, one file that needs no network; report.md, figures/ and data/ (CSV) lie beside it.
One run each says nothing of chance: `moe-dist study` compares settings over seeds.
"""


def compare_arguments(args: Sequence[str]) -> argparse.Namespace:
    """runs: list[Path], output: Path. Raises ValueError for a run that is named twice, or for too many."""
    parser = Parser("moe-dist compare", _ABOUT)
    parser.add_argument("runs", nargs="+", type=user_path, metavar="RUN", help="folders of runs, root/NAME")
    parser.add_argument("--output", type=user_path, default=Path("comparison"), metavar="FOLDER", help="of the page")
    own = parser.parse_args(list(args))
    places = [run.resolve() for run in own.runs]
    twice = next((run for run, place in zip(own.runs, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is named twice; name each run once")
    if len(places) > MOST:
        raise ValueError(f"{len(places)} runs are too many for one page, which shows {MOST}; leave some out")
    return own
