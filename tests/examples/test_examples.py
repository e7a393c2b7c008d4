"""Every example runs from start to end and says what it promises to show."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SAYS = {
    "classifier.py": "not a bit has changed: True",
    "multi_query_attention.py": "keys in the cache: (4, 1, 10, 64) with one head",
    "routed_attention.py": "causal_routing=True: outputs of tokens 0 to 49 change by 0.0e+00",
    "switch_attention.py": "attention experts each: [",
    "transformer_block.py": "the sixth token with the cache and without",
}


@pytest.mark.parametrize("name", SAYS)
def test_example(name: str) -> None:
    done = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout


def test_no_example_is_left_out() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SAYS, "draw_classifier.py"}
