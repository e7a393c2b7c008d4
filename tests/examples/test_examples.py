"""Every example runs from start to end and says what it promises to show."""

import re
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
ON_TWO_RANKS = ("with_ddp.py", "with_deepspeed.py", "with_fsdp2.py")  # tests/dist/test_examples.py
NEEDS = {"with_trainer.py": ("transformers", "accelerate")}
SLOW = ("with_compile.py", "with_trainer.py")  # what they show takes a compiler, or imports


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SAYS])
def test_example(name: str) -> None:
    if not all(find_spec(package) for package in NEEDS.get(name, ())):
        pytest.skip(f"needs {' and '.join(NEEDS[name])}")
    done = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout


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
