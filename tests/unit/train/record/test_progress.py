"""What a person sees of a run."""

import io
from typing import Any

import pytest
from rich.console import Console

from moe_dist.train.record.progress import Progress, duration, print_summary, short_number

RECORD = {
    "loss": 2.34561,
    "tokens_per_second": 4123.0,
    "grad_norm": 0.981,
    "lr": 9.8e-4,
    "drop_rate": 0.0312,
    "load_max_over_mean": 1.417,
    "step_seconds": 0.1,
}


def shown(records: list[dict[str, Any]], total_steps: int, *, log_every: int = 10, terminal: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=60, force_terminal=terminal, force_interactive=terminal, color_system=None
    )
    with Progress(console, log_every) as progress:
        for record in records:
            progress.update(record, total_steps)
    return console.file.getvalue()


def test_a_plain_line() -> None:
    text = shown([{"step": 120} | RECORD], total_steps=1000)
    numbers = "loss 2.3456   4.1k tok/s  norm  0.98  lr 9.8e-04  drop  3.1%  load 1.42x  eta 1m28s"
    assert text == f"step  120/1000  {numbers}\n"  # one line, although the console is narrower


def test_a_dense_model_has_no_moe_columns() -> None:
    assert shown([{"step": 10, "loss": 1.0}], total_steps=10) == "step 10/10  loss 1.0000\n"


def test_plain_lines_come_every_log_every_steps_and_at_the_end() -> None:
    text = shown([{"step": step, "loss": 1.0} for step in range(1, 26)], total_steps=25)
    assert [line.split("/")[0] for line in text.splitlines()] == ["step 10", "step 20", "step 25"]


def test_an_evaluation_has_its_own_line_at_any_step() -> None:
    evaluation = {"validation_loss": 2.1234, "validation_bits_per_byte": 3.0634}
    assert shown([{"step": 7, "loss": 1.0} | evaluation], total_steps=100) == (
        "step 7  validation 2.1234 nats  3.063 bits/byte\n"
    )
    capped = {"step": 10} | evaluation | {"validation_loss_capped": 2.25}
    assert shown([capped], total_steps=100) == (
        "step 10  validation 2.1234 nats  3.063 bits/byte  capped 2.2500 nats\n"
    )


def test_remaining_time_is_smoothed() -> None:
    slow_once = [{"step": 9, "loss": 1.0, "step_seconds": 1.0}, {"step": 10, "loss": 1.0, "step_seconds": 11.0}]
    assert "eta 20s" in shown(slow_once, total_steps=20)  # 10 steps of 0.9 * 1 + 0.1 * 11 seconds


def test_the_live_line_has_the_numbers_and_evaluations_stay() -> None:
    console = Console(file=io.StringIO(), width=140, force_terminal=True, force_interactive=True, color_system=None)
    with Progress(console, log_every=10) as progress:
        progress.update({"step": 121, "validation_loss": 2.0} | RECORD, 1000)
        progress.message("saved [bold] step-000121")
    text = console.file.getvalue()
    assert "step  121/1000" in text and "loss 2.3456" in text and "load 1.42x" in text
    assert "step 121  validation 2.0000 nats" in text
    assert "saved [bold] step-000121" in text  # brackets are text, not markup


def test_a_narrow_terminal_does_not_fail() -> None:
    assert "121/1000" in shown([{"step": 121} | RECORD], total_steps=1000, terminal=True)


def test_the_terminal_is_restored_after_an_error() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, force_interactive=True)
    with pytest.raises(RuntimeError), Progress(console, log_every=10) as progress:
        progress.update({"step": 1} | RECORD, 10)
        raise RuntimeError
    assert console.file.getvalue().rstrip().endswith("\x1b[?25h")  # show the cursor


def test_summary() -> None:
    console = Console(file=io.StringIO(), width=60, color_system=None)
    print_summary(console, {"parameters": "1.2M [total]", "device": "cpu"}, title="run [default]")
    text = console.file.getvalue()
    assert "run [default]" in text and "1.2M [total]" in text
    [row] = [line for line in text.splitlines() if "device" in line]
    assert "cpu" in row


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950.4, "950"), (999.6, "1.0k"), (4123, "4.1k"), (410_000, "410k"), (999_700, "1.0M"), (3.4e9, "3.4G")],
)
def test_short_number(value: float, text: str) -> None:
    assert short_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (45, "45s"), (59.7, "1m00s"), (130, "2m10s"), (3725, "1h02m"), (274_000, "3d04h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
