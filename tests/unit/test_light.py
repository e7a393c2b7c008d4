"""What is not imported: help and mistakes come without torch, a layer without what reads files and command lines."""

import subprocess
import sys

HELP = """
import sys
from moe_dist.cli import main
commands = ["train", "status", "chaos", "generate", "experts", "checkpoint", "verify", "study", "watch"]
for args in [*commands, "checkpoint inspect"]:
    try:
        main([*args.split(), "--help"])
    except SystemExit as done:
        assert done.code == 0, args
    assert "torch" not in sys.modules, args
"""
LAYER = """
import torch, sys, time
before, began = set(sys.modules), time.process_time()
from moe_dist import MixtureOfExperts
print(time.process_time() - began)
added = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not added & {"argparse", "yaml", "pydantic", "rich", "tyro", "deepspeed", "megatron", "matplotlib"}, added
assert not {"moe_dist.cli", "moe_dist.config.load", "moe_dist.config.flags"} & set(sys.modules)
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_help_comes_without_torch() -> None:
    shown = run(HELP)
    assert shown.count("usage: moe-dist") == 10


def test_a_layer_reads_no_files_and_no_command_line_and_comes_at_once() -> None:
    """A tenth of a second of CPU time beside torch's two or more; a neighbour's load can only add to it."""
    assert any(float(run(LAYER)) < 0.3 for _ in range(3))
