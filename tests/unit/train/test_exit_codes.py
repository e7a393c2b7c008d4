"""Scripts know exit codes by their numbers: those are as the help says, and stay."""

import re

import pytest

from moe_dist.cli import main
from moe_dist.train import exit_codes

NUMBERS = {
    **{"DONE": 0, "FAILED": 1, "USAGE": 2, "SAVED": 75},
    **{"DIVERGED": 76, "STALLED": 77, "REPLICAS_DIFFER": 78, "CRASH_LOOP": 79, "INTERRUPTED": 130},
}
WORDS = {
    **{0: "done", 1: "failed", 2: "mistake", 75: "saved"},
    **{76: "diverged", 77: "stood still", 78: "differ", 79: "start after start"},
}


def test_codes_are_the_numbers_that_the_help_tells(capsys: pytest.CaptureFixture[str]) -> None:
    assert {name: value for name, value in vars(exit_codes).items() if name.isupper()} == NUMBERS
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out.partition("Exit codes;")[2]
    told = dict(re.findall(r"(?:^|\s)(\d{1,2}) {1,2}(\S.*?)(?=\s{2,}|\n)", text))
    assert {int(code) for code in told} == set(WORDS)
    assert all(word in told[str(code)] for code, word in WORDS.items()), told
