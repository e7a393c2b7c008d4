"""What is not imported: help and mistakes come without torch, a layer without what reads files and command lines, a
step of training on the native engine without torch's compiler."""

import subprocess
import sys

from moe_dist.cli import COMMANDS

HELP = """
import sys
from moe_dist.cli import COMMANDS, main
deeper = "checkpoint inspect, data prepare, data inspect, data tokenizer, import hf, export hf".split(", ")
for args in [*COMMANDS, *deeper]:
    try:
        main([*args.split(), "--help"])
    except SystemExit as done:
        assert done.code == 0, args
    assert "torch" not in sys.modules, args
assert main(["config", "configs/tiny.yaml", "--diff"]) == main(["config", "model.moe.top_k"]) == 0
assert "torch" not in sys.modules
"""
LAYER = """
import torch, sys, time
before, began = set(sys.modules), time.process_time()
from moe_dist import MixtureOfExperts
print(time.process_time() - began)
import moe_dist
assert all(getattr(moe_dist, name) for name in moe_dist._LAYERS)
added = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not added & {"argparse", "yaml", "pydantic", "rich", "tyro", "deepspeed", "megatron", "matplotlib"}, added
assert not added & {"wandb", "tensorboard", "transformers", "triton"}, added
assert not {"moe_dist.cli", "moe_dist.config.load", "moe_dist.config.flags"} & set(sys.modules)
"""
STEP = """
from moe_dist.parallel.mesh import single_process_mesh
from tests.dist.helpers import TinyRun, tiny_config
TinyRun(tiny_config(engine__name="native"), single_process_mesh()).train(0, 1)
assert "torch._dynamo" not in sys.modules
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_help_comes_without_torch() -> None:
    shown = run(HELP)
    assert shown.count("usage: moe-dist") == len(COMMANDS) + 6


def test_a_layer_comes_at_once_and_a_step_without_the_compiler() -> None:
    """A tenth of a second of CPU time beside torch's two or more; a neighbour's load can only add to it."""
    assert any(float(run(LAYER + STEP)) < 0.3 for _ in range(3))
