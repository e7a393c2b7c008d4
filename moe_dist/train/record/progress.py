"""What a person watching a run sees: one live line on a terminal, plain lines in a log file."""

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

_SMOOTHING = 0.9


class Progress:
    """Shows records as they come. For rank 0 only; a context manager.

    On a terminal, one live line with a bar. Elsewhere a plain line every `log_every` steps and at the last step.
    Evaluations get a line of their own on both. A number that a record lacks is left out.
    """

    def __init__(self, console: Console, log_every: int) -> None:
        self._console = console
        self._log_every = log_every
        self._step_seconds: float | None = None
        self._bar: Bar | None = None
        if console.is_interactive:
            self._bar = Bar(BarColumn(bar_width=16), TextColumn("{task.description}", markup=False), console=console)
            self._task = self._bar.add_task("starting", total=None)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, record: dict[str, Any], total_steps: int) -> None:
        """Show one step's record; the keys are those of metrics.jsonl."""
        step = record["step"]
        if "step_seconds" in record:
            self._step_seconds = smoothed(self._step_seconds, record["step_seconds"])
        eta = None if self._step_seconds is None else self._step_seconds * (total_steps - step)
        numbers = step_numbers(record, eta)
        line = f"step {step:>{len(str(total_steps))}}/{total_steps}  {numbers}"
        if self._bar is not None:
            self._bar.update(self._task, description=line, completed=step, total=total_steps)
        elif numbers and (step % self._log_every == 0 or step == total_steps):
            self.message(line)
        for what in ("skipped", "spike"):
            if what in record:
                self.message(f"step {step}  {what}: {record[what]}")
        if "validation_loss" in record:
            self.message(evaluation_line(record))
        if "validation_loss_by_corpus" in record:
            self.message(f"step {step}  of {losses_by_corpus(record)}")

    def message(self, text: str) -> None:
        """Print a line, above the live one if there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def step_numbers(record: dict[str, Any], eta_seconds: float | None) -> str:
    """The numbers of a training step, in columns: `loss 2.3456   4.1k tok/s  norm  0.98  ...  eta 2m10s`.

    Empty for a record without a training loss, which is an evaluation alone.
    """
    if "loss" not in record:
        return ""
    shown = [f"loss {record['loss']:6.4f}"]
    if "tokens_per_second" in record:
        shown.append(f"{short_number(record['tokens_per_second']):>5} tok/s")
    if "grad_norm" in record:
        shown.append(f"norm {record['grad_norm']:5.2f}")
    if "lr" in record:
        shown.append(f"lr {record['lr']:.1e}")
    if "drop_rate" in record:
        shown.append(f"drop {record['drop_rate']:5.1%}")
    if "load_max_over_mean" in record:
        shown.append(f"load {record['load_max_over_mean']:.2f}x")
    if eta_seconds is not None:
        shown.append(f"eta {duration(eta_seconds)}")
    return "  ".join(shown)


def losses_by_corpus(record: dict[str, Any]) -> str:
    """`corpora/web 2.1234, corpora/code 1.9876`"""
    return ", ".join(f"{path} {loss:.4f}" for path, loss in record["validation_loss_by_corpus"].items())


def evaluation_line(record: dict[str, Any]) -> str:
    """`step 200  validation 2.1234 nats  3.063 bits/byte`, and the loss under the evaluation capacity if any."""
    line = f"step {record['step']}  validation {record['validation_loss']:.4f} nats"
    if "validation_accuracy" in record:
        line += f"  accuracy {record['validation_accuracy']:.1%}  macro-F1 {record['validation_macro_f1']:.3f}"
    for unit in ("byte", "token"):
        if f"validation_bits_per_{unit}" in record:
            line += f"  {record[f'validation_bits_per_{unit}']:.3f} bits/{unit}"
    if "validation_loss_capped" in record:
        line += f"  capped {record['validation_loss_capped']:.4f} nats"
    if "test_accuracy" in record:
        line += f"  test accuracy {record['test_accuracy']:.1%}"
    return line


def print_summary(console: Console, rows: dict[str, str], title: str) -> None:
    """Print names and values as a small table."""
    table = Table(title=Text(title), title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))
    console.print(table)


def smoothed(mean: float | None, value: float) -> float:
    """An exponential mean, so that one slow step does not shake the remaining time."""
    return value if mean is None else _SMOOTHING * mean + (1 - _SMOOTHING) * value


def short_number(value: float) -> str:
    """950, 4.1k, 12.3k, 410k, 1.2M: at most five characters below 100 G."""
    for unit in ("", "k", "M"):
        digits = 1 if unit and value < 99.95 else 0
        if round(value, digits) < 1000:
            return f"{value:.{digits}f}{unit}"
        value /= 1000
    return f"{value:.1f}G"


def duration(seconds: float) -> str:
    """The two largest units of a duration: 45s, 2m10s, 1h02m, 3d04h."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02d}h"
    if hours:
        return f"{hours}h{minute:02d}m"
    return f"{minutes}m{second:02d}s" if minutes else f"{second}s"
