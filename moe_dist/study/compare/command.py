"""`moe-dist compare RUN... [--output FOLDER]`."""

import argparse

from moe_dist.study.compare.page import comparison
from moe_dist.study.compare.runs import labels, read_run
from moe_dist.study.page.write import write_page


def compare(own: argparse.Namespace) -> int:
    """Returns the exit code 0. Raises ValueError for a folder that holds no run, and for a run without a step."""
    runs = [read_run(folder, label) for folder, label in zip(own.runs, labels(own.runs), strict=True)]
    written = write_page(comparison(runs, own.output), own.output)
    print("\n".join(str(path) for path in written if path.parent == own.output))
    return 0
