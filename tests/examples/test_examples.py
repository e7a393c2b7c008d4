"""Every example runs from start to end and says what it promises to show."""

import os
import re
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SAYS = {
    "classifier.py": "not a bit has changed: True",
    "multi_query_attention.py": "keys in the cache: (4, 1, 10, 64) with one head",
    "own_model.py": "tokens to each expert of the last block: [",
    "routed_attention.py": "causal_routing=True: outputs of tokens 0 to 49 change by 0.0e+00",
    "switch_attention.py": "attention experts each: [",
    "trainer_parts.py": "against a single process, 2 steps each: all agree",
    "transformer_block.py": "the sixth token with the cache and without",
    "with_compile.py": "gradients {torch.float32}",
    "with_trainer.py": "Trainer: losses",
}
ON_TWO_RANKS = {
    "with_ddp.py": "experts over ranks: losses",
    "with_deepspeed.py": "DeepSpeed: losses",
    "with_fsdp2.py": "FSDP2: losses",
}
NEEDS = {"with_trainer.py": ("transformers", "accelerate")}
SLOW = ("with_compile.py", "with_trainer.py", "trainer_parts.py")  # what they show takes a compiler, imports, ranks


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SAYS])
def test_example(name: str) -> None:
    if not all(find_spec(package) for package in NEEDS.get(name, ())):
        pytest.skip(f"needs {' and '.join(NEEDS[name])}")
    done = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout


@pytest.mark.parametrize("name", ON_TWO_RANKS)
def test_example_on_two_ranks(name: str) -> None:
    """With the environment that torchrun gives. Each compares its losses with those of one process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = []
    for rank in ("0", "1"):
        who = {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        command, both = [sys.executable, EXAMPLES / name], subprocess.PIPE
        ranks.append(subprocess.Popen(command, env=os.environ | where | who, stdout=both, stderr=both, text=True))
    try:
        said = [process.communicate(timeout=120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors for _, errors in said)
    assert ON_TWO_RANKS[name] in said[0][0]


def test_the_guide_shows_what_is_run() -> None:
    """Every piece of Python in docs/how-to/library.md stands so in an example."""
    programs = [_plain(path.read_text()) for path in EXAMPLES.glob("*.py")]
    pieces = re.findall(r"^```python\n(.*?)^```", (EXAMPLES.parent / "docs/how-to/library.md").read_text(), re.M | re.S)
    assert len(pieces) > 10
    for piece in pieces:
        assert any(_plain(piece) in program for program in programs), piece


def _plain(code: str) -> str:
    """Whatever it is indented by."""
    return "\n".join(line.strip() for line in code.strip().splitlines())


def test_no_example_is_left_out() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SAYS, *ON_TWO_RANKS, "draw_classifier.py"}
