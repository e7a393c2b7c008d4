"""Signals before anybody can act on them, and output that goes nowhere."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe_dist import process
from moe_dist.process import STOP_SIGNALS, EarlySignals, interrupts_held

ROOT = Path(__file__).parents[2]
SPEAKS = """
import sys
from pathlib import Path
from rich.console import Console
from rich.table import Table
from moe_dist.process import output_never_fatal
with output_never_fatal():
    table = Table("name", "value")
    table.add_row("steps", "500")
    for line in range(2000):
        print("step", line)
        print("step", line, file=sys.stderr, flush=line % 2)
        Console().print(table)
    sys.stdout.writelines(["the", "end"])
    sys.stderr.write("the end")
Path(sys.argv[1]).write_text("it went on")
"""


def spoken(tmp_path: Path, redirection: str) -> None:
    command = ["bash", "-c", f'set -o pipefail; "$0" -c "$1" "$2" {redirection}', sys.executable, SPEAKS]
    done = subprocess.run(
        [*command, str(tmp_path / "end")], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done
    assert (tmp_path / "end").read_text() == "it went on"
    assert b"Error" not in done.stderr and b"Exception ignored" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    "redirection", ["2>&1 | head -1", ">/dev/full", ">/dev/full 2>&1", "2>/dev/full >/dev/null", ">&- 2>&-"]
)
def test_output_is_never_fatal(tmp_path: Path, redirection: str) -> None:
    """To the very end of the interpreter, which flushes and would return 120."""
    spoken(tmp_path, redirection)


def test_a_closed_output_is_not_lent_to_the_next_file(tmp_path: Path) -> None:
    work = "from moe_dist.process import output_never_fatal as o\nwith o():\n print(open('/dev/null').fileno(), file=f)"
    program = f"import sys\nf = open(sys.argv[1], 'w')\n{work}"
    command = ["bash", "-c", '"$0" -c "$1" "$2" <&- >&-', sys.executable, program, str(tmp_path / "number")]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=60)
    assert int((tmp_path / "number").read_text()) > 2


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with EarlySignals() as early:
        assert early.heard == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # some launchers signal twice
        assert early.heard == number
    assert signal.getsignal(number) == before
    assert capfd.readouterr().err == f"moe-dist: {number.name}: leaving before the first step; Ctrl-C ends it at once\n"


def test_a_second_interrupt_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended(Exception):
        pass

    def end(code: int) -> None:
        raise Ended(code)

    clock = iter([10.0, 10.5, 11.5])
    monkeypatch.setattr(process.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(os, "_exit", end)
    with EarlySignals(speak=False):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # its echo
        with pytest.raises(Ended, match="130"):
            os.kill(os.getpid(), signal.SIGINT)


def test_interrupts_wait_for_imports() -> None:
    def imports_and_catches() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException:
            raise AssertionError("lost inside the import") from None

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        imports_and_catches()
    assert signal.getsignal(signal.SIGINT) == before
    with interrupts_held():
        pass
